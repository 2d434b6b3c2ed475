"""Ranks that `--nproc-per-node` starts: one message, the right exit code, and no process left."""

import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from mindspeed_simpo.cli.launch import GRACE_S

REPO = Path(__file__).parents[2]
QUICKSTART = REPO / "configs" / "quickstart"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.yaml"
    values = {
        "model_name_or_path": str(QUICKSTART),
        "init_from": "config",
        "data_path": str(QUICKSTART / "train.jsonl"),
        "data_cache_dir": str(tmp_path / "cache"),
        "output_dir": str(tmp_path / "out"),
        "seq_length": 64,
        "global_batch_size": 4,
        "train_iters": 100_000,
        "device": "cpu",
    }
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def start(*words, **options) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-m", "mindspeed_simpo", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        **options,
    )


def children(pid: int) -> list[int]:
    """The rank processes of a launcher, in rank order."""
    found = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    ranks = {}
    for child in found:
        entries = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        variables = dict(entry.split(b"=", 1) for entry in entries if b"=" in entry)
        if b"RANK" in variables:
            ranks[int(variables[b"RANK"])] = child
    return [ranks[rank] for rank in sorted(ranks)]


def wait_for(condition, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@contextmanager
def started(config_file, *flags):
    """A launcher whose two ranks are in the middle of training, and the ranks' process ids."""
    launcher = start("train", config_file, "--nproc-per-node", 2, *flags)
    try:
        wait_for(lambda: launcher.poll() is not None or _steps(config_file.parent / "out" / "metrics.jsonl") >= 3)
        assert launcher.poll() is None, launcher.stderr.read()
        ranks = children(launcher.pid)
        assert len(ranks) == 2
        yield launcher, ranks
    finally:
        launcher.kill()
        launcher.communicate()


@pytest.fixture
def training(config_file):
    with started(config_file) as processes:
        yield processes


def _steps(metrics: Path) -> int:
    return metrics.read_text().count('"split": "train"') if metrics.exists() else 0


def test_a_killed_rank_brings_the_run_down(training):
    launcher, ranks = training
    os.kill(ranks[1], signal.SIGKILL)
    _, stderr = launcher.communicate(timeout=30)
    assert launcher.returncode == 128 + signal.SIGKILL, stderr
    assert "error: rank 1 was killed by SIGKILL" in stderr
    assert "Traceback" not in stderr
    assert not any(map(is_running, ranks))


def test_a_rank_that_hangs_is_named_and_ends_the_run(config_file):
    # the first one long enough for the start on a busy machine
    timeout_s, roll_call_s = 15, 5
    with started(config_file, "--distributed-timeout-minutes", timeout_s / 60) as (launcher, ranks):
        begin = time.monotonic()
        os.kill(ranks[1], signal.SIGSTOP)
        _, stderr = launcher.communicate(timeout=90)
        seconds = time.monotonic() - begin
    assert launcher.returncode == 1, stderr
    messages = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert len(messages) == 1, stderr
    assert "rank 1 hangs for longer than distributed_timeout_minutes" in messages[0]
    assert "Traceback" not in stderr
    assert seconds < timeout_s + roll_call_s + GRACE_S + 10
    wait_for(lambda: not any(map(is_running, ranks)), seconds=10)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_and_stops(training, tmp_path, number):
    launcher, ranks = training
    launcher.send_signal(number)
    _, stderr = launcher.communicate(timeout=20)
    assert launcher.returncode == 128 + number, stderr
    [saved] = (tmp_path / "out" / "checkpoints").iterdir()
    assert int(saved.name.removeprefix("iter_")) == _steps(tmp_path / "out" / "metrics.jsonl")
    assert f"stopped by {number.name} after step" in stderr
    assert "Traceback" not in stderr
    assert not any(map(is_running, ranks))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_ends_a_single_process_without_a_traceback(config_file, tmp_path, number):
    process = start("train", config_file)
    try:
        wait_for(lambda: process.poll() is not None or _steps(tmp_path / "out" / "metrics.jsonl") >= 3)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 128 + number
    assert "Traceback" not in stderr
    saved = list((tmp_path / "out" / "checkpoints").glob("iter_*"))
    assert len(saved) == (number in (signal.SIGTERM, signal.SIGUSR1))


def test_an_error_of_all_ranks_is_said_once(config_file):
    launcher = start("train", config_file, "--nproc-per-node", 2, "--data-path", "absent.jsonl")
    stdout, stderr = launcher.communicate(timeout=90)
    assert launcher.returncode == 1
    assert stdout == ""
    assert stderr.count("absent.jsonl") == 1 + stderr.count("looked for")
    assert stderr.count("error:") == 1
    assert "Traceback" not in stderr
