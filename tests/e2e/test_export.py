"""What training leaves for transformers: a model that loads, generates, and has the same chat template."""

import re
from importlib.metadata import version

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mindspeed_simpo import __version__
from tests import oracle
from tests.e2e.cli import lines_of
from tests.e2e.encode import encode_file
from tests.hf import make_checkpoint

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
MESSAGES = [{"role": "user", "content": "What is the capital of France?"}]


def test_a_trained_model_generates_and_evaluates_alike(program, tmp_path, train_pairs, eval_pairs):
    source = make_checkpoint(tmp_path / "source", "qwen3", hidden=32, std=0.2, vocab_size=517)
    (source / "README.md").write_text("the card of the base model")
    program.config |= {"model_name_or_path": str(source), "eval_data_path": str(eval_pairs), "eval_interval": 1}
    program.config |= {"train_iters": 2, TP: 2, PP: 2}
    done = program.run("train", 4, export_hf=True)
    assert done.code == 0, done.stderr
    assert done.stdout == ""
    exported = tmp_path / "out" / "hf"

    model, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(exported)
    original = AutoTokenizer.from_pretrained(source)
    assert tokenizer.chat_template == original.chat_template
    text = tokenizer.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert text == original.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    prompt = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    torch.manual_seed(0)
    answer = model.generate(**prompt, max_new_tokens=8, min_new_tokens=8, do_sample=True)
    assert answer.shape[1] == prompt["input_ids"].shape[1] + 8

    done = program.type("export", checkpoint=tmp_path / "out" / "checkpoints", output=tmp_path / "again")
    assert done.code == 0, done.stderr
    weights, again = (load_file(folder / "model.safetensors") for folder in (exported, tmp_path / "again"))
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert_card_tells_of_the_run(exported, program, train_pairs, eval_pairs)
    assert (exported / "README.md").read_bytes() == (tmp_path / "again" / "README.md").read_bytes()
    before = load_file(source / "model.safetensors")
    assert all(not torch.equal(weights[name], before[name]) for name in weights)

    expected = oracle.evaluate(exported, encode_file(exported, train_pairs), oracle.Options())
    program.config["eval_data_path"] = str(train_pairs)
    for flags in ({"model_name_or_path": exported}, {"load": tmp_path / "out"}):
        assert program.run("evaluate", 4, **flags).metrics == pytest.approx(expected, rel=1e-5, abs=1e-5)


def assert_card_tells_of_the_run(exported, program, train_pairs, eval_pairs):
    card = ModelCard.load(exported / "README.md")
    assert (card.data.library_name, card.data.pipeline_tag) == ("transformers", "text-generation")
    assert card.data.base_model is None, "a local folder is no model of the hub"
    assert card.data.license is None
    first, *_, last = lines_of(exported.parent, "eval")
    [result] = card.data.eval_results
    assert (result.dataset_name, result.metric_value) == ("eval.jsonl", last["rewards/accuracies"])
    rows = {cells[1].strip(" `"): cells[2:-1] for line in card.text.splitlines() if len(cells := line.split("|")) > 3}
    assert [float(cell) for cell in rows["logps/chosen"]] == pytest.approx(
        [first["logps/chosen"], last["logps/chosen"]], rel=1e-3
    )
    expected = {"training": "24", "held out": "7", "lr": "`0.001`", "gamma_beta_ratio": "`0.55`", "steps": "2"}
    expected |= {"devices": "4 x cpu", "torch": version("torch"), "mindspeed-simpo": __version__}
    assert {name: rows[name][-1].strip() for name in expected} == expected
    assert "tensor 2, pipeline 2" in rows["layout"][0]
    for path in (program.folder, train_pairs.parent, eval_pairs.parent):
        assert str(path) not in card.content
    [snippet] = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    exec(snippet.replace("=256", "=4"), {"name": str(exported)})  # noqa: S102 - what a reader would type


def test_what_stands_at_the_output_is_not_written_over(program, tmp_path):
    done = program.run("train", train_iters=1)
    assert done.code == 0, done.stderr
    taken = tmp_path / "taken"
    (taken / "photos").mkdir(parents=True)
    program.run("export", checkpoint=tmp_path / "out", output=taken).fails(1, taken, "not an earlier export")
    program.run("export", checkpoint=tmp_path / "absent", output=tmp_path / "hf").fails(1, tmp_path / "absent")
    program.run("export", checkpoint=tmp_path / "out", output="/proc/hf").fails(1, "/proc/hf", "cannot be written")
