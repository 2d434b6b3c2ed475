"""Shapes of what pipeline ranks send to each other, given to megatron-core in place of a message and a wait."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

Shape = tuple[int, int, int]
_NOTHING: Shape = (0, 0, 0)


@contextmanager
def known_receive_shapes(shapes: Sequence[Shape]) -> Iterator[None]:
    """While it is entered, megatron-core's schedule without virtual stages exchanges no shapes.

    With ``variable_seq_lengths`` megatron-core sends the shape of every tensor ahead of the tensor, and the receiving
    host waits for it before it can allocate. The shapes given here take the place of these messages. The order is that
    of the micro-batches, for hidden states and for gradients alike: a pipeline rank receives both in this order.

    Args:
        shapes: Of the hidden states of each micro-batch, ``(seq, row, hidden)``, as this rank and its neighbours hold
            them: divided by context parallelism and sequence parallelism.
    """
    from megatron.core.pipeline_parallel import p2p_communication

    # 0.16 has a method, 0.12 a function of the module
    holder: Any = getattr(p2p_communication, "P2PCommunicator", p2p_communication)
    exchange = holder._communicate_shapes
    hidden_states, gradients = iter(shapes), iter(shapes)

    def known(send_next: Any, send_prev: Any, recv_prev: bool, recv_next: bool, config: Any = None) -> Any:  # noqa: ARG001
        return next(hidden_states) if recv_prev else _NOTHING, next(gradients) if recv_next else _NOTHING

    holder._communicate_shapes = staticmethod(known)
    try:
        yield
    finally:
        holder._communicate_shapes = exchange
