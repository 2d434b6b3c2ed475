"""The database of a sweep: the storage of Optuna by URL, and the study in it."""

from __future__ import annotations

import fcntl
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.studies.sweep.plan import Plan

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import RDBStorage

HEARTBEAT_S = 20
"""Seconds between two signs of life of a running trial."""
GRACE_S = 90
"""Seconds without a sign of life after which a process of another host counts as dead."""
JOIN_S = 3.0
"""Seconds that a process waits for the one that sets a new study up to go on with it."""
_TRIES = 4


def open_storage(url: str) -> RDBStorage:
    """The storage of a database, whose tables are made where they are absent.

    Raises:
        ConfigError: where the database cannot be opened.
    """
    import optuna
    from sqlalchemy.exc import ArgumentError, SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # processes of one sweep write to one file
    settings = {"connect_args": {"timeout": 60}} if url.startswith("sqlite:") else {}
    for attempt in range(_TRIES):
        try:
            return optuna.storages.RDBStorage(
                url,
                engine_kwargs=settings,
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
        except (ArgumentError, ImportError, ValueError) as error:
            raise ConfigError(f"--storage: cannot open the database: {_first_line(error)}") from None
        except SQLAlchemyError as error:  # two processes that create the tables at the same moment
            if attempt + 1 == _TRIES:
                raise ConfigError(f"--storage: cannot open the database: {_first_line(error)}") from None
            time.sleep(0.2 * (attempt + 1))
    raise AssertionError


def open_study(storage: RDBStorage, name: str, plan: Plan, url: str) -> tuple[Study, bool]:
    """The study, and whether this process created it.

    Raises:
        ConfigError: where the study is of another sweep or of another program.
    """
    import optuna

    identity, created = plan.identity(), True
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction=plan.goal.direction)  # type: ignore[arg-type]
    except optuna.exceptions.DuplicatedStudyError:
        study, created = optuna.load_study(storage=storage, study_name=name), False
    if created:
        study.set_user_attr("sweep", identity)
        return study, True
    begin = time.monotonic()
    while (stored := study.user_attrs.get("sweep")) is None and time.monotonic() - begin < JOIN_S:
        time.sleep(0.1)  # the process that created it is about to
    where = f"the study {name!r} of {'this database' if '@' in url else url}"
    if stored is None and study.get_trials(deepcopy=False):
        raise ConfigError(f"--study-name: {where} is of another program: give another name")
    if stored is None:
        study.set_user_attr("sweep", identity)
    elif stored != identity:
        raise ConfigError(
            f"{where} was begun with {_differences(stored, identity)}; a sweep goes on with the same. Give the same, "
            "or begin another sweep by another --output-dir or --study-name"
        )
    return study, False


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    absent = "none"
    names = [name for name in dict.fromkeys([*theirs, *ours]) if theirs.get(name, absent) != ours.get(name, absent)]
    return ", ".join(f"{name}: {theirs.get(name, absent)} (now {ours.get(name, absent)})" for name in names)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


@contextmanager
def quiet() -> Iterator[None]:
    """The body runs without Optuna's warnings that heartbeats and retries may change in a later version."""
    from optuna.exceptions import ExperimentalWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        yield


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """The body runs in one process at a time, of those that can lock the file ``path``."""
    with path.open("w", encoding="utf-8") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
