"""A process that runs the plug-in with the smallest MindSpeed-LLM that has its seams (``tests/fakes/seams``)."""

import os
import subprocess
import sys
from pathlib import Path

SEAMS = Path(__file__).resolve().parents[1] / "fakes" / "seams"
PAIRWISE = ["--is-pairwise-dataset"]
SIMPO = ["--stage", "simpo", "--pref-ftx", "0.3", *PAIRWISE]


def execute(command, seams=SEAMS, **extra):
    variables = os.environ | {"PYTHONPATH": str(seams)} | extra
    command = [sys.executable, *command]
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=120, check=False)


def entry(*flags, seams=SEAMS, **extra):
    return execute(["-m", "mindspeed_simpo.posttrain_gpt", *flags], seams, **extra)
