"""The script of the evaluation harness, on a small local task: its accuracies are those of transformers and peft."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from mindspeed_simpo.errors import ModelError
from scripts.evaluate_harness import INDEX, open_folder
from tests.hf_adapters import quiet_peft
from tests.tokenizers import ENGLISH

REPO = Path(__file__).parents[2]
CHOICES = ["blue", "pink", "gold", "grey"]


@pytest.fixture
def task(tmp_path):
    """A folder with a task of 16 questions with four answers each."""
    words = ENGLISH.split()
    questions = [f"{words[i]} {words[-i]}: what colour has {words[2 * i + 1]}?" for i in range(16)]
    rows = [{"question": text, "choices": CHOICES, "answer": 2 if i % 3 else 1} for i, text in enumerate(questions)]
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    description = {
        "task": "birds",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "birds.jsonl")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "birds.yaml").write_text(yaml.safe_dump(description))
    return folder, rows


def accuracy(model, tokenizer, rows):
    """How often the answer with the largest log-probability is the right one."""
    right = 0
    for row in rows:
        turn = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        scores = []
        for choice in row["choices"]:
            start, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (prompt, prompt + choice))
            with torch.no_grad():
                logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(ids[1:])
            scores.append(logprobs.gather(1, targets[:, None])[len(start) - 1 :].sum())
        right += int(torch.stack(scores).argmax()) == row["answer"]
    return right / len(rows)


def test_adapters_beside_their_model(program, tmp_path, model, task):
    program.config |= {"lora_r": 4, "lr": 0.1, "lr_warmup_fraction": 0.0, "train_iters": 2}
    done = program.run("train", export_hf=True)
    assert done.code == 0, done.stderr
    adapter, (folder, rows) = tmp_path / "out" / "hf", task
    words = [sys.executable, "-m", "scripts.evaluate_harness", adapter, "--base", model, "--tasks", "birds"]
    words += ["--include-path", folder, "--device", "cpu", "--output", tmp_path / "results" / "birds.json"]
    done = subprocess.run(
        list(map(str, words)),
        cwd=REPO,
        env=os.environ | {"HF_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "results" / "birds.json").read_text())
    tokenizer, whole = AutoTokenizer.from_pretrained(adapter), AutoModelForCausalLM.from_pretrained(model)
    expected = {"base": accuracy(whole, tokenizer, rows)}
    with quiet_peft():
        expected["model"] = accuracy(PeftModel.from_pretrained(whole, adapter), tokenizer, rows)
    assert {name: found["birds"]["acc,none"] for name, found in written["results"].items()} == expected
    assert expected["base"] != expected["model"], "the two could be exchanged"
    assert all(0 < value < 1 for value in expected.values())
    assert f"{expected['model'] - expected['base']:+.4f}" in done.stdout
    assert written["settings"]["chat_template"] is True


def test_what_is_no_exported_model_is_refused(tmp_path, model):
    def refused(folder):
        with pytest.raises(ModelError) as error:
            open_folder(folder)
        return str(error.value)

    assert open_folder(model).base is None
    assert "is no folder" in refused(tmp_path / "absent")
    (tmp_path / "checkpoints").mkdir()
    message = refused(tmp_path / "checkpoints")
    assert "it lacks config.json, model.safetensors, tokenizer.json" in message
    assert "mindspeed-simpo export --checkpoint" in message
    copied = shutil.copytree(model, tmp_path / "copied")
    (copied / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model.safetensors"}}))
    assert "it lacks model-1.safetensors." in refused(copied)
    (copied / "adapter_model.safetensors").write_text("")
    (copied / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/gone/base"}))
    assert "/gone/base, which is not there" in refused(copied)
