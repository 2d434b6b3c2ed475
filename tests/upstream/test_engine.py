"""The engine's NPU branch with the real MindSpeed's adaptor and a stand-in for torch_npu, against the oracle.

The command line is that of a launch script: MindSpeed's adaptor would parse it.
"""

import os
import subprocess
import sys

import pytest
import torch

from tests import oracle
from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.parity import worst_error
from tests.unit.test_ascend_scripts import call
from tests.upstream.harness import REPOSITORY, environment, free_port, needs_upstream

pytestmark = needs_upstream

TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP = {"pipeline_model_parallel_size": 2}
CP = {"context_parallel_size": 2, "context_parallel_algo": "gathered", "fused_logprob": True}


def command_line(folder, layout):
    """What a launch script gives the ranks after ``-m mindspeed_simpo``, and a user's flags of the layout."""
    recorded = call("engine_simpo_qwen3_8b_4k_ptd.sh", folder / "root")[1]["flags"]
    flags = recorded[recorded.index("-m") + 2 :]
    for key, value in layout.items():
        flag = "--" + key.replace("_", "-")
        flags += [flag] if value is True else [flag, str(value)]
    return flags


@pytest.mark.parametrize(("family", "ranks", "layout"), [("qwen3", 1, {}), ("llama", 2, TP), ("qwen2", 4, PP | CP)])
def test_gradients(tmp_path, family, ranks, layout):
    folder = make_checkpoint(tmp_path / "model", family=family, vocab_size=514, std=0.15)
    pairs = make_token_pairs(8, 514)
    torch.save((pairs, {"lr": 1e-3, "micro_batch_size": 2, **layout}), tmp_path / "job.pt")
    worker = str(REPOSITORY / "tests" / "upstream" / "engine.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--master-port"]
    command += [str(free_port()), worker, *command_line(tmp_path, layout)]
    # this package's tests before those of MindSpeed and Megatron-LM
    paths = [str(REPOSITORY), os.environ["MEGATRON_LM_PATH"], os.environ["MINDSPEED_PATH"]]
    process = subprocess.run(
        command,
        env=environment()
        | {"PYTHONPATH": os.pathsep.join([*paths, str(REPOSITORY / "tests" / "fakes")]), "ENGINE_JOB": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    wanted = oracle.gradients(folder, pairs, oracle.Options())
    error, name = worst_error(torch.load(tmp_path / "gradients.pt"), wanted)
    assert error < 1e-5, name
