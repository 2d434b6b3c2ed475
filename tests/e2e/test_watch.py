"""What a run says of itself: alarms, answers, the best checkpoint, an early stop, the closing summary."""

import json
import os
import shlex
import signal

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.e2e.cli import Ranks, lines_of, wait_until
from tests.e2e.test_checkpoints import tensors_of

TP = "tensor_model_parallel_size"


def summary_of(output):
    return json.loads((output / "summary.json").read_text())


def samples_of(output):
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def numbers_of(output, *splits):
    """Lines of metrics, of all splits where none is named, without what depends on the clock."""
    of_time = ("pairs_per_second", "tokens_per_second", "peak_memory_bytes", "step_seconds")
    lines = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
    chosen = [line for line in lines if not splits or line["split"] in splits]
    return [{name: value for name, value in line.items() if name not in of_time} for line in chosen]


def digests_of(checkpoint):
    """Of every rank's parameters, optimizer state and random state."""
    files = json.loads((checkpoint / "files.json").read_text())["files"]
    return {name: record["blake2b"] for name, record in files.items() if name.startswith("rank_")}


def checkpoints_of(output):
    return sorted(path.name for path in (output / "checkpoints").iterdir())


def test_a_run_that_learns_by_heart(program, tmp_path, eval_pairs):
    """It raises alarms, keeps its best checkpoint, stops early, exports the best; killed and resumed, it does the same.

    Held out are pairs whose answers are swapped, so that the held-out loss can only rise.
    """
    swapped = [json.loads(line) for line in eval_pairs.read_text().splitlines()]
    swapped = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in swapped]
    held_out = tmp_path / "swapped.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in swapped))
    program.config |= {
        "eval_data_path": str(held_out),
        "train_iters": 40,
        "lr": 1e-2,
        "micro_batch_size": 4,
        "eval_interval": 3,
        "metric_for_best_model": "eval_loss",
        "early_stopping_patience": 3,
        "save_interval": 4,
        "save_total_limit": 1,
        "export_hf": True,
        "load": "auto",
    }
    whole, out = tmp_path / "whole", tmp_path / "out"
    done = program.run("train", 2, output_dir=whole)
    assert done.code == 0, done.stderr
    assert checkpoints_of(whole) == ["best.json", "iter_0000003", "iter_0000012"]
    best = json.loads((whole / "checkpoints" / "best.json").read_text())
    losses = {line["step"]: line["loss"] for line in lines_of(whole, "eval")}
    assert list(losses) == [0, 3, 6, 9, 12]
    assert best == {"checkpoint": "iter_0000003", "metric": "loss", "greater": False, "step": 3, "value": losses[3]}
    assert "stopped early after step 12 of 40: the last 3 evaluations were no improvement of loss" in done.stderr

    alarms = lines_of(whole, "alarm")
    assert {"accuracy_early", "held_out_parts"} <= {line["alarm"] for line in alarms}
    recorded = (whole / "run.log").read_text()
    events = EventAccumulator(str(whole / "tensorboard")).Reload()
    for line in alarms:
        text = f"{line['alarm']}, step {line['step']}: {line['message']}; {line['advice']}"
        assert done.stderr.count(f"\nwarning: {text}\n") == 1
        assert recorded.count(f"WARNING {text}\n") == 1
        [event] = events.Tensors(f"alarm/{line['alarm']}/text_summary")
        assert event.step == line["step"]
    assert " s left\n" in done.stderr

    summary = summary_of(whole)
    assert summary["status"] == "stopped_early"
    assert (summary["trained"]["steps"], summary["trained"]["pairs"], summary["trained"]["ranks"]) == (12, 24, 2)
    assert (summary["before"]["loss"], summary["after"]["loss"]) == (losses[0], losses[12])
    assert summary["exported_step"] == 3
    assert [alarm["alarm"] for alarm in summary["alarms"]] == [line["alarm"] for line in alarms]
    assert "no better than" in done.stderr
    exported = program.run("export", checkpoint=summary["best"]["checkpoint"], output=tmp_path / "hf")
    assert exported.code == 0, exported.stderr
    best_weights, weights = (load_file(folder / "model.safetensors") for folder in (tmp_path / "hf", whole / "hf"))
    assert all(weights[name].equal(value) for name, value in best_weights.items())

    run = program.start("train", 2)
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(lines_of(out, "eval")) == 3, run)
    run.kill()
    done = program.run("train", 2)
    assert done.code == 0, done.stderr
    assert "resumed from" in done.stderr
    assert numbers_of(out) == numbers_of(whole)
    assert checkpoints_of(out) == checkpoints_of(whole)
    for name in ("iter_0000003", "iter_0000012"):
        ours, theirs = (tensors_of(folder / "checkpoints" / name) for folder in (out, whole))
        assert all(torch.equal(ours[key], value) for key, value in theirs.items())
    assert summary_of(out)["alarms"] == summary["alarms"]

    done = program.run("train", 2)
    assert done.code == 0, done.stderr
    assert "stopped early after step 12" in done.stderr
    assert numbers_of(out) == numbers_of(whole)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(2, {TP: 2, "lora_r": 4}), (1, {"backend": "fsdp", "lr": 3e-2})],
    ids=["tensor parallel, adapters", "fsdp"],
)
def test_answers_of_the_current_weights_disturb_nothing(program, tmp_path, eval_pairs, ranks, options):
    program.config |= options | {"eval_data_path": str(eval_pairs), "eval_interval": 2, "train_iters": 4}
    silent, out = tmp_path / "silent", tmp_path / "out"
    assert program.run("train", ranks, output_dir=silent).code == 0
    program.config |= {"eval_generate": 2, "eval_generate_max_new_tokens": 7}
    done = program.run("train", ranks, eval_interval=3, export_hf=True)
    assert done.code == 0, done.stderr
    assert digests_of(out / "checkpoints/iter_0000004") == digests_of(silent / "checkpoints/iter_0000004")
    assert numbers_of(out, "train") == numbers_of(silent, "train")

    samples = samples_of(out)
    assert [(line["step"], line["index"]) for line in samples] == [(step, i) for step in (0, 3, 4) for i in (0, 1)]
    if "lora_r" in options:
        exported = program.run("export", checkpoint=out, output=out / "merged", merge_adapters=True)
        assert exported.code == 0, exported.stderr
    folder = out / ("merged" if "lora_r" in options else "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for line in samples[-2:]:
        ids = tokenizer(line["prompt"], return_tensors="pt", add_special_tokens=False)["input_ids"]
        for _ in range(line["tokens"]):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(dim=-1)], dim=1)
        assert tokenizer.decode(ids[0, -line["tokens"] :], skip_special_tokens=True) == line["answer"]
    answer_tokens = [line["answer_tokens"] for line in lines_of(out, "eval")]
    assert answer_tokens[-1] == sum(line["tokens"] for line in samples[-2:]) / 2
    assert f"answer to held-out prompt 0: {samples[0]['answer']!r}" in done.stderr


