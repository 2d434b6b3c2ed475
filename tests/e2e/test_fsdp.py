"""``backend: fsdp`` as a user types it: check, train, resume, evaluate, export, adapters, and what is refused."""

import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import oracle
from tests.e2e.cli import lines_of
from tests.e2e.encode import encode_file
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


def test_adapters_for_peft_and_merged(program, tmp_path, model, train_pairs):
    program.config |= {"lora_r": 4, "lora_alpha": 8.0, "lr": 1e-2, "stage": "dpo"}
    done = program.run("train", 2, export_hf=True)
    assert done.code == 0, done.stderr
    folder = tmp_path / "out"
    config = json.loads((folder / "hf" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (4, 8, str(model))
    done = program.run("export", checkpoint=folder / "checkpoints", output=tmp_path / "merged", merge_adapters=True)
    assert done.code == 0, done.stderr
    [(prompt, chosen, _), *_] = encode_file(model, train_pairs)
    tokens = torch.tensor([[*prompt, *chosen]])
    with quiet_peft(), torch.no_grad():
        adapted = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), folder / "hf")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
        assert torch.allclose(adapted(tokens).logits, merged(tokens).logits, atol=1e-4)


@pytest.mark.parametrize(
    ("flags", "fragments"),
    [
        ({"tensor_model_parallel_size": 2}, ["tensor_model_parallel_size", "only backend: megatron has it"]),
        ({"use_distributed_optimizer": True}, ["use_distributed_optimizer", "backend: megatron"]),
        ({"fsdp_shard_size": 3}, ["fsdp_shard_size 3 does not divide the 2 ranks"]),
        ({"lora_r": 4, "lora_target_modules": "q_pro"}, ["no linear layer 'q_pro'", "did you mean 'q_proj'"]),
        ({"lora_r": 4, "lora_dropout": 0.1}, ["lora_dropout", "backend: megatron"]),
        ({"backend": "megatron", "fsdp_shard_size": 2}, ["fsdp_shard_size", "only backend: fsdp has it"]),
    ],
)
def test_refused_by_name(program, flags, fragments):
    program.run("train", 2, **flags).fails(2, *fragments)
