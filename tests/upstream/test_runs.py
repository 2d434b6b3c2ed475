"""``--stage simpo`` in a real MindSpeed-LLM: evaluation, resuming, other stages, the hook, data files, a run."""

import json
import re
import site
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mindspeed_simpo.data.indexed import KEYS, IndexedPairs, write_indexed_pairs
from tests import oracle
from tests.tokenizers import ENGLISH, make_tokenizer
from tests.upstream.harness import (
    BASE_FLAGS,
    MODEL_FLAGS,
    dense,
    environment,
    expected,
    launch,
    make_pairs,
    needs_upstream,
    train,
    upstream_file,
    write_data,
    write_indexed,
)
from tests.upstream.weights import hf_params

pytestmark = needs_upstream

PAIRS = make_pairs(16)
ENTRY = ["-m", "mindspeed_simpo.posttrain_gpt"]


def flags_of(text):
    return f"{MODEL_FLAGS} {BASE_FLAGS} --micro-batch-size 2 --global-batch-size 4 --train-iters 2 {text}".split()


@pytest.mark.parametrize("parallel", ["", "--pipeline-model-parallel-size 2", "--use-distributed-optimizer"])
def test_evaluation(tmp_path, parallel):
    flags = f"--split 50,50,0 --eval-interval 1 --eval-iters 2 --lr 0.0 --min-lr 0.0 {parallel}"
    run = train(tmp_path, PAIRS, flags, 2 if parallel else 1)
    lines = re.findall(r"validation loss at iteration 1 \| (.*)", run.text)
    found = {name: float(value) for name, value in re.findall(r"([\w/ ]+) value: ([-+.\dE]+) \|", lines[0])}
    wanted, _ = expected(PAIRS[8:])
    wanted["lm loss"] = wanted.pop("loss")
    assert {name.strip(): value for name, value in found.items()} == pytest.approx(wanted, rel=2e-6, abs=5e-6)


@pytest.mark.parametrize("parallel", ["", "--use-distributed-optimizer --tensor-model-parallel-size 2"])
def test_resuming_is_as_if_never_stopped(tmp_path, parallel):
    ranks = 2 if parallel else 1
    # Megatron 0.12.1 cannot load a distributed optimizer of fp32 weights
    parallel += " --ckpt-format torch" + (" --bf16" if parallel else "")
    whole = train(tmp_path / "whole", PAIRS, parallel, ranks, iterations=4)
    saved = f"{parallel} --save {tmp_path}/checkpoints --save-interval 2"
    # a run of four iterations that ends at the second
    train(tmp_path / "first", PAIRS, f"{saved} --exit-interval 2", ranks, iterations=4)
    resumed = train(tmp_path / "second", PAIRS, f"{parallel} --load {tmp_path}/checkpoints", ranks, iterations=4)
    assert resumed.metrics() == whole.metrics()[2:]
    for before, after in zip(whole.ranks, resumed.ranks, strict=True):
        for name, (_, _, value) in before["parameters"].items():
            assert torch.equal(after["parameters"][name][2], value), name


def sft_data(folder):
    flags = write_data(folder, PAIRS)
    tokens = [prompt + chosen for prompt, chosen, _ in PAIRS]
    labels = [[-100] * len(prompt) + chosen for prompt, chosen, _ in PAIRS]
    columns = {"input_ids": tokens, "labels": labels, "attention_mask": [[1] * len(ids) for ids in tokens]}
    write_indexed(folder / "sft", columns)
    return flags


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_other_stages_are_as_without_the_plug_in(tmp_path, stage):
    data = sft_data(tmp_path / "data")
    flags = flags_of(f"--stage {stage}")
    if stage == "sft":
        flags.remove("--is-pairwise-dataset")
        data[1] = str(tmp_path / "data" / "sft")
    runs = [
        launch(tmp_path / name, flags + data, entry=entry)
        for name, entry in (("plain", ["posttrain_gpt.py"]), ("ours", ENTRY))
    ]
    assert [run.code for run in runs] == [0, 0], runs[1].text[-3000:]
    for name in ("lm loss", "grad norm"):
        assert len(runs[0].logged(name)) == 2
        assert runs[0].logged(name) == runs[1].logged(name)