def test_a_signal_ends_with_the_command_to_go_on(program, tmp_path, eval_pairs):
    program.config |= {"eval_data_path": str(eval_pairs), "eval_generate": 1, "eval_generate_max_new_tokens": 3}
    program.config |= {"train_iters": 200, "eval_interval": 1, "metric_for_best_model": "rewards/margins"}
    out = tmp_path / "out"
    run = program.start("train")
    wait_until(lambda: (out / "metrics.jsonl").exists() and len(lines_of(out)) >= 2, run)
    os.kill(run.processes[0].pid, signal.SIGTERM)
    assert run.wait().code == 128 + signal.SIGTERM
    summary = summary_of(out)
    step = summary["trained"]["steps"]
    assert (summary["status"], summary["signal"], summary["model_folder"]) == ("stopped_by_signal", "SIGTERM", None)
    [command] = summary["next_commands"]
    assert command == f"mindspeed-simpo train {out / 'config.yaml'} --load auto"
    # the evaluation of the step that the signal came in is made up for
    words = shlex.split(command)[1:]
    done = Ranks(tmp_path / "resumed", [*words, "--train-iters", step + 1], 1, {"HOME": str(tmp_path)}).wait()
    assert done.code == 0, done.stderr
    steps = list(range(step + 2))
    assert [line["step"] for line in lines_of(out, "eval")] == steps
    assert [line["step"] for line in samples_of(out)] == steps
    assert summary_of(out)["status"] == "finished"
