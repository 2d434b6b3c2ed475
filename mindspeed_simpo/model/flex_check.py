"""A small row by FlexAttention against the formula in fp64, on the device, before a run relies on what is compiled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mindspeed_simpo.batch import Branch, Documents
from mindspeed_simpo.device import cuda
from mindspeed_simpo.model.visible import intervals, row_mask, row_spans

_ROW = Documents((170, 60), (Branch(0, 150, 40),))
_WINDOW = 100
_SOFTCAP = 2.0
_LARGEST_ERROR = {torch.float32: 1e-5, torch.float64: 1e-10}
_LARGEST_IN_HALF = 2e-2


def check_flex_attention(
    device: torch.device, dtype: torch.dtype, head_dim: int, *, softcap: bool, sinks: bool
) -> None:
    """Compute values and gradients of three documents and compare them.

    The result, the generators and the graph of the caller are left alone. Compiling takes some seconds.

    Args:
        device: Where to compute.
        dtype: Of queries, keys and values.
        head_dim: Elements of a head.
        softcap: Whether the scores are capped.
        sinks: Whether the heads have sinks.

    Raises:
        RuntimeError: where the relative L2 error of one of them is larger than 1e-5 in fp32, 2e-2 in half precision.
        Exception: whatever the compiler raises.
    """
    queries, generator = sum(_ROW.lengths), torch.Generator().manual_seed(0)
    sizes = [(queries, 1, heads, head_dim) for heads in (2, 1, 1)] + [(2,)] * sinks
    drawn = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    upstream = torch.randn(queries, 1, 2 * head_dim, generator=generator, dtype=torch.float64).to(device, dtype)
    kept = [dtype] * 3 + [torch.promote_types(dtype, torch.float32)]
    inputs = [each.to(device, kind).requires_grad_() for each, kind in zip(drawn, kept, strict=False)]
    exact = [each.detach().double().requires_grad_() for each in inputs]
    scale, cap = head_dim**-0.5, _SOFTCAP if softcap else None
    # a checkpoint around the caller would count the tensors that are saved here
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        mask = row_mask(_ROW, 0, 1, _WINDOW, device)
        query, key, value, *own_sinks = inputs
        context = cuda.flex_attention(query, key, value, mask, scale, cap, own_sinks[0] if own_sinks else None)
        found = _with_gradients(context, inputs, upstream)
        expected = _with_gradients(_formula(exact, scale, cap), exact, upstream.double())
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(found, expected, strict=True)]
    limit = _LARGEST_ERROR.get(dtype, _LARGEST_IN_HALF)
    if not max(errors) <= limit:  # not a number is an error too
        raise RuntimeError(f"values or gradients are {max(errors):.1e} off, more than {limit}")


def _with_gradients(context: Tensor, inputs: Sequence[Tensor], upstream: Tensor) -> list[Tensor]:
    return [context.detach(), *torch.autograd.grad(context, inputs, upstream)]


def _formula(inputs: Sequence[Tensor], scale: float, softcap: float | None) -> Tensor:
    """Dense scores of the small row."""
    query, key, value, *sinks = inputs
    scores = scale * torch.einsum("qrhd,kd->hqk", query, key[:, 0, 0])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    first, stop, prefix_first, prefix_stop = intervals(row_spans(_ROW, 0, 1), _WINDOW).to(scores.device)[..., None]
    keys = torch.arange(len(key), device=scores.device)
    seen = ((keys >= first) & (keys < stop)) | ((keys >= prefix_first) & (keys < prefix_stop))
    scores = scores.masked_fill(~seen, float("-inf"))
    for sink in sinks:
        scores = torch.cat([sink[:, None, None].expand(-1, len(key), 1), scores], dim=-1)
    weights = scores.softmax(-1)[..., -len(key) :]
    return torch.einsum("hqk,kd->qhd", weights, value[:, 0, 0]).flatten(1)[:, None]
