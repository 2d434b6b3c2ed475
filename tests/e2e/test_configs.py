"""Every shipped configuration trains, with a small model and data in place of the named ones; the quickstart learns."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.cli import Ranks

REPO = Path(__file__).parents[2]
QUICKSTART = REPO / "configs" / "quickstart"


def run(*words, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess:
    paths = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        list(map(str, words)),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        env=os.environ | {"PATH": paths, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("path", sorted((REPO / "configs").glob("*_[78]b_*.yaml")), ids=lambda path: path.stem)
def test_configurations_of_large_models_train_a_small_one(path, tmp_path):
    words = [
        *("train", path, "--device", "cpu"),
        *("--model-name-or-path", QUICKSTART, "--init-from", "config", "--data-path", QUICKSTART / "held_out.jsonl"),
        *("--data-cache-dir", tmp_path / "cache", "--output-dir", tmp_path / "out", "--tensor-model-parallel-size", 1),
        *("--seq-length", 64, "--max-prompt-length", 32, "--global-batch-size", 2, "--train-iters", 2),
    ]
    done = Ranks(tmp_path / "run", words, 1, {"HOME": str(tmp_path)}).wait()
    assert done.code == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [1, 2]
    assert list((tmp_path / "out" / "hf").glob("*model.safetensors"))


def test_quickstart_data_is_what_its_script_writes(tmp_path):
    run(sys.executable, REPO / "scripts" / "make_quickstart_data.py", "--output", tmp_path, cwd=tmp_path)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    committed = {path.name: path.read_bytes() for path in QUICKSTART.iterdir()}
    assert written == committed
    assert sum(map(len, committed.values())) < 300_000


def test_held_out_prompts_are_not_training_prompts():
    prompts = {
        part: [json.loads(line)["prompt"] for line in (QUICKSTART / f"{part}.jsonl").read_text().splitlines()]
        for part in ("train", "held_out")
    }
    assert len(prompts["held_out"]) == 90
    assert not set(prompts["train"]) & set(prompts["held_out"])


def test_quickstart_learns_what_it_was_never_shown(tmp_path):
    """The commands of scripts/quickstart.sh, without its set-up of an environment."""
    for folder in ("configs", "scripts"):
        (tmp_path / folder).symlink_to(REPO / folder)
    lines = (REPO / "scripts" / "quickstart.sh").read_text().splitlines()
    commands = [line for line in lines if line.startswith(("mindspeed-simpo", "python "))]
    assert len(commands) == 3
    for command in commands:
        table = run("bash", "-euc", command, cwd=tmp_path, timeout=600).stdout
    metrics = [json.loads(line) for line in (tmp_path / "outputs/quickstart/metrics.jsonl").read_text().splitlines()]
    accuracies = [line["rewards/accuracies"] for line in metrics if line["split"] == "eval"]
    assert 0.3 <= accuracies[0] <= 0.7
    assert accuracies[-1] >= 0.9
    right = next(line for line in table.splitlines() if "right answers" in line).replace("│", " ").split()
    assert int(right[-2]) == 0
    assert int(right[-1]) >= 60
