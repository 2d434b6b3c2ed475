"""The run of an analysis: score the pairs with one model after the other, then write the files."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.data.paths import Part
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import ConfigError, DataError
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.parallel.collectives import fail_together
from mindspeed_simpo.studies.analysis import scoring
from mindspeed_simpo.studies.analysis.contenders import Contender, contender_of, rival_of
from mindspeed_simpo.studies.analysis.history import read_metrics
from mindspeed_simpo.studies.analysis.report import FILES, write_analysis
from mindspeed_simpo.studies.analysis.scores import Measured, Pairs, PairScores, ShownAnswers
from mindspeed_simpo.studies.analysis.statistics import extremes
from mindspeed_simpo.training.evaluation import load_configured
from mindspeed_simpo.training.reference_pass import UsedPairs, configured_tables
from mindspeed_simpo.training.session import build_session, on_every_rank, open_groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What is asked of an analysis beside the configuration."""

    against: str | None = None
    """See :func:`~mindspeed_simpo.studies.analysis.contenders.rival_of`; None for no second model."""
    output: str | None = None
    """Folder to write; None for ``analysis`` in the run's output folder."""
    part: Part = "eval"
    """Part of the data."""
    max_pairs: int | None = None
    """Pairs that are scored, evenly spaced over the data set; None for all."""
    shown_pairs: int = 10
    """Hardest, and most confident, pairs that are shown with their text."""


@dataclass(frozen=True)
class _Passed:
    """What the pass of one model leaves, on every rank."""

    data: PairDataset
    indices: Int64[np.ndarray, " pair"]
    scores: PairScores
    shown: dict[int, ShownAnswers]
    """By position among the scored pairs."""
    extremes: tuple[list[int], list[int]]
    step: int | None


def analyse(config: Config, device: Device, request: Request) -> Path:
    """Score the pairs, by one model or by two in turn, and write numbers and page.

    Only one model is in memory at a time.

    Args:
        config: A validated configuration.
        device: The opened device of this rank.
        request: What else is asked.

    Returns:
        The folder.

    Raises:
        SimpoError: on every rank.
    """
    with open_groups(config, device) as groups:
        contenders = [contender_of(config, groups)]
        if request.against is not None:
            contenders.append(rival_of(request.against, config, groups))
        folder = _open_folder(request, contenders[0], groups)
        first = _score(contenders[0], device, groups, request, None)
        passed = [first]
        for contender in contenders[1:]:
            gc.collect()  # modules with hooks are cycles, and hold the first model
            passed.append(_score(contender, device, groups, request, first))
        with fail_together(groups.control):
            if groups.world.rank() == 0:
                _write(folder, contenders, passed)
    logger.info("analysis: %s", folder / FILES[-1])
    return folder


def _open_folder(request: Request, contender: Contender, groups: Groups) -> Path:
    """The folder, made before the pairs are scored."""
    run = contender.run or Path(contender.config.output_dir)
    folder = Path(request.output) if request.output is not None else run / "analysis"
    with fail_together(groups.control):
        if groups.world.rank() == 0:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                probe = folder / ".probe"
                probe.touch()
                probe.unlink()
            except OSError as error:
                raise ConfigError(f"cannot write in {folder}: {error.strerror}; give another --output") from None
    return folder


def _score(contender: Contender, device: Device, groups: Groups, request: Request, first: _Passed | None) -> _Passed:
    """One model's pass; with ``first``, over the pairs of the pass before, and with the text of the same pairs."""
    session = build_session(contender.config, device, groups)
    data = session.prepare(request.part)
    if first is not None and not np.array_equal(data.report.kept_rows, first.data.report.kept_rows):
        raise on_every_rank(
            DataError(
                f"--against: {request.against} leaves other pairs of the data, {len(data)} and not {len(first.data)}: "
                "its tokenizer or chat template makes some of them too long or unusable; give a longer seq_length"
            )
        )
    loader = session.loader(data)
    # of a mixture, which pairs an evaluation draws depends on the seed of the run
    pairs = first.indices if first is not None else _spaced(np.unique(loader.eval_pairs()), request.max_pairs)
    [table] = configured_tables(session, session.config, [UsedPairs(data, pairs)])
    loaded = load_configured(session)
    schedule = session.schedule(session.backend.for_scoring(), table)
    scores = scoring.score_pairs(session, schedule, loader, pairs)
    chosen = first.extremes if first is not None else extremes(scores.margin, request.shown_pairs)
    positions = sorted({*chosen[0], *chosen[1]})
    shown: dict[int, ShownAnswers] = {}
    if positions:
        logprobs = scoring.token_logprobs(session, schedule, loader, pairs[positions])
        answers = scoring.shown_answers(session, data, logprobs)
        shown = {position: answers[int(pairs[position])] for position in positions}
    return _Passed(data, pairs, scores, shown, chosen, loaded[1].step if loaded is not None else None)


def _spaced(pairs: Int64[np.ndarray, " pair"], wanted: int | None) -> Int64[np.ndarray, " kept"]:
    if wanted is None or wanted >= len(pairs):
        return pairs
    return pairs[np.arange(wanted) * len(pairs) // wanted]


def _write(folder: Path, contenders: list[Contender], passed: list[_Passed]) -> None:
    first = passed[0]
    indices = first.indices.tolist()
    source_of = np.array([first.data.source_of(index) for index in indices])
    pairs = Pairs(first.indices, [first.data[index].source for index in indices], first.data.sources, source_of)
    measured = []
    for contender, one, label in zip(contenders, passed, _labels(contenders, passed), strict=True):
        objective = contender.config.objective
        measured.append(
            Measured(
                label=label,
                weights=_weights(contender, one.step),
                stage=objective.stage,
                title=objective.title,
                keys=contender.config.keys_of(objective).model_dump(),
                rewards=objective.rewards,
                step=one.step,
                history=read_metrics(contender.run / "metrics.jsonl") if contender.run is not None else (),
                scores=one.scores,
                shown=one.shown,
            )
        )
    write_analysis(folder, pairs, measured, first.extremes)


def _labels(contenders: Sequence[Contender], passed: Sequence[_Passed]) -> list[str]:
    """Names of the models, as short as tells them apart: by objective, folder, step, path."""
    forms: list[list[str]] = [[], [], [], []]
    for contender, one in zip(contenders, passed, strict=True):
        title, step = contender.config.objective.title, f", step {one.step}" if contender.run is not None else ""
        named = f"{title} ({contender.name})"
        labels = title if contender.run is not None else named, named, f"{title} ({contender.name}{step})"
        for form, label in zip(forms, (*labels, f"{title} ({contender.run or contender.name}{step})"), strict=True):
            form.append(label)
    return next((form for form in forms if len(set(form)) == len(form)), [f"{forms[0][0]} 1", f"{forms[0][0]} 2"])


def _weights(contender: Contender, step: int | None) -> str:
    if contender.run is None:
        return f"weights of {contender.config.model_name_or_path}"
    return f"step {step} of {contender.run}"
