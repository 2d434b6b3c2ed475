"""Requests to save and stop: SIGTERM and SIGUSR1, which schedulers send before the end of a job."""

from __future__ import annotations

import datetime
import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequests:
    """Whether any rank was asked to stop; as a context it handles the signals.

    The ranks agree with one all-reduce of an integer in host memory for each step, which runs beside the next step.
    A second signal has its default action, which ends the process.
    """

    def __init__(self, control: dist.ProcessGroup, timeout_minutes: float) -> None:
        """Prepare.

        Args:
            control: All ranks, over gloo.
            timeout_minutes: After this time the all-reduce of a step fails.
        """
        self._control = control
        self._timeout = datetime.timedelta(minutes=timeout_minutes)
        self._received = 0
        self._pending: tuple[Any, torch.Tensor] | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def agreed(self) -> signal.Signals | None:
        """The signal that a rank received before the last call, the same on every rank; a collective, once a step."""
        number = 0
        if self._pending is not None:
            work, value = self._pending
            work.wait(self._timeout)
            number = int(value.numpy()[0])
        value = torch.tensor([self._received], dtype=torch.int32)
        self._pending = dist.all_reduce(value, op=dist.ReduceOp.MAX, group=self._control, async_op=True), value
        return signal.Signals(number) if number else None

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if self._received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received = number

    def __enter__(self) -> StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if error is None and self._pending is not None:
            self._pending[0].wait(self._timeout)
