"""From the token ids of pairs to the tensors of one micro-batch: one row for each sequence, or one row for all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from mindspeed_simpo.batch import (
    FILLER_PAIR,
    IGNORE_INDEX,
    Branch,
    Documents,
    Packing,
    PairBatch,
    TokenizedPair,
)
from mindspeed_simpo.batch_images import NO_IDENTITY, identities_of

_PADDING_ID = 0
_CHOSEN, _REJECTED = 0, 1

Collate = Callable[..., PairBatch]


def collate_padded(
    pairs: Sequence[TokenizedPair | None], pair_ids: Sequence[int], *, multiple_of: int = 1
) -> PairBatch:
    """Chosen rows, then rejected rows, right-padded; ``targets[t]`` is token ``t + 1`` where that is a response token.

    The first token of a sequence is never a target, because no position predicts it; with an empty prompt this token is
    the first one of the response.

    Args:
        pairs: ``P >= 1`` pairs; ``None`` is a filler pair: each of its two rows has one padding token and no target.
        pair_ids: Index of each pair in the data set; the one of a filler is replaced by ``FILLER_PAIR``.
        multiple_of: The padded length is rounded up to a multiple of this number.

    Returns:
        ``tokens`` and ``targets`` int64 ``[2P, seq]``, ``lengths`` int64 ``[2P]`` (0 for a filler), ``pair_ids`` int64
        ``[P]``.

    Raises:
        ValueError: where there is no pair, or the numbers of pairs and ids differ.
    """
    _check(pairs, pair_ids)
    numbers = [FILLER_PAIR if pair is None else pair_id for pair, pair_id in zip(pairs, pair_ids, strict=True)]
    rows = [
        _FILLER if pair is None else _sequence(pair, number, side)
        for side in (_CHOSEN, _REJECTED)
        for pair, number in zip(pairs, numbers, strict=True)
    ]
    length = _rounded(max(len(row.ids) for row in rows), multiple_of)
    tokens, targets, identities = (
        torch.full((len(rows), length), padding, dtype=torch.int64)
        for padding in (_PADDING_ID, IGNORE_INDEX, NO_IDENTITY)
    )
    for number, row in enumerate(rows):
        tokens[number, : len(row.ids)] = torch.tensor(row.ids)
        targets[number, : len(row.ids)] = torch.tensor(row.targets)
        identities[number, : len(row.ids)] = row.identities
    return PairBatch(tokens, targets, _lengths(pairs), torch.tensor(numbers, dtype=torch.int64), identities)


def collate_packed(
    pairs: Sequence[TokenizedPair | None], pair_ids: Sequence[int], *, multiple_of: int = 1
) -> PairBatch:
    """All sequences end to end in one row: ``prompt chosen`` of every pair, ``prompt rejected`` of every pair, padding.

    Filler pairs are left out; where all pairs are fillers, one stays.

    Args:
        pairs: See :func:`collate_padded`; ``pair_ids`` and ``multiple_of`` likewise.
        pair_ids: See ``pairs``.
        multiple_of: See ``pairs``; the tokens that round the length up are one document of padding.

    Returns:
        ``tokens`` int64 ``[1, seq]``, ``targets`` int64 ``[2, seq]``, ``lengths`` and ``pair_ids`` of the pairs
        that stay.

    Raises:
        ValueError: see :func:`collate_padded`.
    """
    kept, ids = _without_fillers(pairs, pair_ids)
    row = _Row(sum(_lengths(kept).tolist()), multiple_of)
    for side in (_CHOSEN, _REJECTED):
        for number, pair in enumerate(kept):
            if pair is not None:
                sequence = _sequence(pair, ids[number], side)
                row.put(sequence.ids, number, {side: sequence.targets}, sequence.identities)
    row.pad()
    return row.batch(kept, ids)


def collate_prefix_shared(
    pairs: Sequence[TokenizedPair | None], pair_ids: Sequence[int], *, multiple_of: int = 1
) -> PairBatch:
    """Each prompt once, in one row: ``prompt chosen`` of every pair, padding, ``rejected`` of every pair.

    A rejected response is a branch of the prompt that precedes the chosen response: its tokens attend to that prompt
    and to themselves, and its positions continue those of the prompt. The last token of a prompt predicts the first
    token of both responses.

    Args:
        pairs: See :func:`collate_padded`; ``pair_ids`` and ``multiple_of`` likewise.
        pair_ids: See ``pairs``.
        multiple_of: See ``pairs``; the tokens that round the length up are one document of padding.

    Returns:
        As :func:`collate_packed`.

    Raises:
        ValueError: see :func:`collate_padded`.
    """
    kept, ids = _without_fillers(pairs, pair_ids)
    real = [(number, pair) for number, pair in enumerate(kept) if pair is not None]
    row = _Row(sum(sum(pair.lengths) for _, pair in real), multiple_of)
    starts = []
    for number, pair in real:
        prompt = len(pair.prompt_ids)
        first_rejected = [IGNORE_INDEX] * (prompt - 1) + pair.rejected_targets[: min(prompt, 1)]
        sequence = _sequence(pair, ids[number], _CHOSEN)
        targets = {_CHOSEN: sequence.targets, _REJECTED: first_rejected}
        starts.append(row.put(sequence.ids, number, targets, sequence.identities))
    row.pad()
    for (number, pair), start in zip(real, starts, strict=True):
        targets = {_REJECTED: [*pair.rejected_targets[1:], IGNORE_INDEX]}
        prompt = len(pair.prompt_ids)
        identities = _sequence(pair, ids[number], _REJECTED).identities[prompt:]
        row.put(pair.rejected_ids, number, targets, identities, prefix=(start, prompt))
    return row.batch(kept, ids)


COLLATE: dict[str, Collate] = {
    "padded": collate_padded,
    "packed": collate_packed,
    "prefix_shared": collate_prefix_shared,
}
"""The collate function of each value of ``batching``."""


class _Row:
    """A packed row, written document by document."""

    def __init__(self, tokens: int, multiple_of: int) -> None:
        length = _rounded(max(1, tokens), multiple_of)
        self._padding = length - tokens
        self._tokens = torch.full((1, length), _PADDING_ID, dtype=torch.int64)
        self._targets = torch.full((2, length), IGNORE_INDEX, dtype=torch.int64)
        self._positions = torch.zeros(length, dtype=torch.int64)
        self._pair_of = torch.zeros(length, dtype=torch.int64)
        self._identities = torch.full((1, length), NO_IDENTITY, dtype=torch.int64)
        self._wholes: list[int] = []
        self._branches: list[Branch] = []
        self._end = 0

    def put(
        self,
        ids: list[int],
        pair: int,
        targets: dict[int, list[int]],
        identities: torch.Tensor,
        prefix: tuple[int, int] | None = None,
    ) -> int:
        """Write a document, or a branch whose prefix is the ``(start, length)`` given.

        Args:
            ids: Of the tokens to write.
            pair: Index of the pair in the micro-batch.
            targets: By side, from the first token that is written.
            identities: Of the tokens.
            prefix: First token and number of tokens of the prefix, or ``None`` for a document.

        Returns:
            The position in the row of the first token that is written.
        """
        start, self._end = self._end, self._end + len(ids)
        first = 0
        if prefix is None:
            self._wholes.append(len(ids))
        else:
            self._branches.append(Branch(*prefix, len(ids)))
            first = prefix[1]
        self._tokens[0, start : self._end] = torch.tensor(ids)
        self._positions[start : self._end] = torch.arange(first, first + len(ids))
        self._pair_of[start : self._end] = pair
        self._identities[0, start : self._end] = identities
        for side, wanted in targets.items():
            self._targets[side, start : start + len(wanted)] = torch.tensor(wanted, dtype=torch.int64)
        return start

    def pad(self) -> None:
        """Write the document of padding that rounds the length of the row up."""
        if self._padding:
            self.put([_PADDING_ID] * self._padding, 0, {}, torch.full((self._padding,), NO_IDENTITY))

    def batch(self, pairs: Sequence[TokenizedPair | None], pair_ids: Sequence[int]) -> PairBatch:
        """The micro-batch of the documents written so far."""
        documents = Documents(tuple(self._wholes), tuple(self._branches))
        return PairBatch(
            tokens=self._tokens,
            targets=self._targets,
            lengths=_lengths(pairs),
            pair_ids=torch.tensor(pair_ids, dtype=torch.int64),
            identities=self._identities,
            packing=Packing(documents, self._positions, self._pair_of, len(pairs)),
        )


class _Sequence(NamedTuple):
    """Prompt and answer, token by token."""

    ids: list[int]
    targets: list[int]
    """The next token where it is scored."""
    identities: torch.Tensor


_FILLER = _Sequence([_PADDING_ID], [IGNORE_INDEX], torch.tensor([NO_IDENTITY]))


def _sequence(pair: TokenizedPair, pair_id: int, side: int) -> _Sequence:
    ids, wanted = (
        (pair.chosen_ids, pair.chosen_targets) if side == _CHOSEN else (pair.rejected_ids, pair.rejected_targets)
    )
    labels = [IGNORE_INDEX] * len(pair.prompt_ids) + wanted
    parts = identities_of(pair_id, 0, len(pair.prompt_ids)), identities_of(pair_id, 1 + side, len(ids))
    return _Sequence([*pair.prompt_ids, *ids], [*labels[1:], IGNORE_INDEX], torch.cat(parts))


def _lengths(pairs: Sequence[TokenizedPair | None]) -> torch.Tensor:
    lengths = [
        0 if pair is None else len(pair.prompt_ids) + len(getattr(pair, side))
        for side in ("chosen_ids", "rejected_ids")
        for pair in pairs
    ]
    return torch.tensor(lengths, dtype=torch.int64)


def _without_fillers(
    pairs: Sequence[TokenizedPair | None], pair_ids: Sequence[int]
) -> tuple[Sequence[TokenizedPair | None], list[int]]:
    _check(pairs, pair_ids)
    kept = [(pair, pair_id) for pair, pair_id in zip(pairs, pair_ids, strict=True) if pair is not None]
    if not kept:
        return [None], [FILLER_PAIR]
    return [pair for pair, _ in kept], [pair_id for _, pair_id in kept]


def _check(pairs: Sequence[TokenizedPair | None], pair_ids: Sequence[int]) -> None:
    if not pairs or len(pairs) != len(pair_ids):
        raise ValueError(f"{len(pairs)} pairs and {len(pair_ids)} ids")


def _rounded(length: int, multiple_of: int) -> int:
    return -(-length // multiple_of) * multiple_of
