"""LoRA as a user types it: train, resume, export for peft, merge, go on from an adapter, and what is refused."""

import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import oracle
from tests.e2e.cli import lines_of
from tests.e2e.encode import encode_file
from tests.hf import make_checkpoint
from tests.hf_adapters import quiet_peft

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
LORA = {"lora_r": 4, "lora_alpha": 8.0, "lora_target_modules": ["q_proj", "v_proj", "down_proj"]}


@pytest.fixture
def program(program):
    program.config |= LORA | {"lr": 1e-2}
    return program


def peft_metrics(base, adapter, pairs):
    """Mean log-probability of chosen and rejected responses by peft and transformers, nats per token."""
    with quiet_peft():
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).double()
    means = []
    for prompt, *responses in pairs:
        for ids in responses:
            tokens = torch.tensor([[*prompt, *ids]])
            with torch.no_grad():
                logits = model(tokens).logits[0, :-1].log_softmax(-1)
            means.append(logits.gather(1, tokens[0, 1:, None])[-len(ids) :].mean().item())
    return sum(means[::2]) / len(pairs), sum(means[1::2]) / len(pairs)


def test_train_export_merge_and_go_on(program, tmp_path, model, train_pairs):
    done = program.run("train", 4, export_hf=True, **{TP: 2, PP: 2})
    assert done.code == 0, done.stderr
    adapter = tmp_path / "out" / "hf"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(model))

    checkpoints, again, whole = tmp_path / "out" / "checkpoints", tmp_path / "again", tmp_path / "whole"
    for output, flags in ((again, {}), (whole, {"merge_adapters": True})):
        done = program.run("export", checkpoint=checkpoints, output=output, **flags)
        assert done.code == 0, done.stderr
    factors, same = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, again))
    assert factors.keys() == same.keys()
    assert all(torch.equal(factors[name], same[name]) for name in factors)
    assert all(factor.any() for factor in factors.values())

    pairs = encode_file(model, train_pairs)
    expected = oracle.evaluate(whole, pairs, oracle.Options())
    found = peft_metrics(model, adapter, pairs)
    assert found == pytest.approx((expected["logps/chosen"], expected["logps/rejected"]), rel=1e-5)
    program.config["eval_data_path"] = str(train_pairs)
    for flags in ({"load": tmp_path / "out"}, {"lora_load": adapter}):
        assert program.run("evaluate", 2, **{TP: 2}, **flags).metrics == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_a_resumed_run_and_one_that_never_stopped(program, tmp_path, model):
    done = program.run("train", 2, output_dir=tmp_path / "whole", **{TP: 2})
    assert done.code == 0, done.stderr
    done = program.run("train", 2, save_interval=1, use_distributed_optimizer=True)
    assert done.code == 0, done.stderr
    for name in ("iter_0000002", "iter_0000003"):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / name)
    done = program.run("train", 2, load="auto", **{PP: 2})
    assert done.code == 0, done.stderr
    resumed, whole = ([line["loss"] for line in lines_of(tmp_path / run)] for run in ("out", "whole"))
    assert resumed == pytest.approx(whole, rel=1e-5)
    size = sum(path.stat().st_size for path in (tmp_path / "whole" / "checkpoints" / "iter_0000003").glob("rank*"))
    assert size < (model / "model.safetensors").stat().st_size  # the checkpoint does not hold the base


def test_a_reference_of_its_own_and_the_model_without_adapters(program, tmp_path, model, train_pairs):
    """The same numbers, computed before training or in each step, where ``ref_model`` is the model itself."""
    program.config |= {"stage": "dpo", "dpo_beta": 0.5, "eval_data_path": str(train_pairs), "eval_iters": 1}
    for output, flags in (("step", {}), ("before", {"ref_model": model})):
        done = program.run("train", 2, output_dir=tmp_path / output, **{PP: 2}, **flags)
        assert done.code == 0, done.stderr
    for split in ("train", "eval"):
        step, before = ([line["loss"] for line in lines_of(tmp_path / run, split)] for run in ("step", "before"))
        assert step == pytest.approx(before, rel=1e-6)
    assert (program.home / ".cache" / "mindspeed_simpo" / "reference").is_dir()


def test_check_counts_adapters_and_their_learning_rate(program):
    done = program.type("check")
    assert done.code == 0, done.stderr
    assert "frozen, 1,664 of adapters (r 4)" in " ".join(done.stdout.split())
    assert "adapters want about 10 times" in " ".join(done.stdout.split())
    program.config["lora_target_modules"] = ["q_prj"]
    done = program.type("check")
    assert done.code == 1
    assert "did you mean q_proj?" in done.stdout


def test_what_does_not_belong_together_is_refused(program, tmp_path, model):
    done = program.run("train", train_iters=1, export_hf=True)
    assert done.code == 0, done.stderr
    other = make_checkpoint(tmp_path / "other", "qwen2", tied=True, vocab_size=515, hidden=32, std=0.2, seed=3)
    adapter = tmp_path / "out" / "hf"
    done = program.run("train", model_name_or_path=other, load="auto")
    done.fails(1, "holds adapters of", model, other, "other weights")
    program.run("train", lora_r=2, load="auto").fails(1, "lora_r: 4 (now 2)")
    program.config["output_dir"] = str(tmp_path / "new")
    program.run("train", lora_load=adapter, lora_r=2).fails(1, "adapter_config.json", "r is 4", "has 2")
    program.config["lora_target_modules"] = ["q_proj"]
    program.run("train", lora_load=adapter).fails(1, "target_modules is down_proj, q_proj, v_proj")
    program.config |= {"lora_r": 0, "lora_alpha": None, "lora_target_modules": "all-linear"}
    done = program.run("train", train_iters=1)
    assert done.code == 0, done.stderr
    done = program.run("export", checkpoint=tmp_path / "new", output=tmp_path / "hf", merge_adapters=True)
    done.fails(1, "--merge-adapters", "has no adapters")
