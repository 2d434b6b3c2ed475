"""Elementwise and norm operators with their own backward, which save only their inputs for the backward.

Autograd would save every intermediate result of the same formulas (:mod:`mindspeed_simpo.device.elementwise`). On CUDA
each formula is compiled to one kernel (:mod:`mindspeed_simpo.device.compiled`); on NPUs the fused operators of
torch_npu replace them (:mod:`mindspeed_simpo.device.npu`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from mindspeed_simpo.device import elementwise, npu
from mindspeed_simpo.device.compiled import as_one_kernel


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
        normed: Tensor
        normed, scale = as_one_kernel(elementwise.rms_norm, hidden, weight, eps, weight_offset, rounds_last)
        ctx.save_for_backward(hidden, weight, scale)
        ctx.weight_offset, ctx.rounds_last = weight_offset, rounds_last
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        constants = ctx.weight_offset, ctx.rounds_last
        grads = as_one_kernel(elementwise.rms_norm_backward, grad, *ctx.saved_tensors, *constants)
        return *grads, None, None, None


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return as_one_kernel(elementwise.swiglu, gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return as_one_kernel(elementwise.swiglu_backward, grad, *ctx.saved_tensors)


class _GeGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        return as_one_kernel(elementwise.geglu, gate_up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return as_one_kernel(elementwise.geglu_backward, grad, *ctx.saved_tensors)


class _ClampedSwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.constants = alpha, limit
        return as_one_kernel(elementwise.clamped_swiglu, gate_up, alpha, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        gate_up_grad = as_one_kernel(elementwise.clamped_swiglu_backward, grad, *ctx.saved_tensors, *ctx.constants)
        return gate_up_grad, None, None


class _Rotation(Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        ctx.interleaved = interleaved
        return as_one_kernel(elementwise.rotate, heads, cosines, sines, interleaved)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return as_one_kernel(elementwise.rotate_back, grad, *ctx.saved_tensors, ctx.interleaved), None, None, None
