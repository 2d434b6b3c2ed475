"""No micro-batch causes a host synchronisation: no operation of a step reads a device tensor on the host."""

import pytest
import torch

from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.launcher import run_ranks
from tests.ranks.waits import Waits

pytestmark = pytest.mark.newest_core


def _waits_of_steps(folder, token_pairs, options, modes):
    from megatron.core import tensor_parallel

    from mindspeed_simpo.batch import TokenizedPair
    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.config.validation import make_layout
    from mindspeed_simpo.data.batching import Batching
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.parallel import initialize
    from mindspeed_simpo.training.schedule import megatron as engine
    from scripts.engine import build_engine

    device = open_device("cpu")
    pairs = [TokenizedPair(*pair, source="test") for pair in token_pairs]
    common = {"model_name_or_path": folder, "data_path": "unused", "global_batch_size": 4, "micro_batch_size": 2}
    groups = None
    found = {}
    for mode in modes:
        config = Config(**common, **options, **mode)
        if groups is None:
            groups = initialize(make_layout(config, torch.distributed.get_world_size()), device)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        _, schedule = build_engine(config, device, groups)
        batching = Batching.of(config)
        micro_batches = batching.micro_batches(pairs, [0, 1, 2, 3])
        run_of = engine.get_forward_backward_func
        waits = Waits()

        def watched(run=run_of, waits=waits):
            def run_watched(**arguments):
                with waits:
                    return run()(**arguments)

            return run_watched

        engine.get_forward_backward_func = watched
        schedule.forward_backward(micro_batches, len(pairs))
        engine.get_forward_backward_func = run_of
        found[str(mode)] = waits.seen
    return found


MODES = [
    {"batching": "padded", "fused_logprob": False},
    {"batching": "padded", "pair_schedule": "split"},
    {"batching": "packed"},
    {"batching": "packed", "pair_schedule": "two_pass"},
    {"batching": "prefix_shared"},
    {
        "batching": "prefix_shared",
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
]


@pytest.mark.parametrize("tensor", [1, 2])
def test_no_step_asks_for_a_value(tmp_path, tensor):
    folder = make_checkpoint(tmp_path / "model", "llama")
    pairs = make_token_pairs(4, seed=3)
    options = {"tensor_model_parallel_size": tensor, "sequence_parallel": tensor > 1}
    for found in run_ranks(_waits_of_steps, tensor, str(folder), pairs, options, MODES):
        assert found == {str(mode): [] for mode in MODES}


def test_a_wait_is_seen():
    with Waits() as waits:
        ones = torch.ones(3)
        assert ones.sum().item() == 3
        ones[ones > 0].sum()
        ones.nonzero()
    assert waits.seen == ["_local_scalar_dense", "index", "nonzero"]
