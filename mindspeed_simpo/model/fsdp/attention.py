"""The attention of this package inside of the models of transformers, which call it by its name in a registry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface
from transformers.utils import logging

from mindspeed_simpo.batch import UNPACKED, Documents
from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.causal import causal_attention
from mindspeed_simpo.model.context import gathered_attention
from mindspeed_simpo.model.packed import packed_attention

NAME = "mindspeed_simpo"
"""Value of ``attn_implementation``."""
_WITHOUT_EFFECT = frozenset(
    {"position_ids", "use_cache", "cache_position", "output_attentions", "output_router_logits"}
)
"""Keywords that some models hand down and that change nothing in a causal attention whose keys are rotated already."""


class Seen:
    """What a model asked of the attention in one forward; filled by :func:`attend` and :func:`_no_mask`.

    It is no dataclass: with ``bf16``, FSDP2 hands copies of dataclasses to the layers.
    """

    def __init__(self) -> None:
        self.modules: list[torch.nn.Module] = []
        """Modules that called the attention, in order."""
        self.softcaps = False
        self.masks: list[Callable[..., Tensor]] = []
        """Functions ``(row, head, query, key)`` of the masks of the model: whether the query attends to the key."""


@dataclass(frozen=True)
class RowsInAttention:
    """What a forward hands down to every attention, by the keyword ``rows``."""

    documents: Documents = UNPACKED
    """Documents of a packed row; empty for padded rows."""
    context_group: dist.ProcessGroup | None = None
    """Ranks that hold different positions of the rows; None where this rank holds all."""
    seen: Seen | None = None
    recomputed: bool = False
    """Whether the backward computes the scores again."""


_recording: list[Seen] = []


def attend(
    module: torch.nn.Module,
    query: Float[Tensor, "row heads queries dim"],
    key: Float[Tensor, "row groups keys dim"],
    value: Float[Tensor, "row groups keys value_dim"],
    attention_mask: Tensor | None,
    rows: RowsInAttention | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "row queries heads value_dim"], None]:
    """``softmax(cap(scaling q k^T)) v``, causal, within each document of the rows.

    The arguments are those of transformers' attention functions. Padding is on the right and needs no mask.

    Args:
        module: The calling attention.
        query: Rotated queries.
        key: Rotated keys; consecutive query heads share a key-value head.
        value: Values; their heads may be narrower than those of the keys.
        attention_mask: None: :func:`register` gives models masks of None.
        rows: What the rows hold; None where the model does not hand the keyword down, whose rows are padded ones.
        scaling: Factor of the scores; None for ``dim ** -0.5``.
        sliding_window: Keys that a query attends to, its own included; None for all earlier ones.
        softcap: Soft cap of the scores; None for none.
        s_aux: Sinks: the score of one more key of each query head, whose value is zero.
        dropout: Must be 0.
        is_causal: Must not be False.
        **others: Keywords that a model hands down; one that might change the result is refused.

    Raises:
        ModelError: for a keyword that this attention does not have.
    """
    _refuse_unknown(module, attention_mask, dropout, is_causal, others)
    rows = rows or RowsInAttention()
    if rows.seen is not None:
        rows.seen.modules.append(module)
        rows.seen.softcaps |= softcap is not None
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    width, own = max(query.shape[-1], value.shape[-1]), value.shape[-1]
    inputs = [
        torch.nn.functional.pad(each.permute(2, 0, 1, 3), (0, width - each.shape[-1])) for each in (query, key, value)
    ]
    scores = scale, sliding_window, softcap, s_aux
    core = partial(_core, rows=rows, scores=scores)
    if rows.recomputed and torch.is_grad_enabled():
        context = checkpoint(core, *inputs, use_reentrant=False, preserve_rng_state=False)
    else:
        context = core(*inputs)
    context = context.unflatten(-1, (query.shape[1], width))[..., :own]
    return context.transpose(0, 1), None


def _core(
    query: Tensor, key: Tensor, value: Tensor, rows: RowsInAttention, scores: tuple[Any, ...]
) -> Float[Tensor, "queries row width"]:
    if rows.context_group is not None:
        scale, window, softcap, sinks = scores
        group = rows.context_group
        return gathered_attention(query, key, value, rows.documents, scale, window, softcap, sinks, group)
    if rows.documents.wholes:
        return packed_attention(query, key, value, rows.documents, *scores)
    return causal_attention(query, key, value, *scores)


def _refuse_unknown(
    module: torch.nn.Module,
    attention_mask: Tensor | None,
    dropout: float,
    is_causal: bool | None,
    others: dict[str, Any],
) -> None:
    kind = type(module).__name__
    unknown = {name: value for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT}
    if attention_mask is not None:
        unknown["attention_mask"] = attention_mask
    if dropout:
        unknown["dropout"] = dropout
    if is_causal is False or getattr(module, "is_causal", True) is False:
        unknown["is_causal"] = False
    if unknown:
        found = ", ".join(f"{name}={_shown(value)}" for name, value in sorted(unknown.items()))
        raise ModelError(
            f"{kind} asks its attention for {found}, which the attention of this package does not have: the model "
            "cannot be trained with backend: fsdp"
        )


def _shown(value: Any) -> str:
    return f"tensor of {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _no_mask(*_args: Any, mask_function: Callable[..., Tensor] | None = None, **_others: Any) -> None:
    if mask_function is not None:
        for seen in _recording:
            seen.masks.append(mask_function)


def register() -> None:
    """Make the attention known to transformers under :data:`NAME`, with masks of None; show no bars of its own."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _no_mask)


@contextmanager
def recording(seen: Seen) -> Iterator[Seen]:
    """Inside of the context, ``seen.masks`` collects the masks that models make."""
    _recording.append(seen)
    try:
        yield seen
    finally:
        _recording.remove(seen)
