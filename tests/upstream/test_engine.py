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


def run_engine(tmp_path, family, ranks, layout, runs):
    """Results of the runs ``(batches, options of the run)``, one after the other, and the folder of the model."""
    folder = make_checkpoint(tmp_path / "model", family=family, vocab_size=514, std=0.15)
    # fp32, which is not the default on NPUs
    torch.save((runs, {"lr": 1e-3, "micro_batch_size": 2, "bf16": False, **layout}), tmp_path / "job.pt")
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
    return torch.load(tmp_path / "results.pt", weights_only=False), folder


@pytest.mark.parametrize(("family", "ranks", "layout"), [("qwen3", 1, {}), ("llama", 2, TP), ("qwen2", 4, PP | CP)])
def test_gradients(tmp_path, family, ranks, layout):
    pairs = make_token_pairs(8, 514)
    [result], folder = run_engine(tmp_path, family, ranks, layout, [([pairs], {})])
    wanted = oracle.gradients(folder, pairs, oracle.Options())
    error, name = worst_error(result["grads"], wanted)
    assert error < 1e-5, name


@pytest.mark.parametrize("sharded", [False, True])
def test_a_resumed_run_counts_the_updates_of_mindspeeds_adam(tmp_path, sharded):
    batches = [make_token_pairs(8, 514, seed=seed) for seed in range(3)]
    saved = str(tmp_path / "saved")
    runs = [(batches, {}), (batches[:2], {"save": saved}), (batches[2:], {"load": f"{saved}/iter_0000002"})]
    layout = {"use_distributed_optimizer": sharded, "lr_decay_style": "constant"}
    (whole, first, resumed), _ = run_engine(tmp_path, "qwen3", 2, layout, runs)
    # megatron-core 0.16 takes torch's class where neither apex nor TransformerEngine is installed
    assert whole["adam"].startswith("torch.optim" if whole["core"].startswith("0.16") else "mindspeed.")
    assert resumed["adam"] == whole["adam"]
    assert first["losses"] + resumed["losses"] == whole["losses"]
    assert all(torch.equal(resumed["params"][name], value) for name, value in whole["params"].items())
