"""Iterative SimPO: sample pairs from the current model, train on them, sample from the trained model, and so on.

    python -m scripts.iterate CONFIG --prompts FILE --rounds 3 --output DIR \
        --sample "--reward-model RM --max-new-tokens 1024" --train "--num-train-epochs 1" --nproc-per-node 8

Each round has its own part of the prompts. The first round begins with CONFIG's model, the next one with the model that
the last one trained, which is also the reference model of objectives that need one. A loop that was killed goes on with
the same command: finished stages are skipped, ``sample`` and ``train`` go on where they were.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

Start = Callable[[Sequence[str]], int]


def iterate(argv: Sequence[str], start: Start) -> int:
    """Run the rounds.

    Args:
        argv: The command line.
        start: Runs the program with these words and returns its exit code.

    Returns:
        0, or the exit code of the first stage that failed.
    """
    given = _parse(argv)
    output, model = Path(given.output), []
    for number in range(1, given.rounds + 1):
        folder = output / f"round{number}"
        folder.mkdir(parents=True, exist_ok=True)
        pairs, trained = folder / "pairs.jsonl", folder / "train"
        sample = ["sample", given.config, "--prompts", given.prompts, "--output", str(pairs), *model]
        sample += ["--shard", f"{number}/{given.rounds}", *shlex.split(given.sample)]
        train = ["train", given.config, "--data-path", str(pairs), "--output-dir", str(trained), *model]
        train += ["--load", "auto", "--export-hf", "--nproc-per-node", str(given.nproc_per_node)]
        train += shlex.split(given.train)
        if code := _once(folder / "sample.done", sample, start) or _once(folder / "train.done", train, start):
            return code
        weights = trained / "hf"
        if yaml.safe_load((trained / "config.yaml").read_text(encoding="utf-8")).get("lora_r"):
            weights = folder / "merged"
            export = ["export", "--checkpoint", str(trained / "checkpoints"), "--output", str(weights)]
            if code := _once(folder / "export.done", [*export, "--merge-adapters"], start):
                return code
        model = ["--model-name-or-path", str(weights)]
    sys.stdout.write(f"{weights}\n")
    return 0


def _once(mark: Path, words: list[str], start: Start) -> int:
    """Run a stage, unless its mark says that the same words have run to their end."""
    if mark.exists():
        if json.loads(mark.read_text(encoding="utf-8")) == words:
            return 0
        sys.stderr.write(f"error: {mark}: {words[0]} was done by another command: remove the file to do it again\n")
        return 2
    sys.stderr.write(f"{mark.parent.name}: mindspeed-simpo {shlex.join(words)}\n")
    if code := start(words):
        return code
    partial = mark.with_suffix(".incomplete")
    partial.write_text(json.dumps(words), encoding="utf-8")
    partial.replace(mark)
    return 0


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m scripts.iterate", description="Sample, train, sample, train.")
    parser.add_argument("config", help="configuration of the training, as for mindspeed-simpo train")
    parser.add_argument("--prompts", required=True, help="rows with the prompts, divided over the rounds")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", required=True, help="folder of the rounds")
    parser.add_argument("--sample", required=True, help="further flags of sample, in one text; a scorer at least")
    parser.add_argument("--train", default="", help="further flags of train, in one text")
    parser.add_argument("--nproc-per-node", type=int, default=1, help="ranks of the training on this host")
    given = parser.parse_args(argv)
    if given.rounds < 1:
        parser.error("--rounds: expected at least 1")
    return given


def _start(words: Sequence[str]) -> int:
    return subprocess.run([sys.executable, "-m", "mindspeed_simpo", *words], check=False).returncode


if __name__ == "__main__":
    sys.exit(iterate(sys.argv[1:], _start))
