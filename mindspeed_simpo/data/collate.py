"""Pairs of token ids to one padded micro-batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mindspeed_simpo.batch import FILLER_PAIR, IGNORE_INDEX, PairBatch, TokenizedPair

_PADDING_ID = 0


def collate_padded(
    pairs: Sequence[TokenizedPair | None], pair_ids: Sequence[int], *, multiple_of: int = 1
) -> PairBatch:
    """Chosen rows, then rejected rows, right-padded; ``targets[t]`` is token ``t + 1`` where that is a response token.

    Args:
        pairs: ``P >= 1`` pairs; ``None`` is a filler pair: one padding token a row and no target.
        pair_ids: Row number of each pair in the dataset; that of a filler is replaced by ``FILLER_PAIR``.
        multiple_of: The padded length is rounded up to a multiple of it.

    Returns:
        ``tokens`` and ``targets`` int64 ``[2P, seq]``, ``lengths`` int64 ``[2P]`` (0 for a filler), ``pair_ids`` int64
        ``[P]``.

    Raises:
        ValueError: where there is no pair, or the numbers of pairs and ids differ.
    """
    if not pairs or len(pairs) != len(pair_ids):
        raise ValueError(f"{len(pairs)} pairs and {len(pair_ids)} ids")
    rows: list[tuple[list[int], list[int]]] = [
        ([_PADDING_ID], []) if pair is None else (pair.prompt_ids, getattr(pair, side))
        for side in ("chosen_ids", "rejected_ids")
        for pair in pairs
    ]
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    length = -(-longest // multiple_of) * multiple_of
    lengths = [
        0 if pair is None else len(prompt) + len(response)
        for (prompt, response), pair in zip(rows, [*pairs, *pairs], strict=True)
    ]
    tokens = torch.full((len(rows), length), _PADDING_ID, dtype=torch.int64)
    targets = torch.full((len(rows), length), IGNORE_INDEX, dtype=torch.int64)
    for row, (prompt, response) in enumerate(rows):
        ids = torch.tensor([*prompt, *response], dtype=torch.int64)
        tokens[row, : len(ids)] = ids
        targets[row, len(prompt) - 1 : len(ids) - 1] = ids[len(prompt) :]
    ids_of_pairs = [FILLER_PAIR if pair is None else pair_id for pair, pair_id in zip(pairs, pair_ids, strict=True)]
    return PairBatch(
        tokens=tokens,
        targets=targets,
        lengths=torch.tensor(lengths, dtype=torch.int64),
        pair_ids=torch.tensor(ids_of_pairs, dtype=torch.int64),
    )
