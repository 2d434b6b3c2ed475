"""Sweeps of real trainings: stopped, killed, shared by two processes; infeasible and failed trials; the ablations."""

import json
import os
import signal
import threading
import time

import pytest

from mindspeed_simpo.cli import main as cli
from tests.browser import open_browser, open_page
from tests.e2e.cli import TIMEOUT_S, Ranks, lines_of

optuna = pytest.importorskip("optuna")


@pytest.fixture
def sweeping(program, eval_pairs):
    program.config |= {"eval_data_path": str(eval_pairs), "save_interval": 1, "seq_length": 256}
    program.config |= {"train_iters": 6, "truncation": "keep_end", "data_cache_dir": str(program.folder / "cache")}
    return program


class Started:
    """A training in a process of the forkserver, as ``subprocess.Popen`` has it."""

    def __init__(self, words, log):
        self.log = log
        self.ranks = Ranks(log.parent / f"ranks{time.monotonic_ns()}", words, 1, {})

    def poll(self):
        [process] = self.ranks.processes
        if process.exitcode is not None:
            self.log.write_text((self.ranks.folder / "stderr").read_text())
        return process.exitcode

    def send_signal(self, number):
        os.kill(self.ranks.processes[0].pid, number)

    def kill(self):
        self.ranks.kill()


@pytest.fixture
def here(sweeping, monkeypatch, capsys):
    """Runs the command in this process, its trainings in processes of the forkserver."""
    monkeypatch.setattr("mindspeed_simpo.cli.launch.start_program", Started)

    def execute(**flags):
        code = cli.execute(sweeping.arguments("sweep", flags))
        return code, *capsys.readouterr()

    return execute


def stop_once_saved(folder):
    """Ctrl-C, to this process, once a trial has a checkpoint."""

    def wait_and_stop():
        wait_for(lambda: list(folder.glob("checkpoints/iter_*")))
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait_and_stop, daemon=True).start()


def wait_for(condition):
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.005)
    return found


def test_the_ablations_stopped_killed_and_shared(sweeping, here):
    """Ctrl-C in the first trial, then kill -9 of one of two processes; the other one ends the sweep."""
    output, flags = sweeping.folder / "out", {"file": "simpo_ablations"}
    stop_once_saved(output / "trial_0000")
    code, stdout, _ = here(**flags)
    assert code == 130
    assert "1 waiting" not in stdout
    assert "3 waiting" in stdout
    stopped_at = sorted((output / "trial_0000" / "checkpoints").glob("iter_*"))[-1].name

    killed, lives = (sweeping.shell("sweep", **flags) for _ in range(2))
    taken = wait_for(lambda: trial_of(output, killed))[0]
    wait_for(lambda: list((output / f"trial_{taken:04d}").glob("checkpoints/iter_*")))
    killed.kill()
    killed.communicate()
    stdout, stderr = lives.communicate(timeout=TIMEOUT_S)
    assert lives.returncode == 0, stderr
    assert "3 trials: 3 complete" in stdout
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{output}/sweep.db")
    slots = {state: [] for state in ("COMPLETE", "FAIL")}
    for trial in study.trials:
        slots[trial.state.name].append(trial.user_attrs["slot"])
    assert sorted(slots["COMPLETE"]) == [0, 1, 2]
    assert slots["FAIL"] in ([0, taken], [taken, 0])  # stopped and killed, and each gone on with once
    assert f"resumed from {output}/trial_0000/checkpoints/{stopped_at}" in (output / "trial_0000/train.log").read_text()
    assert "resumed from" in (output / f"trial_{taken:04d}" / "train.log").read_text()
    rows = {row["trial"]: row for row in json.loads((output / "sweep.json").read_text())["trials"]}
    for slot, keys in enumerate(({}, {"simpo_length_norm": False}, {"gamma_beta_ratio": 0.0})):
        assert [line["step"] for line in lines_of(output / f"trial_{slot:04d}")] == list(range(1, 7))
        assert (rows[slot]["keys"], rows[slot]["metrics"]["step"]) == (keys, 6)
        assert rows[slot]["metrics"] == lines_of(output / f"trial_{slot:04d}", "eval")[-1]

    before = (output / "trial_0000" / "metrics.jsonl").stat().st_mtime_ns
    code, stdout, _ = here(**flags)
    assert code == 0
    assert "3 trials: 3 complete" in stdout
    assert (output / "trial_0000" / "metrics.jsonl").stat().st_mtime_ns == before
    code, _, stderr = here(file="simpo_ablations", simpo_beta="7")
    assert code == 2
    assert "simpo_beta: 2.5 (now 7.0)" in stderr


def trial_of(output, process):
    """The slot of the trial that a process runs, in a tuple; None where it runs none."""
    assert process.poll() is None, process.communicate()
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{output}/sweep.db")
    for trial in study.trials:
        owner = trial.user_attrs.get("owner", {})
        if trial.state.name == "RUNNING" and owner.get("process") == str(process.pid):
            return (trial.user_attrs["slot"],)
    return None


def test_a_trial_fails_and_one_is_beyond_the_bound(sweeping, here):
    output = sweeping.folder / "out"
    sweeping.config |= {"train_iters": 2, "save_interval": 0}
    words = {"grid": "lr=1e-4,3.0,1e30", "metric": "rewards/margins", "max-logps-fall": "0.2"}
    code, stdout, _ = here(**words)
    assert code == 1
    found = json.loads((output / "sweep.json").read_text())
    states = {row["parameters"]["lr"]: row["state"] for row in found["trials"]}
    assert states == {1e-4: "complete", 3.0: "infeasible", 1e30: "failed"}
    assert "not finite" in found["trials"][-1]["error"]
    assert "3 trials: 1 complete, 1 infeasible, 1 failed. Best: trial 0 (lr 0.0001)" in stdout
    assert found["best"]["command"] in stdout
    assert "--lr 0.0001" in found["best"]["command"]
    with open_browser() as browser, open_page(browser, (output / "index.html").as_uri()) as page:
        page.wait_for_function("document.querySelectorAll('.figure[data-drawn]').length == 3")
        assert page.locator("tbody tr").count() == 3
        assert "not finite" in page.locator("pre").last.inner_text()
