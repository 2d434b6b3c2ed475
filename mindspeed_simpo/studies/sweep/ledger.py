"""The trials of a sweep in an Optuna study: which are to run, who runs them, what they gave.

Every trial of the plan has a number, its **slot**. Each slot has at least one trial of the study. An interrupted trial
is recorded as failed without an error, and another one of the same slot and the same parameters waits in its place: the
way of Optuna's retry callback. Which trial counts follows from the trials of the slot alone, so that processes that die
at any moment, or add a trial twice, lose nothing and run nothing twice:

- one that is complete counts;
- else the lowest-numbered one that waits or runs, the only one that a process may take;
- else the last one that failed with an error.
"""

from __future__ import annotations

import fcntl
import os
import random
import socket
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from mindspeed_simpo.studies.sweep.database import alone, lock_file, open_storage, open_study
from mindspeed_simpo.studies.sweep.plan import CHOSEN, Params, Plan

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.trial import FrozenTrial


class Ledger:
    """The study of one sweep, as one process sees it."""

    def __init__(self, plan: Plan, url: str, name: str) -> None:
        """Open the study, or create it.

        Args:
            plan: The checked sweep; its folder exists.
            url: Database, as SQLAlchemy names it.
            name: Name of the study in the database.

        Raises:
            ConfigError: where the database cannot be opened, or the study is of another sweep.
        """
        self.plan, self.name = plan, name
        self._lock_file = lock_file(url, plan.folder)
        with self._alone():
            self.storage = open_storage(url)
            self.study = open_study(self.storage, name, plan, url)
            self._fill()
        self._lock, self._owner = _sign_of_life(plan.folder)

    def close(self) -> None:
        """Give up the sign of life of this process, and the connections."""
        self._lock.close()
        Path(self._owner["lock"]).unlink(missing_ok=True)
        self.storage.remove_session()
        self.storage.engine.dispose()

    def trials(self) -> list[FrozenTrial | None]:
        """The trial that counts, for each slot; None for a slot that has none yet."""
        from optuna.trial import TrialState

        slots: list[list[FrozenTrial]] = [[] for _ in range(self.plan.size)]
        for trial in self.study.get_trials(deepcopy=False):
            slot = trial.user_attrs.get("slot", len(slots))
            if slot < len(slots):
                slots[slot].append(trial)
        found: list[FrozenTrial | None] = []
        for trials in slots:
            done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
            live = [trial for trial in trials if not trial.state.is_finished()]
            failed = [trial for trial in reversed(trials) if "error" in trial.user_attrs]
            found.append(next(iter(done + live + failed), None))
        return found

    def retry_failed(self) -> None:
        """Add a trial that waits for each slot that failed with an error."""
        with self._alone():
            for trial in self.trials():
                if trial is not None and trial.state.is_finished() and "error" in trial.user_attrs:
                    attributes = {"slot": trial.user_attrs["slot"]}
                    self.study.enqueue_trial(trial.params, user_attrs=attributes)

    def claim(self) -> tuple[int, Trial] | None:
        """Take the first trial that waits: its slot and the running trial; None where none waits.

        The change from waiting to running is atomic in the database: one process gets the trial. In SQLite it is not,
        and the lock of the file makes it so.
        """
        from optuna import Trial
        from optuna.trial import TrialState

        with self._alone():
            for slot, trial in enumerate(self.trials()):
                if trial is None or trial.state != TrialState.WAITING:
                    continue
                number = trial._trial_id
                with _unless_finished():
                    # before the change of state: a process that dies right after it leaves a trial that becomes stale
                    self.storage.record_heartbeat(number)
                    if self.storage.set_trial_state_values(number, TrialState.RUNNING):
                        self.storage.set_trial_user_attr(number, "owner", self._owner | {"trial": trial.number})
                        self.study.sampler = self._sampler(trial.number)
                        return slot, Trial(self.study, number)  # study.ask() would take any trial, or add one
        return None

    def parameters(self, trial: Trial) -> Params:
        """The parameters of a trial, drawn where they are not given.

        Processes draw one after the other, so that each sees what the others have drawn.
        """
        with self._alone():
            for name, choices in self.plan.choices.items():
                trial.suggest_categorical(name, choices)
            for key, found in self.plan.space.search.items():
                if found.whole:
                    trial.suggest_int(key, int(found.low), int(found.high), log=found.log)
                else:
                    trial.suggest_float(key, found.low, found.high, log=found.log)
        return {name: trial.params[name] for name in self.plan.space.parameters}

    def beat(self, trial: Trial) -> bool:
        """A sign of life; whether the trial is still this process's own."""
        self.storage.record_heartbeat(trial._trial_id)
        return not self.storage.get_trial(trial._trial_id).state.is_finished()

    def finish(self, trial: Trial, evaluations: Sequence[Mapping[str, Any]], seconds: float) -> None:
        """Record a trial that has trained to its end.

        Args:
            trial: The trial.
            evaluations: Lines of the split ``eval``, the first of step 0, the last of the last step.
            seconds: Time that the training took in this process.
        """
        goal = self.plan.goal
        first, last = evaluations[0], evaluations[-1]
        fall = first[CHOSEN] - last[CHOSEN]
        curve = [[line["step"], line.get(goal.metric), line[CHOSEN]] for line in evaluations]
        with _unless_finished():
            for name, value in {"fall": fall, "evaluations": curve, "final": dict(last), "seconds": seconds}.items():
                trial.set_user_attr(name, value)
            if goal.max_fall != float("inf") and not self.storage.get_trial(trial._trial_id).constraints:
                trial.set_constraint("logps_fall", fall - goal.max_fall)
            self.study.tell(trial, last[goal.metric])

    def fail(self, trial: Trial, error: str) -> None:
        """Record a trial that cannot be trained."""
        from optuna.trial import TrialState

        with _unless_finished():
            trial.set_user_attr("error", error)
            self.study.tell(trial, state=TrialState.FAIL)

    def release(self, trial_id: int) -> None:
        """Record a trial as interrupted, and have another one wait in its place."""
        from optuna.storages import RetryHeartbeatStaleTrialCallback
        from optuna.trial import TrialState

        with self._alone(), _unless_finished():
            self.storage.set_trial_state_values(trial_id, TrialState.FAIL)
            RetryHeartbeatStaleTrialCallback()(self.study, self.storage.get_trial(trial_id))

    def release_dead(self) -> None:
        """Release the trials of processes that have died: those of this host at once, others without a heartbeat."""
        from optuna.storages import fail_stale_trials
        from optuna.trial import TrialState

        for trial in self.trials():
            if trial is not None and trial.state == TrialState.RUNNING and self._is_dead(trial):
                self.release(trial._trial_id)
                if trial.user_attrs["owner"]["lock"] != self._owner["lock"]:
                    Path(trial.user_attrs["owner"]["lock"]).unlink(missing_ok=True)
        with self._alone():
            fail_stale_trials(self.study)
            self._fill()  # where a process died between the two halves of a release

    @property
    def is_finished(self) -> bool:
        """Whether no trial waits or runs."""
        return all(trial is not None and trial.state.is_finished() for trial in self.trials())

    def _is_dead(self, trial: FrozenTrial) -> bool:
        owner = trial.user_attrs.get("owner")
        # a trial that waited in the place of an interrupted one has the attributes of that one
        if owner is None or owner["trial"] != trial.number or owner["host"] != socket.gethostname():
            return False
        if owner["lock"] == self._owner["lock"]:
            return True  # this process calls `release_dead` while it runs no trial
        try:
            with Path(owner["lock"]).open("r+", encoding="utf-8") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # alive, or on a file system of its own: its heartbeat says
            return False
        return True

    def _sampler(self, number: int) -> Any:
        """A sampler whose draws depend on seed and trial alone, so that an interrupted sweep draws no value again."""
        from mindspeed_simpo.studies.sweep.sampler import UnseenSampler

        return UnseenSampler(self.plan, random.Random(f"{self.plan.base.seed} {number}").randrange(2**31))

    def _fill(self) -> None:
        """Add a trial that waits for each slot that has none."""
        combinations = [] if self.plan.trials else self.plan.combinations()
        for slot, trial in enumerate(self.trials()):
            if trial is None:
                params = combinations[slot] if combinations else {}
                self.study.enqueue_trial(params, user_attrs={"slot": slot})

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """One process at a time, and without Optuna's warnings that its heartbeats may change in a later version."""
        from optuna.exceptions import ExperimentalWarning

        with alone(self._lock_file), warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            yield


def _sign_of_life(folder: Path) -> tuple[IO[str], dict[str, str]]:
    """A locked file, which the system unlocks when this process ends, however it ends."""
    path = folder.absolute() / ".processes" / uuid.uuid4().hex
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.open("w", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # a file system without locks: heartbeats alone say who is alive
        path.unlink()
    return lock, {"host": socket.gethostname(), "process": str(os.getpid()), "lock": str(path)}


@contextmanager
def _unless_finished() -> Iterator[None]:
    """The body writes to a trial; it ends where the trial is finished already, because another process has taken it."""
    from optuna.exceptions import UpdateFinishedTrialError

    with suppress(UpdateFinishedTrialError):
        yield
