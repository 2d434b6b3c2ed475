"""Operators between the matrix products, which keep for their backward only what they cannot compute again at once.

Autograd would keep every intermediate result of the same formulas. On NPUs the operators of torch_npu serve in their
place (:mod:`mindspeed_simpo.device.npu`).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from mindspeed_simpo.device import npu


def install() -> None:
    """Give megatron-core's layers the operators that their specification has no place for."""
    from megatron.core.models.common.embeddings import rope_utils
    from megatron.core.transformer import mlp

    rope_utils._apply_rotary_pos_emb_bshd = rotate
    mlp.bias_swiglu_impl = swiglu


def rms_norm(
    hidden: Float[Tensor, "*batch dim"], weight: Float[Tensor, " dim"], eps: float
) -> Float[Tensor, "*batch dim"]:
    """``weight * hidden / sqrt(mean(hidden^2) + eps)`` over the last axis; normalised in fp32, scaled in its dtype.

    Args:
        hidden: Kept for the backward, with one number a vector.
        weight: Of the dtype of ``hidden``.
        eps: Added to the mean square.
    """
    if npu.holds(hidden):
        return npu.rms_norm(hidden, weight, eps)
    normed: Tensor = _RMSNorm.apply(hidden, weight, eps)  # type: ignore[no-untyped-call]
    return normed


def swiglu(
    gate_up: Float[Tensor, "*batch two_dim"], bias: Float[Tensor, " two_dim"] | None = None, *_: Any
) -> Float[Tensor, "*batch dim"]:
    """``silu(gate) * up``; in the place of megatron-core's ``bias_swiglu_impl``.

    Args:
        gate_up: Gate in the first half of the last axis, up in the second; kept for the backward.
        bias: Added first.
    """
    if bias is not None:
        gate_up = gate_up + bias
    if npu.holds(gate_up):
        return npu.swiglu(gate_up)
    activated: Tensor = _SwiGLU.apply(gate_up)  # type: ignore[no-untyped-call]
    return activated


def rotate(
    heads: Float[Tensor, "seq row heads dim"],
    angles: Float[Tensor, "seq row_or_1 1 dim"],
    rotary_interleaved: bool = False,
    *_: Any,
    **__: Any,
) -> Float[Tensor, "seq row heads dim"]:
    """``heads cos(angles) + turned(heads) sin(angles)``, ``turned(a, b) = (-b, a)``; in megatron-core's place.

    Args:
        heads: Not kept: the backward turns by the negative angles.
        angles: Radians, both halves the same.
        rotary_interleaved: False; neighbours are not rotated into each other.
    """
    assert not rotary_interleaved, "the halves are rotated, not neighbours"
    cosines, sines = _tables(angles, heads.dtype)
    if npu.holds(heads):
        return npu.rotate(heads, cosines, sines)
    rotated: Tensor = _Rotation.apply(heads, cosines, sines)  # type: ignore[no-untyped-call]
    return rotated


def _tables(angles: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # the angles are one tensor for queries and keys of all layers: it remembers
    tables: dict[torch.dtype, tuple[Tensor, Tensor]] = angles.__dict__.setdefault("_cosines_and_sines", {})
    if dtype not in tables:
        tables[dtype] = angles.cos().to(dtype), angles.sin().to(dtype)
    return tables[dtype]


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        # an error of this one number is an error of the whole vector
        exact = torch.float64 if hidden.dtype == torch.float32 else wide.dtype
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True, dtype=exact) + eps).to(wide.dtype)
        ctx.save_for_backward(hidden, weight, scale)
        return weight * (wide * scale).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        hidden, weight, scale = ctx.saved_tensors
        normed = hidden.to(scale.dtype) * scale
        axes = tuple(range(grad.dim() - 1))
        weight_grad = (grad * normed.to(grad.dtype)).sum(axes)
        # d normed = scale (d hidden - normed mean(normed d hidden))
        upstream = (grad * weight).to(scale.dtype)
        hidden_grad = upstream.addcmul_(normed, (upstream * normed).mean(-1, keepdim=True), value=-1).mul_(scale)
        return hidden_grad.to(hidden.dtype), weight_grad, None


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


class _Rotation(Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _turn(heads, cosines, sines)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _turn(grad, cosines, -sines), None, None


def _turn(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    turned = heads * cosines
    first, second = heads.chunk(2, dim=-1)
    turned_first, turned_second = turned.chunk(2, dim=-1)
    half = sines.shape[-1] // 2
    turned_first.addcmul_(second, sines[..., :half], value=-1)
    turned_second.addcmul_(first, sines[..., half:])
    return turned
