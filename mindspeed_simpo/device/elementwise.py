"""The formulas of the elementwise and norm operators and of their backwards, as functions of tensors.

PyTorch runs them operator by operator, or compiles each to one kernel (:mod:`mindspeed_simpo.device.compiled`). They
write to tensors of their own only. :mod:`mindspeed_simpo.device.operators` says what the operators compute.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu


def rms_norm(
    hidden: Tensor, weight: Tensor, eps: float, weight_offset: float, rounds_last: bool
) -> tuple[Tensor, Tensor]:
    """The normed vectors, and the scale of each vector."""
    wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
    # the rounding error of this scale is common to all elements of the vector
    exact = torch.float64 if hidden.dtype == torch.float32 else wide.dtype
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True, dtype=exact) + eps).to(wide.dtype)
    if rounds_last:
        return (wide * scale * (weight_offset + weight.to(wide.dtype))).to(hidden.dtype), scale
    return weight * (wide * scale).to(hidden.dtype), scale


def rms_norm_backward(
    grad: Tensor, hidden: Tensor, weight: Tensor, scale: Tensor, weight_offset: float, rounds_last: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of the vectors and of the weight."""
    normed = hidden.to(scale.dtype) * scale
    axes = tuple(range(grad.dim() - 1))
    if rounds_last:
        grad = grad.to(scale.dtype)
        weight_grad = (grad * normed).sum(axes).to(weight.dtype)
        upstream = grad * (weight_offset + weight.to(scale.dtype))
    else:
        weight_grad = (grad * normed.to(grad.dtype)).sum(axes)
        upstream = (grad * weight).to(scale.dtype)
    # d normed = scale (d hidden - normed mean(normed d hidden))
    hidden_grad = upstream.addcmul_(normed, (upstream * normed).mean(-1, keepdim=True), value=-1).mul_(scale)
    return hidden_grad.to(hidden.dtype), weight_grad


def swiglu(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return silu(gate).mul_(up)


def swiglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of ``gate_up``."""
    gate, up = gate_up.chunk(2, dim=-1)
    grads = torch.empty_like(gate_up)
    gate_grad, up_grad = grads.chunk(2, dim=-1)
    _multiply_into(up_grad, grad, silu(gate))
    gate_grad.copy_(torch.ops.aten.silu_backward(grad * up, gate))
    return grads


def geglu(gate_up: Tensor) -> Tensor:
    """``gelu(gate) * up`` with the tanh approximation of gelu."""
    gate, up = gate_up.chunk(2, dim=-1)
    return gelu(gate, approximate="tanh").mul_(up)


def geglu_backward(grad: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of ``gate_up``."""
    gate, up = gate_up.chunk(2, dim=-1)
    grads = torch.empty_like(gate_up)
    gate_grad, up_grad = grads.chunk(2, dim=-1)
    _multiply_into(up_grad, grad, gelu(gate, approximate="tanh"))
    gate_grad.copy_(torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh"))
    return grads


def clamped_swiglu(gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """``(u + 1) g sigmoid(alpha g)`` of the clamped halves."""
    gate, up = gate_up.chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    return (gate * torch.sigmoid(gate * alpha)).mul_(up.clamp(-limit, limit).add_(1))


def clamped_swiglu_backward(grad: Tensor, gate_up: Tensor, alpha: float, limit: float) -> Tensor:
    """The gradient of ``gate_up``."""
    gate, up = gate_up.chunk(2, dim=-1)
    grads = torch.empty_like(gate_up)
    gate_grad, up_grad = grads.chunk(2, dim=-1)
    gated = gate.clamp(max=limit)
    sigmoid = torch.sigmoid(gated * alpha)
    gated.mul_(sigmoid)
    _multiply_into(up_grad, grad, gated)
    up_grad.mul_(up.abs() <= limit)
    # d (g s) / d g = s + alpha g s (1 - s)
    slope = sigmoid.addcmul_(gated, 1 - sigmoid, value=alpha).mul_(gate <= limit)
    _multiply_into(gate_grad, grad, slope)
    gate_grad.mul_(up.clamp(-limit, limit).add_(1))
    return grads


def rotate(heads: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
    """``heads cosines + turned(heads) sines`` on the first dimensions."""
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


def rotate_back(grad: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
    """The gradient of ``heads``: a rotation by the negative angles."""
    return rotate(grad, cosines, -sines, interleaved)


def _pairs(tensor: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    if interleaved:
        return tensor[..., 0::2], tensor[..., 1::2]
    first, second = tensor.chunk(2, dim=-1)
    return first, second


def _multiply_into(out: Tensor, left: Tensor, right: Tensor) -> None:
    """``out = left * right``, ``out`` a view."""
    if torch.compiler.is_compiling():  # which knows no output argument that is not contiguous
        out.copy_(left * right)
    else:
        torch.mul(left, right, out=out)
