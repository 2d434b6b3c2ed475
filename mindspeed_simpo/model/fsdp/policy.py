"""A causal model of transformers as the trained model: token ids to log-probability sums of responses."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import PreTrainedModel

from mindspeed_simpo.batch import Documents
from mindspeed_simpo.model.fsdp.adapters import base_name
from mindspeed_simpo.model.fsdp.attention import RowsInAttention, Seen
from mindspeed_simpo.model.fsdp.dropout import ForwardTokens
from mindspeed_simpo.model.fsdp.logits import Logits

Head = Callable[[Tensor, Tensor], Tensor]
_SCORE = "score_of_this_package"
"""Name of the method that FSDP2 runs as a forward of the root."""


class Policy(torch.nn.Module):
    """The sharded model, called as the model of the megatron backend is.

    Args:
        causal: The sharded model.
        logits: What it computes between its last hidden states and its logits.
        context_group: Ranks that hold different positions of the rows; None where a rank holds whole rows.
        tokens: Told the keys of the tokens of each forward.
        adapted: The model as peft sees it; None without adapters.
        recomputes_core: Whether the attention's scores are computed again in the backward.
    """

    def __init__(
        self,
        causal: PreTrainedModel,
        logits: Logits,
        context_group: dist.ProcessGroup | None,
        tokens: ForwardTokens,
        adapted: PeftModel | None = None,
        *,
        recomputes_core: bool,
    ) -> None:
        super().__init__()
        self.causal, self.logits = causal, logits
        # not a submodule: it has the modules of causal
        self._adapted = [adapted]
        self._context_group, self._recomputes_core = context_group, recomputes_core
        self._tokens = tokens
        setattr(causal, _SCORE, types.MethodType(_score, causal))
        register_fsdp_forward_method(causal, _SCORE)

    def forward(
        self,
        tokens: Int[Tensor, "row seq"],
        *,
        position_ids: Int[Tensor, " seq"],
        documents: Documents,
        head: Head,
        token_keys: Int[Tensor, "row seq"] | None = None,
    ) -> Tensor:
        """``head(scale h, W)``, with the last hidden states ``h`` and the output weight ``W``.

        Args:
            tokens: This context-parallel rank's positions of the rows.
            position_ids: Position of each token in its sequence.
            documents: Attention pattern of the full row; empty for padded rows.
            head: See :class:`~mindspeed_simpo.loss.head.ResponseHead`.
            token_keys: Keys of the tokens for dropout; None without dropout.
        """
        core = self._recomputes_core and self.training
        rows = RowsInAttention(documents, self._context_group, recomputed=core)
        with self._tokens.at(token_keys):
            result: Tensor = getattr(self.causal, _SCORE)(tokens, position_ids, rows, head, self.logits.scale)
        return result

    @torch.no_grad()
    def hidden_states(
        self, tokens: Int[Tensor, "row seq"], position_ids: Int[Tensor, " seq"], documents: Documents, seen: Seen
    ) -> Float[Tensor, "row seq hidden"]:
        """The last hidden states of whole rows, the same on every rank, and what the model asked of its attention."""
        rows = RowsInAttention(documents, seen=seen)
        score = getattr(self.causal, _SCORE)
        result: Tensor = score(tokens, position_ids, rows, lambda hidden, _weight: hidden, 1.0)
        self.reshard()
        return result.transpose(0, 1)

    def reshard(self) -> None:
        """Free the root's own parameters, which FSDP2 keeps whole after a forward that no backward follows."""
        causal: Any = self.causal
        causal.reshard()

    @property
    def adapted(self) -> PeftModel | None:
        """The model as peft sees it; None without adapters."""
        return self._adapted[0]

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """Compute the model without its adapters inside of the context."""
        if self.adapted is None:
            yield
            return
        with self.adapted.disable_adapter():
            yield

    def stored_parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """What a checkpoint holds: the adapters' factors, by their names in peft, or all where there are none."""
        for name, parameter in self.causal.named_parameters():
            if self.adapted is None:
                yield name, parameter
            elif parameter.requires_grad:
                yield "base_model.model." + name.replace(".default", ""), parameter

    def weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """The model's own parameters, without adapters, by their names in transformers."""
        for name, parameter in self.causal.named_parameters():
            if ".lora_" not in name:
                yield base_name(name), parameter


def _score(
    causal: PreTrainedModel,
    tokens: Tensor,
    position_ids: Tensor,
    rows: RowsInAttention,
    head: Head,
    scale: float,
) -> Tensor:
    """What a forward of the sharded root computes: here its own parameters are whole."""
    outputs = causal.base_model(input_ids=tokens, position_ids=position_ids[None], use_cache=False, rows=rows)
    hidden = outputs.last_hidden_state.transpose(0, 1)
    get_output: Any = causal.get_output_embeddings
    return head(hidden if scale == 1.0 else hidden * scale, get_output().weight)
