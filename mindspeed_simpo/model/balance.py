"""The auxiliary loss of a router, sequence by sequence: a value that does not depend on the layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function


@dataclass(frozen=True)
class Balance:
    r"""``L = weight sum_s E / (k n_s^2) sum_e c_se sum_(t in s) p_te`` over the sequences s of a layer with experts.

    ``c_se`` is the number of tokens of the sequence that choose expert e, of E experts, ``n_s`` its number of tokens, k
    the experts that a token chooses, ``p_te`` the scores of a token divided by their sum. The counts have no gradient,
    so the gradient of ``p_te`` is ``weight E c_se / (k n_s^2)``, summed over the sequences that the token belongs to.
    Only this gradient is computed.

    Source: the sequence-wise loss of DeepSeek-V3 (arXiv:2412.19437), equations 17 to 20.
    """

    of_token: Int[Tensor, "2 token"]
    """int64 sequences of each token of this rank, or -1."""
    lengths: Int[Tensor, " sequence"]
    """int64 tokens of each sequence over all ranks."""
    weight: float
    groups: Sequence[dist.ProcessGroup]
    """Ranks that hold other tokens of the sequences."""

    def add_gradient(
        self,
        weights: Float[Tensor, "token k"],
        scores: Float[Tensor, "token expert"],
        chosen: Int[Tensor, "token k"],
    ) -> Float[Tensor, "token k"]:
        """``weights``, whose backward adds the gradient of the loss to that of ``scores``.

        Args:
            weights: fp32 weights of the chosen experts.
            scores: fp32 scores of all experts, with their graph.
            chosen: int64 numbers of the chosen experts.
        """
        probabilities = scores / scores.sum(-1, keepdim=True)
        result: Tensor = _AddGradient.apply(weights, probabilities, self._gradient(probabilities, chosen))  # type: ignore[no-untyped-call]
        return result

    @torch.no_grad()
    def _gradient(self, probabilities: Tensor, chosen: Tensor) -> Float[Tensor, "token expert"]:
        choices = torch.zeros_like(probabilities).scatter_(1, chosen, 1.0)
        # [sequence, token]: products are summed in one order, where an index would add by atomic operations
        number = torch.arange(len(self.lengths), device=self.lengths.device)[:, None]
        belongs = sum((row == number).to(choices.dtype) for row in self.of_token)
        counts = belongs @ choices
        for group in self.groups:
            dist.all_reduce(counts, group=group)
        lengths = self.lengths.clamp(min=1).to(counts.dtype)[:, None]
        factor = self.weight * probabilities.shape[1] / chosen.shape[1]
        gradient: Tensor = belongs.t() @ (counts * factor / lengths.square())
        return gradient


class _AddGradient(Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor, gradient: Tensor) -> Tensor:  # noqa: ARG004
        ctx.save_for_backward(gradient)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], ctx.saved_tensors[0], None
