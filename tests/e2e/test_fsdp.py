"""``backend: fsdp`` as a user types it: check, train, resume, evaluate, export, adapters, and what is refused."""

import json
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from mindspeed_simpo.data.batching import Batching
from tests import oracle
from tests.e2e.cli import lines_of
from tests.e2e.encode import encode_file, encode_rows
from tests.hf import make_checkpoint
from tests.hf_adapters import quiet_peft


@pytest.fixture
def program(program):
    # an epsilon far above the noise of fp32 keeps Adam from scaling that noise up
    program.config |= {"backend": "fsdp", "lr": 1e-3, "adam_eps": 1e-5}
    return program


def test_the_folder_of_a_run_without_steps_is_the_folder_it_began_from(program, tmp_path, model):
    done = program.run("train", 2, export_hf=True, train_iters=0)
    assert done.code == 0, done.stderr
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out" / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_train_resume_evaluate_and_export(program, tmp_path, eval_pairs, model):
    done = program.run("check")
    assert done.code == 0, done.stdout
    program.config |= {"save_interval": 2}
    done = program.run("train", 2, output_dir=tmp_path / "whole", export_hf=True)
    assert done.code == 0, done.stderr
    done = program.run("train", 1, output_dir=tmp_path / "of megatron", export_hf=True, backend="megatron")
    assert done.code == 0, done.stderr
    found, expected = (lines_of(tmp_path / name) for name in ("whole", "of megatron"))
    for key in ("loss", "grad_norm", "rewards/margins", "logps/chosen"):
        assert [line[key] for line in found] == pytest.approx([line[key] for line in expected], rel=1e-4), key

    checkpoints = tmp_path / "whole" / "checkpoints"
    done = program.run("train", 1, load=min(checkpoints.iterdir()), export_hf=True)
    assert done.code == 0, done.stderr
    assert lines_of(tmp_path / "out")[-1]["loss"] == pytest.approx(found[-1]["loss"], rel=1e-5)
    done = program.run("export", checkpoint=checkpoints, output=tmp_path / "exported")
    assert done.code == 0, done.stderr
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole/hf", "exported"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

    metrics = program.run("evaluate", 2, load=tmp_path / "whole", eval_data_path=eval_pairs).metrics
    expected = oracle.evaluate(tmp_path / "exported", encode_file(model, eval_pairs), oracle.Options())
    assert metrics["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("batching", ["packed", "prefix_shared"])
def test_ranks_with_other_numbers_of_micro_batches(program, tmp_path, model, batching):
    """Of a long pair and three shorter ones one rank has two micro-batches, the other one has one."""
    texts = ["long" * 80, *["short" * 38] * 3]
    rows = [([{"role": "user", "content": "A word?"}], text, f"{number} {text}") for number, text in enumerate(texts)]
    lengths = [tuple(map(len, pair)) for pair in encode_rows(model, rows)]
    sizes = [Batching(batching, 1, 1).size_of(*each) for each in lengths]
    budget = sum(sizes[1:3]) + 8
    assert budget >= sizes[0]
    packing = Batching(batching, 1, budget)
    assert sorted(len(packing.parts([sizes[pair] for pair in own])) for own in packing.deal(sizes, 2)) == [1, 2]

    names = ("prompt", "chosen", "rejected")
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(dict(zip(names, ("A word?", *row[1:]), strict=True))) + "\n" for row in rows))
    program.config |= {"data_path": str(data), "eval_data_path": str(data), "batching": batching}
    program.config |= {"max_tokens_per_micro_batch": budget, "seq_length": max(p + max(c, r) for p, c, r in lengths)}
    program.config |= {"global_batch_size": 4, "micro_batch_size": 1, "distributed_timeout_minutes": 1}
    for name, ranks, backend in (("fsdp", 2, "fsdp"), ("one", 1, "megatron")):
        done = program.run("train", ranks, output_dir=tmp_path / name, backend=backend)
        assert done.code == 0, done.stderr
    for split in ("train", "eval"):
        found, expected = (lines_of(tmp_path / name, split) for name in ("fsdp", "one"))
        assert [line["loss"] for line in found] == pytest.approx([line["loss"] for line in expected], rel=1e-5)


