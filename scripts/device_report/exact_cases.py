"""What has no gradient: masks of dropout, which every device must have alike, and the step of Adam."""

from __future__ import annotations

import torch

from mindspeed_simpo.device import Device
from mindspeed_simpo.model.dropout import InputDropout, feature_keys, projection_word, step_key, token_keys
from scripts.device_report.operators import normal, relative_error

Row = tuple[str, str, float, float]
_LR, _BETAS, _EPS, _DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


def dropout_masks(device: Device) -> Row:
    """Elements that are zero on one of host and device only."""
    tokens, width = 257, 192
    rows = normal(tokens, width).float()
    identities = torch.arange(tokens) * (1 << 30) + torch.arange(tokens)

    def masked(where: torch.device) -> torch.Tensor:
        keys = token_keys(identities.to(where), step_key(42, 3)) ^ projection_word("model.layers.0.mlp.up_proj")
        dropout = InputDropout(0.25, feature_keys(torch.arange(width, device=where)))
        return dropout.masked(rows.to(where), keys).cpu()

    host, found = masked(torch.device("cpu")), masked(device.torch_device)
    assert 0.2 < float((host == 0).double().mean()) < 0.3, "a quarter is zero"
    return "exact", "elements that differ", float((host != found).sum()), 0.0


def adam(device: Device) -> Row:
    """Parameters after three steps of the Adam that megatron-core has chosen, from small ones, so that steps count."""
    from megatron.core.optimizer import Adam

    start, grads = normal(4096, std=1e-2), [normal(4096, seed=step + 1) for step in range(3)]
    parameter = torch.nn.Parameter(start.float().to(device.torch_device))
    optimizer = Adam([parameter], lr=_LR, betas=_BETAS, eps=_EPS, weight_decay=_DECAY)
    exact = start.float().double()
    first, second = torch.zeros_like(exact), torch.zeros_like(exact)
    for step, grad in enumerate(grads, start=1):
        parameter.grad = grad.float().to(device.torch_device)
        optimizer.step()
        grad = grad.float().double()
        first = _BETAS[0] * first + (1 - _BETAS[0]) * grad
        second = _BETAS[1] * second + (1 - _BETAS[1]) * grad**2
        scaled = first / (1 - _BETAS[0] ** step) / ((second / (1 - _BETAS[1] ** step)).sqrt() + _EPS)
        exact = exact - _LR * (scaled + _DECAY * exact)
    return "float32", "parameters after 3 steps", relative_error(parameter, exact), 1e-6


CHECKS = {"masks of dropout": dropout_masks, "Adam": adam}
"""Each gives dtype, what is compared, the error and its bound."""