def test_dpo_under_tensor_parallelism_warns_once(tmp_path):
    flags = flags_of("--stage dpo --tensor-model-parallel-size 2") + write_data(tmp_path / "data", PAIRS)
    run = launch(tmp_path / "run", flags, 2, entry=ENTRY)
    assert run.code == 0, run.text[-3000:]
    assert run.text.count("Add --dpo-exact for exact ones") == 1
    assert run.text.count("mindspeed_simpo:") == 1


def test_an_unmodified_script_with_the_variable(tmp_path):
    if not _pth_installed():
        pytest.skip("the .pth hook is not installed in this environment: pip install the package")
    flags = flags_of("--stage simpo") + write_data(tmp_path / "data", PAIRS)
    run = launch(tmp_path / "run", flags, entry=["posttrain_gpt.py"], extra_environment={"MINDSPEED_SIMPO": "1"})
    assert run.code == 0, run.text[-3000:]
    assert len(run.metrics()) == 2


def _pth_installed():
    return any((Path(folder) / "mindspeed_simpo.pth").exists() for folder in site.getsitepackages())


def test_preprocessed_files_are_read_and_written_as_they_are(tmp_path):
    script = upstream_file("preprocess_data.py")
    rows = [
        {
            "instruction": ENGLISH.splitlines()[i],
            "input": "",
            "chosen": f"Yes, {i}.",
            "rejected": "No. " * (i % 3 + 1),
        }
        for i in range(1, 9)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    make_tokenizer("llama").save_pretrained(tmp_path / "tokenizer")
    keys = {"prompt": "instruction", "query": "input", "response": "", "chosen": "chosen", "rejected": "rejected"}
    command = [
        sys.executable,
        str(script),
        "--input",
        str(tmp_path / "rows.json"),
        "--tokenizer-type",
        "PretrainedFromHF",
    ]
    command += ["--tokenizer-name-or-path", str(tmp_path / "tokenizer"), "--output-prefix", str(tmp_path / "theirs")]
    command += ["--handler-name", "AlpacaStylePairwiseHandler", "--prompt-type", "llama3", "--workers", "1"]
    command += ["--map-keys", json.dumps(keys), "--seq-length", "4096", "--cache-dir", str(tmp_path / "cache")]
    process = subprocess.run(
        command, cwd=script.parent, env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    pairs = IndexedPairs(tmp_path / "theirs")
    assert len(pairs) == 8
    write_indexed_pairs(tmp_path / "ours", pairs)
    for key in KEYS:
        for suffix in (".bin", ".idx"):
            theirs, ours = (tmp_path / f"{name}_packed_{key}_document{suffix}" for name in ("theirs", "ours"))
            assert theirs.read_bytes() == ours.read_bytes(), theirs


def test_training_follows_the_oracle(tmp_path):
    run = train(tmp_path, PAIRS, f"--clip-grad 1.0 --tensorboard-dir {tmp_path}/board", iterations=3)
    params = {name: value.double().requires_grad_() for name, value in hf_params().items()}
    options = oracle.Options()
    optimizer, losses = oracle.AdamW(params, options), []
    for step in range(3):
        metrics, gradients = dense(params, params, PAIRS[4 * step : 4 * step + 4])
        scale = min(1.0, 1.0 / (oracle.grad_norm(gradients) + 1e-6))
        optimizer.step({name: value * scale for name, value in gradients.items()}, 1e-3)
        losses.append(metrics["loss"])
    assert [line["lm loss"] for line in run.metrics()] == pytest.approx(losses, rel=1e-5)
    board = EventAccumulator(str(tmp_path / "board")).Reload()
    for name in run.metrics()[0]:
        recorded = [event.value for event in board.Scalars(name)]
        assert recorded == pytest.approx([line[name] for line in run.metrics()], rel=1e-6, abs=1e-6), name
