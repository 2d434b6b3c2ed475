"""Pipeline ranks exchange no shapes, wait for no device between two of them, and have the gradients of the exchange."""

import contextlib
import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.launcher import run_ranks

BUDGET = {"max_tokens_per_micro_batch": 120}
SCHEDULES = {"padded": ("concat", "split", "two_pass"), "packed": ("concat", "two_pass"), "prefix_shared": ("concat",)}
MODES = [
    {"batching": batching, "pair_schedule": schedule, **(BUDGET if batching != "padded" else {})}
    for batching, names in SCHEDULES.items()
    for schedule in names
]
PP = "pipeline_model_parallel_size"
LAYOUTS = [
    {PP: 2},
    {PP: 3},
    {PP: 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    {PP: 2, "context_parallel_size": 2},
]


class _Sent(TorchDispatchMode):
    """Number of tensors sent by dtype."""

    def __init__(self):
        super().__init__()
        self.shapes = self.tensors = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name == "c10d::send":
            integers = args[0][0].dtype == torch.int64
            self.shapes += integers
            self.tensors += not integers
        return func(*args, **(kwargs or {}))


def _steps(folder, token_pairs, options, modes):
    from mindspeed_simpo.batch import TokenizedPair
    from mindspeed_simpo.data.batching import Batching
    from mindspeed_simpo.training.schedule import megatron as engine
    from scripts.engine import build_engine
    from tests.ranks.parity import make_config, start

    pairs = [TokenizedPair(*pair, source="test") for pair in token_pairs]
    common = {"global_batch_size": len(pairs), "micro_batch_size": 2, **options}
    groups, device = start(make_config(folder, **common))
    waits = []
    torch.cuda.synchronize = lambda device=None: waits.append(device)
    results, known = [], engine.known_receive_shapes
    for mode in modes:
        config = make_config(folder, **common, **mode)
        micro_batches = Batching.of(config).micro_batches(pairs, list(range(len(pairs))))
        assert len({batch.tokens.shape for batch in micro_batches}) > 1
        gradients, counts = [], []
        wrapped, schedule = build_engine(config, device, groups)
        for shapes in (known, lambda _: contextlib.nullcontext()):
            engine.known_receive_shapes = shapes
            for model in wrapped:
                model.zero_grad_buffer()
            waits.clear()
            with _Sent() as sent:
                schedule.forward(micro_batches)
                schedule.forward_backward(micro_batches, len(pairs))
            gradients.append([param.main_grad.clone() for model in wrapped for param in model.parameters()])
            counts.append((sent.shapes, sent.tensors, len(waits)))
        same = all(torch.equal(*both) for both in zip(*gradients, strict=True))
        results.append((same, any(bool(gradient.any()) for gradient in gradients[0]), *counts))
    return results


@pytest.mark.parametrize("options", LAYOUTS, ids=lambda options: "-".join(f"{key}{options[key]}" for key in options))
def test_no_shapes_are_exchanged(tmp_path, options):
    folder = make_checkpoint(tmp_path / "model", "llama", layers=3)
    modes = [mode for mode in MODES if mode["batching"] == "padded" or "context_parallel_size" not in options]
    ranks = 1
    for key, degree in options.items():
        ranks *= degree if key != "sequence_parallel" else 1
    by_rank = run_ranks(_steps, ranks, str(folder), make_token_pairs(8, seed=3, max_response=40), options, modes)
    for mode, (same, trained, known, exchanged) in itertools.chain(
        *(zip(modes, rank, strict=True) for rank in by_rank)
    ):
        assert same, mode
        assert trained, mode
        assert known == (0, exchanged[1], 0), mode
        # the exchange itself is still what these counters see
        assert exchanged[0] == exchanged[1] > 0, mode
        assert exchanged[2] > 0, mode


def test_virtual_pipeline_ranks_exchange_no_shapes_either(tmp_path):
    folder = make_checkpoint(tmp_path / "model", "llama", layers=4)
    options = {PP: 2, "num_layers_per_virtual_pipeline_stage": 1}
    modes = [mode for mode in MODES if mode["pair_schedule"] == "two_pass"]
    for rank in run_ranks(_steps, 2, str(folder), make_token_pairs(8, seed=3, max_response=40), options, modes):
        for mode, (same, trained, known, exchanged) in zip(modes, rank, strict=True):
            assert same, mode
            assert trained, mode
            # all rows have one length, so that megatron-core has nothing to exchange
            assert known == exchanged == (0, known[1], 0), mode
            assert known[1] > 0, mode
