"""The communicators that the memory estimate counts are those that a training step uses, and HCCL takes every call.

Each rank is alone in its process, in a world that PyTorch's ``fake`` backend pretends: collectives keep or copy what
the rank has. The numbers of such a step mean nothing; its calls are those of a real world.
"""

import functools

import pytest

from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.launcher import run_ranks

pytestmark = pytest.mark.newest_core

TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
VIRTUAL = {"num_layers_per_virtual_pipeline_stage": 1, "micro_batch_size": 1}
CASES = {
    "one rank": ({}, 1, 0, {}),
    "tensor": ({TP: 2, "sequence_parallel": True}, 2, 1, {}),
    "shared key-value heads": ({TP: 4}, 4, 2, {}),
    "context": ({CP: 2}, 2, 0, {}),
    "data": ({"use_distributed_optimizer": True, "overlap_grad_reduce": True}, 2, 1, {}),
    "pipeline, first": ({PP: 2, **VIRTUAL}, 2, 0, {}),
    "pipeline, last": ({PP: 2, **VIRTUAL}, 2, 1, {}),
    "pipeline, first of four": ({PP: 4, **VIRTUAL}, 4, 0, {}),
    "pipeline, second of four": ({PP: 4, **VIRTUAL}, 4, 1, {}),
    "pipeline, tied": ({PP: 2, **VIRTUAL}, 2, 0, {"tied": True}),
    "experts": ({"expert_model_parallel_size": 2}, 2, 1, {"family": "qwen3_moe"}),
    "experts, sharded": ({TP: 2, "use_distributed_optimizer": True}, 2, 1, {"family": "qwen3_moe"}),
    "pipeline, experts": ({PP: 2, **VIRTUAL}, 2, 0, {"family": "glm4_moe"}),
    "fused": ({TP: 2, "sequence_parallel": True, "use_ascend_mc2": True, "bf16": True}, 2, 0, {"hidden": 512}),
    "all": ({TP: 2, "sequence_parallel": True, PP: 2, CP: 2, **VIRTUAL}, 16, 3, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_communicators(tmp_path, name):
    layout, size, rank, shape = CASES[name]
    folder = make_checkpoint(tmp_path, **{"family": "llama", "vocab_size": 514, "layers": 8, "std": 0.02, **shape})
    [(used, counted)] = run_ranks(communicators_of_a_step, 1, str(folder), make_token_pairs(8, 514), rank, size, layout)
    assert used == counted


def communicators_of_a_step(folder, pairs, rank, size, layout):
    """Collective groups and peers that a step uses, and those that the estimate counts."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from tests.ranks import parity
    from tests.ranks.test_npu_operators import take_operators

    dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())
    new_group, gloo = dist.new_group, set()

    def make(*args, backend=None, **kwargs):
        group = new_group(*args, **kwargs)
        if backend == "gloo" and not isinstance(group, int):
            gloo.add(group.group_name)
        return group

    dist.new_group = make
    take_operators()
    config = parity.make_config(folder, **{"global_batch_size": len(pairs), "micro_batch_size": 2, **layout})
    groups, device = parity.start(config)
    backend, models, stepper = parity.build(config, groups, device, 1)
    collective, peers = _recorded()
    _step(config, backend, models, stepper, groups, device, pairs)

    from mindspeed_simpo.config.validation import make_layout
    from mindspeed_simpo.training.communicators import communicators

    counted = communicators(backend.description, config, make_layout(config, size), groups.pipeline.rank())
    return (len(collective - gloo), len(peers)), (counted.collective, counted.pairs)


def _recorded():
    import sys

    from torch.distributed import ProcessGroup

    collective, peers = set(), set()

    def record(method, name, group, *args, **kwargs):
        if name in ("send", "recv"):
            peers.add((group.group_name, args[1]))
        else:
            collective.add(group.group_name)
        return method(group, *args, **kwargs)

    for name in sys.modules["torch_npu.hccl"].METHODS:
        method = getattr(ProcessGroup, name, None)
        if method is not None:
            setattr(ProcessGroup, name, functools.partialmethod(functools.partial(record, method, name)))
    return collective, peers


def _step(config, backend, models, stepper, groups, device, pairs):
    from mindspeed_simpo.loss.running import RunningTracker
    from mindspeed_simpo.training.metrics import MetricSums
    from mindspeed_simpo.training.session import build_schedule
    from tests.ranks.parity import _micro_batches

    running = RunningTracker(config.objective, groups, device)
    schedule = build_schedule(config, backend, groups, device, running.current, models, None)
    sums = MetricSums(config.objective, groups, device)
    scored = schedule.forward_backward(_micro_batches(pairs, 0, config, groups), len(pairs))
    sums.reduce(sums.local(scored))
    stepper.update(stepper.squared_norm())
