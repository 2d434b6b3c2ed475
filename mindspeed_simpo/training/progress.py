"""Logging and progress display: a progress bar on a terminal, plain log lines elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from rich import progress
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from mindspeed_simpo.errors import TrainingError

logger = logging.getLogger(__name__)

LINE_SECONDS = 30.0
PACE_LINES = 100
"""Lines of metrics whose pace tells the time that is left."""
MINUTE = 60
_FORMAT = "%(asctime)s %(levelname)s %(message)s"

# stdout is reserved for results that another program reads
console = Console(stderr=True)


def set_up_logging(*, is_main: bool) -> None:
    """Log this package's messages to stderr: from level INFO on the main rank, from WARNING on the other ranks."""
    package = logging.getLogger("mindspeed_simpo")
    package.setLevel(logging.INFO if is_main else logging.WARNING)
    if not package.handlers:
        package.addHandler(_to_terminal() if console.is_terminal else _to_file_or_pipe())
        package.propagate = False


def _to_terminal() -> logging.Handler:
    handler = RichHandler(console=console, show_path=False, log_time_format="%H:%M:%S")
    handler.addFilter(_is_unprinted)
    return handler


def _to_file_or_pipe() -> logging.Handler:
    # one line for each message: rich wraps at 80 columns where stderr is not a terminal
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_FORMAT, "%H:%M:%S"))
    handler.addFilter(_is_unprinted)
    return handler


def _is_unprinted(record: logging.LogRecord) -> bool:
    return not getattr(record, "printed", False)


def warn(message: str) -> None:
    """Print a warning to stderr as ``check`` prints its warnings, and log it to the run's file."""
    console.print(f"[yellow]warning[/]: {escape(message)}", soft_wrap=True, highlight=False)
    logger.warning("%s", message, extra={"printed": True})


class _RunLog(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: ARG002, N802 - logging's name
        # the default of logging is to print a traceback and continue
        raise TrainingError(f"{self.baseFilename}: cannot be written: {sys.exc_info()[1]}") from None


@contextmanager
def log_to_file(path: Path) -> Iterator[None]:
    """Append this package's messages to a file.

    Raises:
        OSError: where the file cannot be opened.
        TrainingError: where a message cannot be written, from the logging call.
    """
    handler = _RunLog(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(_FORMAT))
    package = logging.getLogger("mindspeed_simpo")
    package.addHandler(handler)
    try:
        yield
    finally:
        package.removeHandler(handler)
        handler.close()


@contextmanager
def counting(description: str, total: int, *, shown: bool) -> Iterator[Callable[[], None]]:
    """A progress bar for the body; off a terminal a log line, every ``LINE_SECONDS`` at most.

    Args:
        description: Text before the bar.
        total: Number of parts.
        shown: Whether to show anything.

    Yields:
        A function that the body calls after each part.
    """
    lines = shown and not console.is_terminal
    with progress.Progress(console=console, disable=not shown or lines) as bar:
        task = bar.add_task(description, total=total)
        begin = last = time.monotonic()

        def advance() -> None:
            nonlocal last
            bar.advance(task)
            now = time.monotonic()
            done = int(bar.tasks[task].completed)
            if lines and (done == total or now - last >= LINE_SECONDS):
                last = now
                logger.info("%s: %d of %d, %.0f s", description, done, total, now - begin)

        yield advance


class Progress:
    """Training progress: a bar with the latest metrics, or a log line for each metrics line off a terminal."""

    def __init__(self, total_steps: int, first_step: int) -> None:
        """Prepare the bar; entering the context shows it.

        Args:
            total_steps: Steps of the run.
            first_step: Steps completed so far.
        """
        self._bar = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[numbers]}"),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total_steps, completed=first_step, numbers="")
        self._total, self._first = total_steps, first_step
        self._time_left = TimeLeft(total_steps, first_step)

    def show(self, line: Mapping[str, Any]) -> None:
        """Show a metrics line, which has ``step``, ``split``, ``loss`` and the ``rewards/*`` metrics."""
        numbers, split, step = _numbers(line), line["split"], line["step"]
        if split == "train":
            self._bar.update(self._task, completed=step, numbers=numbers)
            left = self._time_left.after(step)
            numbers += f"  {shown_time(left)} left" if left else ""
        elif step == self._first:
            self._time_left = TimeLeft(self._total, step)  # without the evaluation before the first step
        if split == "eval" or self._bar.disable:
            logger.info("%s step %d/%d  %s", split, step, self._total, numbers)

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


class TimeLeft:
    """The time that the remaining steps will take, at the pace of the last lines, evaluations and saves included.

    Args:
        total_steps: Steps of the run.
        first_step: Steps completed so far.
        clock: Seconds, as ``time.monotonic``.
    """

    def __init__(self, total_steps: int, first_step: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._total, self._clock = total_steps, clock
        self._passed = deque([(first_step, clock())], maxlen=PACE_LINES)

    def after(self, step: int) -> float:
        """Seconds left after a step."""
        now = self._clock()
        before, begin = self._passed[0]
        self._passed.append((step, now))
        return (self._total - step) * (now - begin) / (step - before) if step > before else 0.0


def shown_time(seconds: float) -> str:
    """Seconds as ``40 s``, ``12 min``, ``1 h 03 min`` or ``2 d 04 h``."""
    if round(seconds) < MINUTE:
        return f"{seconds:.0f} s"
    minutes = round(seconds / MINUTE)
    hours, days = minutes // 60, minutes // (24 * 60)
    if days:
        return f"{days} d {hours % 24:02d} h"
    return f"{hours} h {minutes % 60:02d} min" if hours else f"{minutes} min"


def _numbers(line: Mapping[str, Any]) -> str:
    text = f"loss {line['loss']:.4f}  accuracy {line['rewards/accuracies']:.3f}  margin {line['rewards/margins']:+.3f}"
    if "pairs_per_second" in line:
        text += f"  {line['pairs_per_second']:.2f} pairs/s"
    return text
