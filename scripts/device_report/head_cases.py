"""The output layer with the log-probability of each token."""

from __future__ import annotations

import torch
from torch import Tensor

from mindspeed_simpo.device import Device
from scripts.device_report.operators import Case, normal

_CAP = 2.5


def cases(small: bool, device: Device) -> list[Case]:
    """Both forms of the head, with and without a soft cap; and the log-probability of logits alone."""
    from mindspeed_simpo.config.layout import Layout
    from mindspeed_simpo.loss.head import ResponseHead
    from mindspeed_simpo.loss.vocab_parallel import logits_logprobs
    from mindspeed_simpo.parallel import initialize

    groups = initialize(Layout(), device)
    tokens, width, vocabulary = (50, 64, 300) if small else (500, 1024, 20_000)
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    targets[:2] = torch.tensor([0, vocabulary - 1])
    inputs = {"states": normal(tokens, width), "weight": normal(vocabulary, width, seed=1, std=width**-0.5)}
    found = []
    for softcap in (None, _CAP):
        for chunk_tokens in (None, tokens // 3 + 1):
            head = ResponseHead(
                groups.tensor,
                groups.context,
                vocab_size=vocabulary,
                sum_dtype=device.reduction_dtype,
                softcap=softcap,
                chunk_tokens=chunk_tokens,
                weight_grad_awaited=False,
            )
            name = f"head, {'whole logits' if chunk_tokens is None else 'chunks'}{', soft cap' if softcap else ''}"
            found.append(Case(name, inputs, head.token_logprobs, _reference(softcap), {"targets": targets}))

    def of_logits(logits: Tensor, targets: Tensor) -> Tensor:
        return logits_logprobs(logits.float(), targets, groups.tensor, device.reduction_dtype)

    logits = {"logits": normal(tokens, vocabulary, seed=2, std=3.0)}
    found.append(Case("log-probability of logits", logits, of_logits, _logprobs, {"targets": targets}))
    return found


def _reference(softcap: float | None):  # noqa: ANN202
    def head(states: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        logits = states @ weight.T
        return _logprobs(logits if softcap is None else softcap * torch.tanh(logits / softcap), targets)

    return head


def _logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(1, targets[:, None])[:, 0] - logits.exp().sum(-1).log()
