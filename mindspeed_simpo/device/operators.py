"""Elementwise and norm operators with their own backward, which save only their inputs for the backward.

Autograd would save every intermediate result of the same formulas. On NPUs the fused operators of torch_npu replace
them (:mod:`mindspeed_simpo.device.npu`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, silu

from mindspeed_simpo.device import npu


def rms_norm(
    hidden: Float[Tensor, "*batch dim"],
    weight: Float[Tensor, " dim"],
    eps: float,
    weight_offset: float = 0.0,
    *,
    rounds_last: bool = False,
) -> Float[Tensor, "*batch dim"]:
    """``(weight_offset + weight) * hidden / sqrt(mean(hidden^2) + eps)`` over the last axis; normalised in fp32.

    Args:
        hidden: Saved for the backward, with one scale for each vector.
        weight: Of the dtype of ``hidden``.
        eps: Added to the mean square.
        weight_offset: Added to ``weight`` in fp32.
        rounds_last: Whether the product with ``weight`` is computed in fp32, and the result rounded, as it always is
            with a ``weight_offset``; else it is computed in the dtype of ``hidden``.
    """
    rounds_last = rounds_last or weight_offset != 0
    if npu.is_on_npu(hidden):
        if rounds_last:
            return npu.rms_norm(hidden.float(), weight_offset + weight.float(), eps).to(hidden.dtype)
        return npu.rms_norm(hidden, weight, eps)
    normed: Tensor = _RMSNorm.apply(hidden, weight, eps, weight_offset, rounds_last)  # type: ignore[no-untyped-call]
    return normed


def swiglu(
    gate_up: Float[Tensor, "*batch two_dim"], bias: Float[Tensor, " two_dim"] | None = None
) -> Float[Tensor, "*batch dim"]:
    """``silu(gate) * up``.

    Args:
        gate_up: ``gate`` is the first half of the last axis, ``up`` the second; saved for the backward.
        bias: Added to ``gate_up`` first.
    """
    if bias is not None:
        gate_up = gate_up + bias
    if npu.is_on_npu(gate_up):
        return npu.swiglu(gate_up)
    activated: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return activated


def geglu(
    gate_up: Float[Tensor, "*batch two_dim"], bias: Float[Tensor, " two_dim"] | None = None
) -> Float[Tensor, "*batch dim"]:
    """``gelu(gate) * up`` with the tanh approximation of gelu; no device has a fused operator for it here.

    Args:
        gate_up: ``gate`` is the first half of the last axis, ``up`` the second; saved for the backward.
        bias: Added to ``gate_up`` first.
    """
    if bias is not None:
        gate_up = gate_up + bias
    activated: Tensor = _GeGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return activated


def clamped_swiglu(gate_up: Float[Tensor, "*batch two_dim"], alpha: float, limit: float) -> Float[Tensor, "*batch dim"]:
    """``(u + 1) g sigmoid(alpha g)``, ``g = min(gate, limit)`` and ``u = min(max(up, -limit), limit)``.

    Args:
        gate_up: ``gate`` is the first half of the last axis, ``up`` the second; saved for the backward.
        alpha: Factor inside of the sigmoid.
        limit: Largest value, above 0; no device has a fused operator here.
    """
    activated: Tensor = _ClampedSwiGLU.apply(gate_up, alpha, limit)  # type: ignore[no-untyped-call]
    return activated


def rotate(
    heads: Float[Tensor, "seq row heads dim"],
    cosines: Float[Tensor, "seq row_or_1 1 rotated"],
    sines: Float[Tensor, "seq row_or_1 1 rotated"],
    *,
    interleaved: bool = False,
) -> Float[Tensor, "seq row heads dim"]:
    """``heads cosines + turned(heads) sines`` on the first ``rotated`` dimensions, ``turned(a, b) = (-b, a)``.

    Args:
        heads: Not saved for the backward, which rotates the gradient by the negative angles.
        cosines: Of the dtype of ``heads``; equal for both dimensions of a pair.
        sines: As ``cosines``.
        interleaved: Whether the pairs are ``(x[2i], x[2i + 1])``; else they are ``(x[i], x[rotated / 2 + i])``.
    """
    if npu.is_on_npu(heads):
        dims = cosines.shape[-1]
        turned = npu.rotate(heads[..., :dims], cosines, sines, interleaved=interleaved)
        return turned if dims == heads.shape[-1] else torch.cat([turned, heads[..., dims:]], dim=-1)
    rotated: Tensor = _Rotation.apply(heads, cosines, sines, interleaved)  # type: ignore[no-untyped-call]
    return rotated


class _RMSNorm(Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, eps: float, weight_offset: float, rounds_last: bool
    ) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        # the rounding error of this scale is common to all elements of the vector
        exact = torch.float64 if hidden.dtype == torch.float32 else wide.dtype
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True, dtype=exact) + eps).to(wide.dtype)
        ctx.save_for_backward(hidden, weight, scale)
        ctx.weight_offset, ctx.rounds_last = weight_offset, rounds_last
        if rounds_last:
            return (wide * scale * (weight_offset + weight.to(wide.dtype))).to(hidden.dtype)
        return weight * (wide * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden.to(scale.dtype) * scale
        axes = tuple(range(grad.dim() - 1))
        if ctx.rounds_last:
            grad = grad.to(scale.dtype)
            weight_grad = (grad * normed).sum(axes).to(weight.dtype)
            upstream = grad * (ctx.weight_offset + weight.to(scale.dtype))
        else:
            weight_grad = (grad * normed.to(grad.dtype)).sum(axes)
            upstream = (grad * weight).to(scale.dtype)
        # d normed = scale (d hidden - normed mean(normed d hidden))
        hidden_grad = upstream.addcmul_(normed, (upstream * normed).mean(-1, keepdim=True), value=-1).mul_(scale)
        return hidden_grad.to(hidden.dtype), weight_grad, None, None, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grads = torch.empty_like(gate_up)
        gate_grad, up_grad = grads.chunk(2, dim=-1)
        torch.mul(grad, silu(gate), out=up_grad)
        gate_grad.copy_(torch.ops.aten.silu_backward(grad * up, gate))
        return grads


class _GeGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, dim=-1)
        return gelu(gate, approximate="tanh").mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        grads = torch.empty_like(gate_up)
        gate_grad, up_grad = grads.chunk(2, dim=-1)
        torch.mul(grad, gelu(gate, approximate="tanh"), out=up_grad)
        gate_grad.copy_(torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"))
        return grads


class _ClampedSwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.variants = alpha, limit
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.clamp(max=limit)
        return (gate * torch.sigmoid(gate * alpha)).mul_(up.clamp(-limit, limit).add_(1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gate_up,) = ctx.saved_tensors
        alpha, limit = ctx.variants
        gate, up = gate_up.chunk(2, dim=-1)
        grads = torch.empty_like(gate_up)
        gate_grad, up_grad = grads.chunk(2, dim=-1)
        gated = gate.clamp(max=limit)
        sigmoid = torch.sigmoid(gated * alpha)
        gated.mul_(sigmoid)
        torch.mul(grad, gated, out=up_grad).mul_(up.abs() <= limit)
        # d (g s) / d g = s + alpha g s (1 - s)
        slope = sigmoid.addcmul_(gated, 1 - sigmoid, value=alpha).mul_(gate <= limit)
        torch.mul(grad, slope, out=gate_grad).mul_(up.clamp(-limit, limit).add_(1))
        return grads, None, None


class _Rotation(Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        ctx.interleaved = interleaved
        return _turn(heads, cosines, sines, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turn(grad, cosines, -sines, ctx.interleaved), None, None, None


def _turn(heads: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
    dims = cosines.shape[-1]
    if dims == heads.shape[-1]:
        turned = heads * cosines
    else:
        turned = heads.clone(memory_format=torch.contiguous_format)
        turned[..., :dims].mul_(cosines)
    (first, second), (turned_first, turned_second), (sines_first, sines_second) = (
        _pairs(tensor[..., :dims], interleaved) for tensor in (heads, turned, sines)
    )
    turned_first.addcmul_(second, sines_first, value=-1)
    turned_second.addcmul_(first, sines_second)
    return turned


def _pairs(tensor: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return tensor[..., 0::2], tensor[..., 1::2]
    first, second = tensor.chunk(2, dim=-1)
    return first, second
