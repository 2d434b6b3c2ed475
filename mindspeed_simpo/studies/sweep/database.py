"""The database of a sweep: the storage of Optuna by URL, and the study in it."""

from __future__ import annotations

import fcntl
import time
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
_TRIES = 4


def lock_file(url: str, folder: Path) -> Path:
    """The file whose lock a process holds while it changes the study.

    SQLite has no locks of rows: two processes that read that a trial waits could both take it. Its lock file lies
    beside the database. A database server has them; the file in the sweep's folder then avoids spare trials only.

    Raises:
        ConfigError: where the URL is wrong, or the folder of the SQLite file is absent.
    """
    from sqlalchemy import make_url
    from sqlalchemy.exc import ArgumentError

    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ConfigError(f"--storage: cannot open the database: {_first_line(error)}") from None
    if parsed.get_backend_name() != "sqlite" or not parsed.database:
        return folder / ".sweep.lock"
    path = Path(parsed.database).absolute()
    if not path.parent.is_dir():
        raise ConfigError(f"--storage: cannot open the database: {path.parent} is no folder")
    return path.with_name(f".{path.name}.lock")


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


def open_study(storage: RDBStorage, name: str, plan: Plan, url: str) -> Study:
    """The study, which is made where it is absent.

    Raises:
        ConfigError: where the study is of another sweep or of another program.
    """
    import optuna

    direction = plan.goal.direction
    study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)  # type: ignore[arg-type]
    identity, stored = plan.identity(), study.user_attrs.get("sweep")
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
    return study


def _differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    absent = "none"
    names = [name for name in dict.fromkeys([*theirs, *ours]) if theirs.get(name, absent) != ours.get(name, absent)]
    return ", ".join(f"{name}: {theirs.get(name, absent)} (now {ours.get(name, absent)})" for name in names)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """The body runs in one process at a time, of those that can lock the file ``path``."""
    with path.open("w", encoding="utf-8") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
