"""Ascend NPUs: ``npu_fusion_attention`` with sinks, from the softmax statistics that the operator returns and takes.

With the maximum ``m`` and the sum ``l`` of a query's scores ``s`` and the sink ``z`` of its head, ``m' = max(m, z)``
and ``l' = l exp(m - m') + exp(z - m')``. The result is ``o' = o l exp(m - m') / l'``. The operator of the gradient
computes the weights ``exp(s - m') / l'`` and the products ``do o'`` from what it is given: with ``m'``, ``l'`` and
``o'`` its gradients are those of the attention with sinks. The gradient of the sink is the sum of
``-(do o') exp(z - m') / l'`` over the queries.

Newer versions of torch_npu have an argument for sinks, whose gradient older ones lack.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Sinks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor,
        layout: str,
        scale: float,
        options: dict[str, Any],
    ) -> Tensor:
        import torch_npu

        heads = len(sinks)
        results = torch_npu.npu_fusion_attention(query, key, value, heads, layout, scale=scale, **options)
        context: Tensor = results[0]
        statistics = results[1:3]
        # in memory those of TND lie head by head too
        maximum, total = (each.view(heads, -1, each.shape[-1]) if layout == "TND" else each for each in statistics)
        sink = sinks.float()[:, None, None]
        highest = torch.maximum(maximum, sink)
        of_keys = total * (maximum - highest).exp()
        whole = of_keys + (sink - highest).exp()
        share = (of_keys / whole)[..., :1]
        by_head = _by_head(context, heads, layout)
        by_head.copy_(by_head * share)
        ctx.save_for_backward(query, key, value, sinks, context, highest, whole)
        ctx.variants = layout, scale, options, statistics[0].shape
        return context

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        import torch_npu

        query, key, value, sinks, context, highest, whole = ctx.saved_tensors
        layout, scale, options, shape = ctx.variants
        grad, heads = grads[0].contiguous(), len(sinks)
        query_grad, key_grad, value_grad = torch_npu.npu_fusion_attention_grad(
            query,
            key,
            value,
            grad,
            heads,
            layout,
            softmax_max=highest.view(shape),
            softmax_sum=whole.view(shape),
            attention_in=context,
            scale_value=scale,
            **options,
        )[:3]
        along = (_by_head(grad, heads, layout).float() * _by_head(context, heads, layout).float()).sum(-1)
        weights = (sinks.float()[:, None] - highest[..., 0]).exp() / whole[..., 0]
        others = (0, 2) if layout == "SBH" else (1,)
        sinks_grad = -(along * weights).sum(others)
        return query_grad, key_grad, value_grad, sinks_grad.to(sinks.dtype), None, None, None


def _by_head(tensor: Tensor, heads: int, layout: str) -> Tensor:
    """``[row, heads, seq, dim]`` of SBH, or ``[heads, token, dim]`` of TND, as a view of the tensor."""
    if layout == "TND":
        return tensor.transpose(0, 1)
    return tensor.view(*tensor.shape[:2], heads, -1).permute(1, 2, 0, 3)


def attention(
    query: Tensor, key: Tensor, value: Tensor, sinks: Tensor, layout: str, scale: float, options: dict[str, Any]
) -> Tensor:
    """The first result of ``npu_fusion_attention`` with a sink of each query head, and with its gradients.

    Args:
        query: In the layout, ``[seq, row, heads x dim]`` for SBH or ``[token, heads, dim]`` for TND.
        key: As ``query``, of ``groups`` heads.
        value: As ``key``.
        sinks: ``[heads]``, the score of one more key of each query head, whose value is zero.
        layout: SBH or TND.
        scale: Factor of the scores ``q k^T``.
        options: What the operators of the attention and of its gradient take beside.

    Returns:
        As ``query``.
    """
    result: Tensor = _Sinks.apply(query, key, value, sinks, layout, scale, options)  # type: ignore[no-untyped-call]
    return result
