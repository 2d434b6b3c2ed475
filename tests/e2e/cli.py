"""The program as a user starts it, and the same program in ranks of the forkserver, which start at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import yaml

from mindspeed_simpo.cli.launch import Rendezvous
from tests.ranks.launcher import _context as context

TIMEOUT_S = 180
_DISTRIBUTED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Done:
    """What is left of a finished run."""

    code: int
    stdout: str
    stderr: str

    def fails(self, code, *fragments):
        """Ended with ``code`` and a message, on stderr, that has each fragment; no traceback; returns the message."""
        assert self.code == code, self.stdout + self.stderr
        assert "Traceback" not in self.stderr, self.stderr
        lines = [line for line in self.stderr.splitlines() if line.startswith("error: ")]
        assert lines, self.stderr
        message = "\n".join(lines)
        for fragment in fragments:
            assert str(fragment) in message
        return message

    @property
    def metrics(self):
        """The JSON object on the last line of stdout."""
        assert self.code == 0, self.stderr
        return json.loads(self.stdout.splitlines()[-1])


class Ranks:
    """``mindspeed-simpo ARGV`` on ``ranks`` processes, started and brought down as torchrun does."""

    def __init__(self, folder, argv, ranks, env):
        self.folder = folder
        folder.mkdir(parents=True)
        self.rendezvous = Rendezvous()
        self.rendezvous.serve()
        shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), **self.rendezvous.environment}
        self.processes = []
        for rank in range(ranks):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
            words = [str(word) for word in argv]
            process = context.Process(target=_main, args=(words, env | own, str(folder)))
            process.start()
            self.processes.append(process)

    @property
    def running(self):
        return all(process.is_alive() for process in self.processes)

    def kill(self):
        """kill -9 of every rank."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self, timeout=TIMEOUT_S):
        """Wait for all ranks; one that fails brings the others down. A run that takes longer fails the test."""
        deadline = time.monotonic() + timeout
        first = None
        try:
            while any(process.is_alive() for process in self.processes):
                failed = [process for process in self.processes if process.exitcode]
                if failed:
                    first = first or failed[0].exitcode
                    for process in self.processes:
                        process.terminate()
                assert time.monotonic() < deadline, "hangs; it said:\n" + (self.folder / "stderr").read_text()
                time.sleep(0.01)
        finally:
            self.kill()
        code = first or max(process.exitcode for process in self.processes)
        return Done(code, *((self.folder / name).read_text() for name in ("stdout", "stderr")))


def _main(argv, environment, folder):
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - multiprocessing has replaced both
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.update(environment)
    sys.argv = ["mindspeed-simpo", *argv]
    from mindspeed_simpo.cli.main import main

    main()


class Program:
    """Starts the program in a test's own folder: its own HOME, configuration file and outputs."""

    def __init__(self, folder, **config):
        self.folder = Path(folder)
        self.home = self.folder / "home"
        self.home.mkdir(parents=True)
        self.config = {"device": "cpu", "num_workers": 1} | config
        self._runs = 0

    def arguments(self, command, flags):
        if command == "export":
            words = [command]
        else:
            file = self.folder / f"config{self._runs}.yaml"
            file.write_text(yaml.safe_dump(self.config, sort_keys=False), encoding="utf-8")
            words = [command, str(file)]
        for key, value in flags.items():
            flag = f"--{key.replace('_', '-')}"
            words += [flag] if value is True else [flag, str(value)]
        return words

    def start(self, command, ranks=1, env=None, **flags):
        """Ranks of the forkserver; wait for them or kill them."""
        self._runs += 1
        argv = self.arguments(command, flags)
        return Ranks(self.folder / f"run{self._runs}", argv, ranks, {"HOME": str(self.home)} | (env or {}))

    def run(self, command, ranks=1, env=None, **flags):
        """The same, to its end."""
        return self.start(command, ranks, env, **flags).wait()

    def shell(self, command, launcher=("-m",), **flags):
        """``python -m mindspeed_simpo`` as a process of its own; ``launcher`` may be torchrun's."""
        self._runs += 1
        environment = {name: value for name, value in os.environ.items() if name not in _DISTRIBUTED}
        return subprocess.Popen(
            [sys.executable, *launcher, "mindspeed_simpo", *self.arguments(command, flags)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=self.folder,
            env=environment | {"HOME": str(self.home), "OMP_NUM_THREADS": "1"},
        )

    def type(self, command, launcher=("-m",), **flags):
        """The same, to its end."""
        process = self.shell(command, launcher, **flags)
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
        return Done(process.returncode, stdout, stderr)


def lines_of(output, split="train"):
    """Metrics lines of a run's output folder, without one that the run is about to write."""
    text = (Path(output) / "metrics.jsonl").read_text()
    lines = (json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines())
    return [line for line in lines if line["split"] == split]


def wait_until(condition, process, seconds=90):
    """Poll ``condition`` closely while the run goes on."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.running, (process.folder / "stderr").read_text()
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.001)
