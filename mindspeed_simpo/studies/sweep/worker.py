"""The trials of a sweep, one after the other in this process, beside those of other processes and hosts."""

from __future__ import annotations

import importlib.util
import logging
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.studies.page import missing_extra
from mindspeed_simpo.studies.sweep.database import HEARTBEAT_S, alone
from mindspeed_simpo.studies.sweep.plan import CONFIG_FILE, Plan, describe, write_config
from mindspeed_simpo.studies.sweep.results import Results, collect, write_json
from mindspeed_simpo.studies.sweep.trial import LOG_FILE, Outcome, Running, Start, outcome, trial_folder

if TYPE_CHECKING:
    from optuna import Trial

    from mindspeed_simpo.studies.sweep.ledger import Ledger

logger = logging.getLogger(__name__)

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_POLL_S = 0.1
_IDLE_S = 1.0


def run_sweep(
    plan: Plan, url: str | None, name: str, start: Start, nproc: int, *, retry_failed: bool
) -> tuple[Results, int]:
    """Run the trials that are left, and write ``sweep.json`` and ``index.html`` after each of them.

    Args:
        plan: The checked sweep.
        url: Database of the study; None for the file ``sweep.db`` in the sweep's folder.
        name: Name of the study.
        start: Starts a training.
        nproc: Ranks of each training.
        retry_failed: Whether to run the trials again that failed with an error.

    Returns:
        The results, and the exit code: 0; 1 where a trial failed; 128 + N where signal N stopped the sweep.

    Raises:
        ConfigError: where optuna or plotly is not installed, the folder or the database cannot be opened, or the study
            was begun with other values.
    """
    for package in ("optuna", "plotly"):
        if importlib.util.find_spec(package) is None:
            raise ConfigError(missing_extra("studies", package))
    from mindspeed_simpo.studies.sweep.ledger import Ledger

    try:
        plan.folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output_dir: cannot make {plan.folder}: {error}") from None
    ledger = Ledger(plan, url or f"sqlite:///{(plan.folder / 'sweep.db').absolute()}", name)
    try:
        if retry_failed:
            ledger.retry_failed()
        with _StopRequests() as stop:
            _Worker(ledger, start, nproc, stop).run()
        results = _write(ledger)
    finally:
        ledger.close()
    if stop.received:
        return results, 128 + stop.received
    return results, 1 if any(row.error for row in results.rows) else 0


class _Worker:
    """Runs trials until none is left, or a signal asks to stop."""

    def __init__(self, ledger: Ledger, start: Start, nproc: int, stop: _StopRequests) -> None:
        self.ledger, self.start, self.nproc, self.stop = ledger, start, nproc, stop
        self.plan = ledger.plan

    def run(self) -> None:
        waiting = False
        while not self.stop.received:
            self.ledger.release_dead()
            claimed = self.ledger.claim()
            if claimed is not None:
                waiting = False
                self._trial(*claimed)
            elif self.ledger.is_finished:
                return
            else:
                if not waiting:
                    logger.info("every trial left runs in another process; waiting, to go on with it should that die")
                waiting = True
                self.stop.wait(_IDLE_S)

    def _trial(self, slot: int, trial: Trial) -> None:
        folder = trial_folder(self.plan.folder, slot)
        params = self.ledger.parameters(trial)
        logger.info("trial %d of %d: %s; log: %s", slot, self.plan.size, describe(params), folder / LOG_FILE)
        begin = time.monotonic()
        try:
            write_config(self.plan, params, folder)
        except ConfigError as error:
            self._record(slot, trial, Outcome(error=str(error)), 0.0)
            return
        log = folder / LOG_FILE
        log_start = log.stat().st_size if log.exists() else 0
        words = ["train", str(folder / CONFIG_FILE)] + ["--nproc-per-node", str(self.nproc)] * (self.nproc > 1)
        process = self.start(words, log)
        try:
            code = self._wait(process, trial)
        finally:
            if process.poll() is None:
                process.kill()
        if code is None:
            logger.warning("trial %d: another process has it now, for this one was silent for too long", slot)
        elif code and self.stop.received:
            self.ledger.release(trial._trial_id)
            logger.warning("trial %d: stopped; the same command goes on with it", slot)
        else:
            found = outcome(folder, code, log_start, self.plan.goal)
            self._record(slot, trial, found, time.monotonic() - begin)

    def _wait(self, process: Running, trial: Trial) -> int | None:
        """Wait for a training, with signs of life; its exit code, or None where the trial is this process's no more."""
        beat, signals = time.monotonic(), 0
        while (code := process.poll()) is None:
            signals = self._hand_on(process, signals)
            if time.monotonic() - beat >= HEARTBEAT_S:
                beat = time.monotonic()
                if not self.ledger.beat(trial):
                    return None
            time.sleep(_POLL_S)
        return code

    def _hand_on(self, process: Running, sent: int) -> int:
        """Ask the training to save and stop at the first signal, kill it at the second; returns the signals so far."""
        number = self.stop.count
        if number > sent:
            if sent or number > 1:
                process.kill()
            else:
                logger.warning("stopping: the trial saves its last step first; once more ends it at once")
                process.send_signal(signal.SIGTERM)
        return number

    def _record(self, slot: int, trial: Trial, found: Outcome, seconds: float) -> None:
        if found.error is not None:
            self.ledger.fail(trial, found.error)
            logger.warning("trial %d failed: %s", slot, found.error)
        else:
            self.ledger.finish(trial, found.evaluations, seconds)
            goal = self.plan.goal
            logger.info("trial %d: %s %.4g", slot, goal.metric, found.evaluations[-1][goal.metric])
        _write(self.ledger)


class _StopRequests:
    """The signals that ask the sweep to stop; as a context it handles them."""

    def __init__(self) -> None:
        self.received = 0
        """Number of the first signal; 0 for none."""
        self.count = 0
        self._previous: dict[signal.Signals, Any] = {}

    def wait(self, seconds: float) -> None:
        """Wait, or less long where a signal comes."""
        deadline = time.monotonic() + seconds
        while not self.received and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        self.received = self.received or number
        self.count += 1

    def __enter__(self) -> _StopRequests:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._receive) for number in _STOPPING}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _write(ledger: Ledger) -> Results:
    """Write results and page as the study has them now."""
    from mindspeed_simpo.studies.sweep.report import write_report

    results = collect(ledger.plan, ledger.trials(), ledger.name)
    with alone(ledger.plan.folder / ".report.lock"):
        write_json(results, ledger.plan.folder / "sweep.json")
        write_report(results, ledger.plan.folder / "index.html")
    return results
