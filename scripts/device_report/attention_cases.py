"""Attention: of rows, of packed documents, of branches with a prefix, and of the parts of context-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mindspeed_simpo.batch import Branch, Documents
from mindspeed_simpo.model.causal import causal_attention
from mindspeed_simpo.model.packed import in_rank_order, packed_attention, segmented_attention
from mindspeed_simpo.parallel.context import positions_of
from scripts.device_report.operators import Case, normal

_CAP = 2.0
_HEADS = {"64": (64, 64), "128": (128, 128), "192 and values of 128": (192, 128)}
_NO_CAP = ("npu",)


def cases(small: bool) -> list[Case]:
    """All of them."""
    seq = 64 if small else 1024
    window = seq // 4
    variants: dict[str, dict[str, Any]] = {
        "": {},
        ", window": {"window": window},
        ", sinks": {"sinks": True},
        ", window and sinks": {"window": window, "sinks": True},
        ", soft cap": {"softcap": _CAP},
        ", window and soft cap": {"window": window, "softcap": _CAP},
    }
    found = [
        _rows(f"attention, heads of {name}, 4 of {kv_heads}", seq, seq, dims, kv_heads)
        for name, dims in _HEADS.items()
        for kv_heads in ((4, 1) if name == "128" else (2,))
    ]
    for name, options in variants.items():
        found.append(_rows(f"attention, more keys than queries{name}", seq // 2, seq, (64, 64), 2, **options))
        if name:
            found.append(_rows(f"attention{name}", seq, seq, (64, 64), 2, **options))
        documents = Documents((seq // 4 + 3, 1, seq // 3))
        found.append(_packed(f"attention of packed documents{name}", documents, **options))
        prompts = seq // 4, seq // 5
        branches = tuple(
            Branch(start, length, rest)
            for start, length in ((0, prompts[0]), (prompts[0], prompts[1]))
            for rest in (seq // 6, seq // 7 + 1)
        )
        found.append(_packed(f"attention of branches{name}", Documents(prompts, branches), **options))
    found.append(_parts("attention of context-parallel parts", Documents((seq // 2, seq // 4))))
    shared = Documents((seq // 4,), (Branch(0, seq // 4, seq // 2), Branch(0, seq // 4, seq // 4)))
    found.append(_parts("attention of context-parallel parts of branches", shared))
    return found


def _inputs(queries: int, keys: int, rows: int, dims: tuple[int, int], kv_heads: int, sinks: bool) -> dict[str, Tensor]:
    inputs = {
        "query": normal(queries, rows, 4, dims[0], seed=1),
        "key": normal(keys, rows, kv_heads, dims[0], seed=2),
        "value": normal(keys, rows, kv_heads, dims[1], seed=3),
    }
    return inputs | ({"sinks": normal(4, seed=4)} if sinks else {})


def _rows(
    name: str,
    queries: int,
    keys: int,
    dims: tuple[int, int],
    kv_heads: int,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> Case:
    inputs = _inputs(queries, keys, 2, dims, kv_heads, sinks)
    behind = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
    options = {"scale": dims[0] ** -0.5, "softcap": softcap}
    call = partial(_narrow if dims[1] < dims[0] else causal_attention, window=window, **options)
    return _case(name, inputs, call, _within(behind >= 0, behind, window), options)


def _narrow(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """With values narrower than keys, as latent attention calls the kernel."""
    width = query.shape[-1]
    context = causal_attention(query, key, pad(value, (0, width - value.shape[-1])), **options)
    return context.unflatten(-1, (-1, width))[..., : value.shape[-1]].flatten(2)


def _packed(
    name: str,
    documents: Documents,
    window: int | None = None,
    softcap: float | None = None,
    sinks: bool = False,
) -> Case:
    seq = sum(documents.lengths)
    options = {"scale": 0.125, "softcap": softcap}
    call = partial(packed_attention, documents=documents, window=window, **options)
    return _case(name, _inputs(seq, seq, 1, (64, 64), 2, sinks), call, _within(*_visible(documents), window), options)


def _parts(name: str, documents: Documents, size: int = 2) -> Case:
    """The queries of every rank to the keys of all, put together in the order of the row."""
    seq = sum(documents.lengths)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts, places = [], []
        keys, values = (in_rank_order(tensor, documents, size) for tensor in (key, value))
        for rank in range(size):
            held = positions_of(rank, size, documents.lengths, query.device)
            parts.append(segmented_attention(query[held], keys, values, documents, rank, size, 0.125))
            places.append(held)
        return torch.cat(parts)[torch.cat(places).argsort()]

    options = {"scale": 0.125, "softcap": None}
    return _case(name, _inputs(seq, seq, 1, (64, 64), 2, sinks=False), call, _visible(documents)[0], options)


def _visible(documents: Documents) -> tuple[Tensor, Tensor]:
    """Which keys of the row a query attends to, and how many keys of its own sequence lie between them."""
    seq = sum(documents.lengths)
    visible, behind = torch.zeros(seq, seq, dtype=torch.bool), torch.zeros(seq, seq, dtype=torch.int64)
    start = 0
    for number, length in enumerate(documents.lengths):
        branch = number - len(documents.wholes)
        prefix_start, prefix, _ = documents.branches[branch] if branch >= 0 else (0, 0, 0)
        own = torch.arange(start, start + length)
        for query in range(length):
            keys = torch.cat((torch.arange(prefix_start, prefix_start + prefix), own[: query + 1]))
            visible[start + query, keys] = True
            behind[start + query, keys] = torch.arange(len(keys) - 1, -1, -1)
        start += length
    return visible, behind


def _within(visible: Tensor, behind: Tensor, window: int | None) -> Tensor:
    return visible if window is None else visible & (behind < window)


def _case(
    name: str, inputs: dict[str, Tensor], call: Callable[..., Tensor], visible: Tensor, options: dict[str, Any]
) -> Case:
    refused = _NO_CAP if options["softcap"] is not None else ()
    return Case(name, inputs, call, partial(_dense, visible=visible, **options), refused_on=refused)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    shared_by = query.shape[2] // key.shape[2]
    key, value = (part.repeat_interleave(shared_by, dim=2) for part in (key, value))
    scores = torch.einsum("qrhd,krhd->rhqk", query, key) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        extra = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, extra), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return torch.einsum("rhqk,krhd->qrhd", weights, value).flatten(2)
