"""Sampling pairs as a user types it: killed and gone on with, trained on, and in a loop with training."""

import json
import sys

from scripts.iterate import iterate
from tests.e2e.cli import Ranks, wait_until

SCORER = """
import json, sys, time
for line in sys.stdin:
    row = json.loads(line)
    time.sleep(0.02)
    print(json.dumps({"scores": [len(answer) + row["columns"]["weight"] for answer in row["answers"]]}))
"""


def lines(path):
    return path.read_bytes().count(b"\n") if path.exists() else 0


def prompts_file(path, train_pairs):
    """Twelve rows with a column of their own, of which two have one prompt."""
    rows = [json.loads(line) for line in train_pairs.read_text().splitlines()[:11]]
    rows = [row | {"weight": number} for number, row in enumerate([*rows, rows[0]])]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_killed_run_goes_on_and_its_pairs_train(program, train_pairs, tmp_path):
    scorer = tmp_path / "scorer.py"
    scorer.write_text(SCORER)
    flags = {
        "prompts": prompts_file(tmp_path / "prompts.jsonl", train_pairs),
        "n": 4,
        "max_new_tokens": 12,
        "cut_answers": "keep",
        "batch_size": 4,
        "scorer": f"{sys.executable} -S {scorer}",
        "scorer_columns": "weight",
        "split": "90,10",  # of the training's own data, as what needs held-out pairs
        "eval_decontaminate": True,
    }
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    report = program.run("sample", output=whole, **flags).metrics
    assert (report["rows"], report["prompts"], report["duplicate_prompts"]) == (12, 11, 1)
    assert report["answers"] == 44
    assert report["pairs"] == 11 - report["tied"] - report["too_few"] - report["refused"] == lines(whole) > 5
    assert report["mean_gap"] > 0

    answers, scores = (tmp_path / "killed.jsonl.work" / name for name in ("answers.jsonl", "scores.jsonl"))
    run = program.start("sample", output=killed, **flags)
    wait_until(lambda: lines(answers) > 1, run)
    run.kill()
    assert 1 < lines(answers) < 11
    with answers.open("ab") as file:
        file.write(b'{"index": 10, "answ')
    run = program.start("sample", output=killed, **flags)
    wait_until(lambda: lines(scores) > 1, run)
    run.kill()
    assert 1 < lines(scores) < 11
    assert not killed.exists()
    failed = program.run("sample", output=killed, **flags | {"temperature": 0.9})
    failed.fails(2, "the answers were begun with other settings", "temperature: 0.8 before, 0.9 now")
    assert program.run("sample", output=killed, **flags).metrics == report | {"output": str(killed)}
    assert killed.read_bytes() == whole.read_bytes()

    trained = program.run("train", data_path=whole, train_iters=1, global_batch_size=2, micro_batch_size=2)
    assert trained.code == 0, trained.stderr
    assert f"{report['pairs']} rows, {report['pairs']} pairs kept" in trained.stderr


def test_rounds_of_sampling_and_training_go_on(program, train_pairs, tmp_path):
    scorer = tmp_path / "scorer.py"
    scorer.write_text(SCORER)
    program.config |= {"lora_r": 2, "global_batch_size": 2, "train_iters": 1}
    config = program.arguments("train", {})[1]
    prompts = prompts_file(tmp_path / "prompts.jsonl", train_pairs)
    started, broken = [], {5}

    def start(words):
        started.append(words)
        folder = tmp_path / f"stage{len(started)}"
        if len(started) in broken:
            return 137
        return Ranks(folder, words, 1, {"HOME": str(program.home)}).wait().code

    sample = (
        f"--n 3 --max-new-tokens 8 --cut-answers keep --scorer '{sys.executable} -S {scorer}' --scorer-columns weight"
    )
    words = [config, "--prompts", str(prompts), "--rounds", "2", "--output", str(tmp_path / "loop"), "--sample", sample]
    assert iterate(words, start) == 137
    assert iterate(words, start) == 0
    assert [stage[0] for stage in started] == ["sample", "train", "export", "sample", "train", "train", "export"]
    assert started[4] == started[5]
    first, second = started[0], started[3]
    assert "--model-name-or-path" not in first
    assert second[second.index("--model-name-or-path") + 1] == str(tmp_path / "loop" / "round1" / "merged")
    assert (tmp_path / "loop" / "round2" / "merged" / "model.safetensors").is_file()
    pairs = [(tmp_path / "loop" / f"round{number}" / "pairs.jsonl").read_text().splitlines() for number in (1, 2)]
    sources = [{json.loads(line)["source"] for line in lines} for lines in pairs]
    assert not sources[0] & sources[1]
    assert iterate(words, start) == 0
    assert len(started) == 7
    assert iterate([*words, "--train", "--train-iters 2"], start) == 2
