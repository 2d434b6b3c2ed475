"""The engine's attention by MindSpeed's ring and Ulysses, against the gathered form, on ranks of its own."""

import os
import subprocess
import sys

import pytest

from tests.upstream.harness import environment, needs_upstream

pytestmark = needs_upstream


@pytest.mark.parametrize(
    ("algo", "form"), [("megatron_cp_algo", "padded"), ("ulysses_cp_algo", "padded"), ("ulysses_cp_algo", "packed")]
)
@pytest.mark.parametrize(("ranks", "heads", "groups"), [(2, 4, 2), (4, 4, 1), (2, 4, 4)])
def test_outputs_and_gradients_are_those_of_the_gathered_form(tmp_path, algo, form, ranks, heads, groups):
    words = [algo, ranks, heads, groups, form, tmp_path / "store"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.upstream.context_worker", str(rank), *map(str, words)],
            env=environment(),
            cwd=os.getcwd(),  # noqa: PTH109
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    for process in processes:
        said, _ = process.communicate(timeout=240)
        assert process.returncode == 0, said[-3000:]
        assert "the same to rounding" in said
