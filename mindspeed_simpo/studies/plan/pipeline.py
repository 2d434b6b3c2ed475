"""How long a pipeline takes for passes of different lengths: megatron-core's schedules, event by event."""

from __future__ import annotations

import functools

import numpy as np
from jaxtyping import Float

Times = Float[np.ndarray, "stage pass scenario"]
"""Seconds of each pass on each virtual stage, stage ``v * pipeline + rank`` being on ``rank``, in each scenario."""


def makespan(
    forward: Times, backward: Times | None, send: Float[np.ndarray, "pass scenario"], pipeline: int
) -> Float[np.ndarray, " scenario"]:
    """Seconds from the first forward to the last backward, or to the last forward where there is no backward.

    A rank runs its forwards and backwards in the order of megatron-core: 1F1B, or the interleaved schedule where there
    are more stages than ranks. A forward waits for that of the stage before it and for the message between them, a
    backward for that of the stage after it.

    Args:
        forward: Seconds of the forwards.
        backward: Seconds of the backwards; None for a run without gradients.
        send: Seconds of the message of a pass between two stages.
        pipeline: Number of pipeline ranks.
    """
    stages, passes = forward.shape[:2]
    free = np.zeros((pipeline, *forward.shape[2:]))
    forward_done: dict[tuple[int, int], np.ndarray] = {}
    backward_done: dict[tuple[int, int], np.ndarray] = {}
    for is_backward, stage, number in events(stages, passes, pipeline, backward is not None):
        rank = stage % pipeline
        if is_backward:
            assert backward is not None
            begin = np.maximum(free[rank], forward_done[stage, number])
            if stage < stages - 1:
                begin = np.maximum(begin, backward_done[stage + 1, number] + send[number])
            free[rank] = backward_done[stage, number] = begin + backward[stage, number]
        else:
            begin = free[rank]
            if stage:
                begin = np.maximum(begin, forward_done[stage - 1, number] + send[number])
            free[rank] = forward_done[stage, number] = begin + forward[stage, number]
    return free.max(axis=0)  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=512)
def events(stages: int, passes: int, pipeline: int, backwards: bool) -> list[tuple[bool, int, int]]:
    """Forwards and backwards ``(is_backward, stage, pass)`` of all ranks, each after those that it waits for."""
    own = [_order_of_rank(rank, stages // pipeline, passes, pipeline, backwards) for rank in range(pipeline)]
    done: set[tuple[bool, int, int]] = set()
    places = [0] * pipeline
    found: list[tuple[bool, int, int]] = []
    while len(found) < sum(map(len, own)):
        for rank in range(pipeline):
            while places[rank] < len(own[rank]):
                event = own[rank][places[rank]]
                is_backward, stage, number = event
                before = (True, stage + 1, number) if is_backward else (False, stage - 1, number)
                waits = stage < stages - 1 if is_backward else stage > 0
                if waits and before not in done:
                    break
                done.add(event)
                found.append(event)
                places[rank] += 1
    return found


def _order_of_rank(rank: int, chunks: int, passes: int, pipeline: int, backwards: bool) -> list[tuple[bool, int, int]]:
    """The order on one rank, of megatron-core's ``forward_backward_pipelining_with(out)_interleaving``."""
    total = passes * chunks

    def event(index: int, is_backward: bool) -> tuple[bool, int, int]:
        group, place = divmod(index, pipeline * chunks)
        chunk, number = place // pipeline, group * pipeline + place % pipeline
        if chunks == 1:
            chunk, number = 0, index
        if is_backward:
            chunk = chunks - 1 - chunk
        return is_backward, chunk * pipeline + rank, number

    if not backwards:
        return [event(index, False) for index in range(total)]
    warm_up = pipeline - rank - 1
    if chunks > 1:
        warm_up = 2 * warm_up + (chunks - 1) * pipeline
    warm_up = min(warm_up, total)
    order = [event(index, False) for index in range(warm_up)]
    for index in range(warm_up, total):
        order += [event(index, False), event(index - warm_up, True)]
    return order + [event(index, True) for index in range(total - warm_up, total)]
