"""Fused operators of torch_npu, from their public documentation, in plain PyTorch."""

import torch


def npu_rms_norm(input, gamma, epsilon=1e-6):
    """``(input * rstd * gamma, rstd)``, ``rstd = 1 / sqrt(mean(input^2) + epsilon)`` in fp32 over gamma's dims."""
    dims = tuple(range(-gamma.dim(), 0))
    rstd = input.float().square().mean(dims, keepdim=True).add(epsilon).rsqrt()
    return (input.float() * rstd).to(input.dtype) * gamma, rstd


def npu_swiglu(input, dim=-1):
    """``silu(a) * b`` with ``input = [a, b]`` along ``dim``."""
    gate, up = input.chunk(2, dim=dim)
    return torch.nn.functional.silu(gate) * up


def npu_rotary_mul(input, r1, r2, rotary_mode="half"):
    """``input * r1 + rotate(input) * r2``; ``half`` rotates the two halves, ``interleave`` neighbours."""
    if rotary_mode == "half":
        first, second = input.chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
    else:
        rotated = torch.stack((-input[..., 1::2], input[..., ::2]), dim=-1).flatten(-2)
    return input * r1 + rotated * r2
