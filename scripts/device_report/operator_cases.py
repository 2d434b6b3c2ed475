"""Norms, activations, rotation and the products of experts."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from mindspeed_simpo.device import grouped, operators
from scripts.device_report.operators import Case, normal

_EPS, _ALPHA, _LIMIT = 1e-6, 1.702, 1.5


def cases(small: bool) -> list[Case]:
    """All of them."""
    tokens, width = (33, 64) if small else (1025, 2048)
    gates = {"gate_up": normal(tokens, 2 * width, seed=3)}
    return [
        *_norms(tokens, width),
        Case("swiglu", gates, operators.swiglu, _swiglu),
        Case("swiglu with a bias", {**gates, "bias": normal(2 * width, seed=4)}, operators.swiglu, _swiglu),
        Case("geglu", gates, operators.geglu, _geglu),
        Case("clamped swiglu", gates, partial(operators.clamped_swiglu, alpha=_ALPHA, limit=_LIMIT), _clamped),
        *_rotations(tokens),
        *_experts(tokens, width),
    ]


def _norms(tokens: int, width: int) -> list[Case]:
    inputs = {"hidden": normal(tokens, 2, width), "weight": 1 + 0.3 * normal(width, seed=1)}
    variants = {
        "rms_norm": {},
        "rms_norm, weight less one": {"weight_offset": 1.0},
        "rms_norm, rounded last": {"rounds_last": True},
    }
    return [
        Case(
            name,
            inputs,
            partial(operators.rms_norm, eps=_EPS, **options),
            partial(_rms_norm, offset=options.get("weight_offset", 0.0)),
        )
        for name, options in variants.items()
    ]


def _rms_norm(hidden: Tensor, weight: Tensor, offset: float) -> Tensor:
    return (offset + weight) * hidden / (hidden.square().mean(-1, keepdim=True) + _EPS).sqrt()


def _swiglu(gate_up: Tensor, bias: Tensor | None = None) -> Tensor:
    gate, up = (gate_up if bias is None else gate_up + bias).chunk(2, dim=-1)
    return gate / (1 + torch.exp(-gate)) * up


def _geglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3))) * up


def _clamped(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate, up = gate.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT)
    return (up + 1) * gate / (1 + torch.exp(-_ALPHA * gate))


def _rotations(tokens: int) -> list[Case]:
    found = []
    for name, interleaved, rotated in (("half", False, 64), ("interleaved", True, 64), ("half, a part", False, 32)):
        angles = torch.arange(tokens)[:, None] * 10000.0 ** -(torch.arange(rotated // 2, dtype=torch.float64) * 2 / 64)
        table = angles.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angles, angles), dim=-1)
        table = table[:, None, None]
        constants = {"cosines": table.cos(), "sines": table.sin()}
        inputs = {"heads": normal(tokens, 2, 4, 64, seed=5)}
        call = partial(operators.rotate, interleaved=interleaved)
        found.append(Case(f"rotate, {name}", inputs, call, partial(_rotate, interleaved=interleaved), constants))
    return found


def _rotate(heads: Tensor, cosines: Tensor, sines: Tensor, interleaved: bool) -> Tensor:
    rotated = cosines.shape[-1]
    own, rest = heads[..., :rotated], heads[..., rotated:]
    if interleaved:
        turned = torch.stack((-own[..., 1::2], own[..., 0::2]), dim=-1).flatten(-2)
    else:
        turned = torch.cat((-own[..., rotated // 2 :], own[..., : rotated // 2]), dim=-1)
    return torch.cat((own * cosines + turned * sines, rest), dim=-1)


def _experts(tokens: int, width: int) -> list[Case]:
    counts = torch.tensor([tokens // 3, 0, 1, tokens - tokens // 3 - 1])
    rows = {"rows": normal(tokens, width, seed=6)}
    weights = {"weights": normal(4, width // 2, width, seed=7, std=width**-0.5)}
    return [
        Case("grouped_linear", rows | weights, grouped.grouped_linear, _grouped_linear, {"counts": counts}),
        Case(
            "grouped_bias",
            rows | {"biases": normal(4, width, seed=8)},
            grouped.grouped_bias,
            _grouped_bias,
            {"counts": counts},
        ),
    ]


def _grouped_linear(rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
    parts = torch.split(rows, counts.tolist())
    return torch.cat([part @ weight.T for part, weight in zip(parts, weights, strict=True)])


def _grouped_bias(rows: Tensor, biases: Tensor, counts: Tensor) -> Tensor:
    belongs = torch.zeros(len(rows), len(biases), dtype=rows.dtype)
    for group, (start, count) in enumerate(zip(pad(counts.cumsum(0), (1, -1)), counts, strict=True)):
        belongs[start : start + count, group] = 1
    return rows + belongs @ biases
