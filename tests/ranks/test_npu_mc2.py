"""``use_ascend_mc2: True``: the projections by the NPU's operators with communication inside, in a stand-in.

The stand-in refuses what the operators refuse. Products of small integers are exact in bf16, whatever the order of
their sums, so that every comparison here is one of equality.
"""

import pytest
import torch

from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.launcher import run_ranks
from tests.ranks.parity import engine_steps
from tests.ranks.test_npu_operators import take_operators

pytestmark = pytest.mark.newest_core

TP = "tensor_model_parallel_size"


def take_fused_operators():
    """No projection but the fused ones can be built."""
    from mindspeed_simpo.model.megatron import linear

    take_operators()
    linear._AdaptedColumns = linear._AdaptedRows = None


def _projections(trained):
    """Differences from the products of the whole tensors; rank r holds the r-th part of each divided axis."""
    import torch.distributed as dist

    from mindspeed_simpo.device import npu_mc2

    take_operators()
    group, size, rank = dist.group.WORLD, dist.get_world_size(), dist.get_rank()
    draw = torch.Generator().manual_seed(5)
    length, rows, inputs, outputs = 3 * size, 2, 256 * size, 256 * size

    def sparse(*shape):
        # few are not zero, so that each sum stays within the 256 integers of bf16's mantissa
        values = torch.randint(-2, 3, shape, generator=draw) * (torch.rand(shape, generator=draw) < 0.15)
        return values.to(torch.bfloat16)

    hidden, weight, grad = sparse(length, rows, inputs), sparse(outputs, inputs), sparse(length, rows, outputs)
    expected = {
        "output": hidden.double() @ weight.double().t(),
        "hidden": grad.double() @ weight.double(),
        "weight": grad.double().flatten(0, 1).t() @ hidden.double().flatten(0, 1),
    }
    assert max(value.abs().max() for value in expected.values()) <= 256
    found = {}
    for name, multiply, axes in (
        ("column", npu_mc2.gathered_linear, {"output": 2, "hidden": 0, "weight": 0}),
        ("row", npu_mc2.scattered_linear, {"output": 0, "hidden": 2, "weight": 1}),
    ):
        part = {
            "hidden": hidden.chunk(size, axes["hidden"])[rank].clone().requires_grad_(),
            "weight": weight.chunk(size, axes["weight"])[rank].clone().requires_grad_(trained),
        }
        output = multiply(part["hidden"], part["weight"], group)
        saved = [each.data_ptr() for each in output.grad_fn.saved_tensors if each is not None]
        assert saved == [each.data_ptr() for each in ([part["hidden"]] if trained else []) + [part["weight"]]]
        # a gradient that is no contiguous tensor, as that of a sum over rows
        output.backward(grad.chunk(size, axes["output"])[rank].transpose(0, 1).contiguous().transpose(0, 1))
        results = {"output": output.detach(), "hidden": part["hidden"].grad, "weight": part["weight"].grad}
        if not trained:
            assert results.pop("weight") is None
        for each, result in results.items():
            assert result.dtype == torch.bfloat16
            whole = expected[each].chunk(size, axes[each])[rank]
            found[name, each] = torch.equal(result.double(), whole)
    return found


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("trained", [True, False])
def test_projections_are_those_of_the_whole_tensors(ranks, trained):
    for found in run_ranks(_projections, ranks, trained):
        assert len(found) == (6 if trained else 4)
        assert all(found.values()), found


LORA = {"lora_r": 4, "lora_alpha": 8, "lora_target_modules": ["q_proj", "o_proj", "up_proj", "down_proj"]}


@pytest.mark.parametrize(
    "options",
    [
        {"batching": "prefix_shared", "max_tokens_per_micro_batch": 128, "recompute_granularity": "selective"},
        LORA,
    ],
    ids=["weights", "adapters"],
)
def test_a_model_is_the_same_with_them(tmp_path, options):
    folder = make_checkpoint(
        tmp_path, "qwen2", hidden=256, heads=8, head_dim=64, intermediate=512, vocab_size=514, std=0.05
    )
    batches = [make_token_pairs(4, 514)] * 2
    layout = {TP: 2, "sequence_parallel": True, "bf16": True, "lr": 1e-2, **options}
    plain = engine_steps(folder, batches, prepare=take_operators, **layout)
    fused = engine_steps(folder, batches, prepare=take_fused_operators, use_ascend_mc2=True, **layout)
    assert fused["losses"] == plain["losses"]
    for key in ("grads", "params"):
        assert fused[key].keys() == plain[key].keys()
        assert all(torch.equal(fused[key][name], plain[key][name]) for name in plain[key])
    assert all(value.any() for value in fused["params"].values())
