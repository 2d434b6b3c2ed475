"""A short campaign of faults, as ``scripts/faults.py`` runs a long one."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_nothing_is_lost_and_the_run_goes_on_bit_by_bit():
    names = ["SIGKILL to the launcher"]  # the others go the same way
    command = [sys.executable, "-m", "scripts.faults", "--cycles", "1", "--seed", "3", "--settings", "TP2"]
    process = subprocess.run(
        [*command, "--faults", *names],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in process.stdout.splitlines()[2:]]
    assert [row[0] for row in rows[2:]] == [*names, "**all**"]
    assert [row[1] for row in rows[2:]] == ["1", "1"]
    assert [row[-1] for row in rows[2:]] == ["0", "0"], process.stdout
    assert max(float(row[3].split(", ")[-1]) for row in rows[2:]) < 10
