"""Which keys of a row a query sees, as two intervals of positions, and as blocks for FlexAttention."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from mindspeed_simpo.batch import Documents, to_device
from mindspeed_simpo.parallel.context import segments_of

BLOCK = 128
"""Queries, and keys, of a block: the default of FlexAttention."""
_MASKS = 32


class Span(NamedTuple):
    """Consecutive queries of one document, over the keys of the full row.

    A query at position ``p`` sees the keys of its document up to its own, and all of the prefix; with a window, the
    last ones of prefix and document, end to end.
    """

    query: int
    """Index of the first query."""
    length: int
    position: int
    """Position in the row of the first query."""
    start: int
    """Position of the document's first token."""
    prefix_start: int = 0
    prefix_length: int = 0

    def own(self, position: int | np.ndarray, window: int) -> tuple[int | np.ndarray, int | np.ndarray]:
        """First key, and the one after the last, of the document that the query at ``position`` sees."""
        return np.maximum(self.start, position - window + 1), position + 1

    def prefix(self, position: int | np.ndarray, window: int) -> tuple[int | np.ndarray, int | np.ndarray]:
        """The same of the prefix."""
        hidden = self.prefix_length + position - self.start - window + 1
        stop = self.prefix_start + self.prefix_length
        return self.prefix_start + np.clip(hidden, 0, self.prefix_length), stop + 0 * position


def row_spans(documents: Documents, rank: int, size: int) -> list[Span]:
    """The spans of the queries that one of ``size`` context-parallel ranks holds, in its order."""
    starts = [0, *itertools.accumulate(documents.lengths)]
    spans: list[Span] = []
    query = 0
    for document, start, stop in segments_of(documents.lengths, rank, size):
        prefix = documents.prefix_of(document)
        spans.append(Span(query, stop - start, starts[document] + start, starts[document], *prefix))
        query += stop - start
    return spans


@functools.lru_cache(_MASKS)
def row_mask(documents: Documents, rank: int, size: int, window: int | None, device: torch.device) -> BlockMask:
    """The mask of a packed row: the queries that one of ``size`` context-parallel ranks holds, by all keys.

    Args:
        documents: Documents and branches of the full row.
        rank: Context-parallel rank.
        size: Number of context-parallel ranks.
        window: Number of keys of the own sequence that a query sees, its own included; None for all earlier ones.
        device: Device of the mask.
    """
    return _block_mask(row_spans(documents, rank, size), sum(documents.lengths), window, device)


@functools.lru_cache(_MASKS)
def causal_mask(queries: int, keys: int, window: int | None, device: torch.device) -> BlockMask:
    """The mask of a row of one document, whose queries have the last positions of the keys."""
    return _block_mask([Span(0, queries, keys - queries, 0)], keys, window, device)


def _block_mask(spans: Sequence[Span], keys: int, window: int | None, device: torch.device) -> BlockMask:
    queries, window = sum(span.length for span in spans), keys if window is None else window
    partial, full = blocks(spans, keys, window)
    numbers, indices, full_numbers, full_indices = (
        to_device(each, device) for each in (*_listed(partial), *_listed(full))
    )
    first, stop, prefix_first, prefix_stop = to_device(intervals(spans, window), device).unbind()

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:  # noqa: ARG001
        own = (key >= first[query]) & (key < stop[query])
        return own | ((key >= prefix_first[query]) & (key < prefix_stop[query]))

    return BlockMask.from_kv_blocks(
        numbers, indices, full_numbers, full_indices, BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(queries, keys)
    )


def intervals(spans: Sequence[Span], window: int) -> Tensor:
    """int32 ``[4, queries]``: start and stop of the keys that each query sees of its document, then of its prefix."""
    parts = []
    for span in spans:
        positions = np.arange(span.position, span.position + span.length)
        parts.append(np.stack([*span.own(positions, window), *span.prefix(positions, window)]))
    return torch.from_numpy(np.concatenate(parts, axis=1).astype(np.int32))


def blocks(spans: Sequence[Span], keys: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """Two bool arrays ``[blocks of queries, blocks of keys]``: blocks that are seen in part, and those seen in whole.

    They are found from the ends of each span, without a mask of queries by keys.
    """
    queries = sum(span.length for span in spans)
    rows = -(-queries // BLOCK)
    some = np.zeros((rows, -(-keys // BLOCK)), dtype=bool)
    whole, spans_of = np.zeros(some.shape, dtype=np.int32), np.zeros((rows, 1), dtype=np.int32)
    for span in spans:
        for row in range(span.query // BLOCK, (span.query + span.length - 1) // BLOCK + 1):
            first = span.position + max(0, row * BLOCK - span.query)
            last = span.position + min(span.length, (row + 1) * BLOCK - span.query) - 1
            spans_of[row] += 1
            for seen in (span.own, span.prefix):
                (start, stop), (last_start, last_stop) = seen(first, window), seen(last, window)
                if start < last_stop:  # the first query begins earliest, the last one ends latest
                    some[row, start // BLOCK : -(-last_stop // BLOCK)] = True
                if last_start < stop:
                    whole[row, -(-last_start // BLOCK) : stop // BLOCK] += 1
    full = whole == spans_of
    if queries % BLOCK:
        full[-1] = False
    return some & ~full, full


def _listed(chosen: np.ndarray) -> list[Tensor]:
    """How many blocks each row has, and their indices in front, as FlexAttention takes them."""
    numbers, indices = chosen.sum(axis=1), np.argsort(~chosen, axis=1, kind="stable")
    return [torch.from_numpy(each.astype(np.int32))[None, None] for each in (numbers, indices)]
