"""A short campaign of faults, as ``scripts/faults.py`` runs a long one."""

import sys

import pytest

from scripts.faults import campaign, table

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_nothing_is_lost_and_the_run_goes_on_bit_by_bit(tmp_path):
    names = ["SIGKILL to the launcher", "a byte of the newest checkpoint flips"]
    outcomes, skipped = campaign(2, 3, tmp_path, names, ["TP2"])
    assert [outcome.fault for outcome in outcomes] == names
    assert not [problem for outcome in outcomes for problem in outcome.problems]
    assert not skipped
    assert all(outcome.seconds < 10 for outcome in outcomes)
    assert "| **all** | 2 |" in table(outcomes)