@pytest.mark.parametrize("kind", ["linear layers", "experts", "4 bits"])
def test_adapters_for_peft_and_merged(program, tmp_path, model, train_pairs, kind):
    program.config |= {"lora_r": 4, "lora_alpha": 8.0, "lr": 1e-2, "stage": "dpo"}
    options = {}
    if kind == "experts":
        model = make_checkpoint(tmp_path / "model", "mixtral", vocab_size=515, hidden=32)
        names = ["q_proj", "gate_up_proj", "down_proj"]
        program.config |= {"model_name_or_path": str(model), "lora_target_modules": names}
    elif kind == "4 bits":
        model = make_checkpoint(tmp_path / "model", "qwen3", vocab_size=515, hidden=64)
        program.config |= {"model_name_or_path": str(model), "quantization": "nf4"}
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    assert program.run("check").code == 0
    done = program.run("train", 2, export_hf=True)
    assert done.code == 0, done.stderr
    folder = tmp_path / "out"
    config = json.loads((folder / "hf" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(model))
    card = ModelCard.load(folder / "hf" / "README.md")
    assert (card.data.library_name, card.data.tags[0], "| `lora_r` | `4` |" in card.text) == ("peft", "dpo", True)
    done = program.run("export", checkpoint=folder / "checkpoints", output=tmp_path / "merged", merge_adapters=True)
    assert done.code == 0, done.stderr
    [(prompt, chosen, _), *_] = encode_file(model, train_pairs)
    tokens = torch.tensor([[*prompt, *chosen]])
    with quiet_peft(), torch.no_grad():
        # in evaluation bitsandbytes computes in bf16 on some CPUs
        base = AutoModelForCausalLM.from_pretrained(model, **options).train()
        before = base(tokens).logits
        adapted = PeftModel.from_pretrained(base, folder / "hf")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        found = adapted.train()(tokens).logits
        assert (found - before).abs().max() > 1e-2
        assert torch.allclose(found, merged(tokens).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ({"tensor_model_parallel_size": 2}, ["tensor_model_parallel_size", "only backend: megatron has it"]),
        ({"use_distributed_optimizer": True}, ["use_distributed_optimizer", "backend: megatron"]),
        ({"fsdp_shard_size": 3}, ["fsdp_shard_size 3 does not divide the 2 ranks"]),
        ({"lora_r": 4, "lora_target_modules": "q_pro"}, ["no linear layer 'q_pro'", "did you mean 'q_proj'"]),
        ({"lora_r": 4, "quantization": "nf4", "backend": "megatron"}, ["quantization: nf4 needs backend: fsdp"]),
        ({"quantization": "nf4"}, ["quantization: there are no adapters without a rank"]),
        ({"backend": "megatron", "fsdp_shard_size": 2}, ["fsdp_shard_size", "only backend: fsdp has it"]),
    ],
)
def test_refused_by_name(program, flags, fragments):
    program.run("train", 2, **flags).fails(2, *fragments)


@pytest.mark.parametrize("command", ["check", "train"])
def test_code_of_a_checkpoint_is_never_run(program, tmp_path, model, command):
    folder = shutil.copytree(model, tmp_path / "with code")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "new_one",
        "auto_map": {"AutoConfig": "code.NewConfig", "AutoModelForCausalLM": "code.New"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"from pathlib import Path\nPath({str(tmp_path / 'was run')!r}).touch()\n")
    done = program.run(command, model_name_or_path=folder)
    assert done.code == 1
    assert "(auto_map), which is never done" in " ".join((done.stdout + done.stderr).split())
    assert not (tmp_path / "was run").exists()
