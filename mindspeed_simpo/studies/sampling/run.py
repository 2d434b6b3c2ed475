"""A sampling run: prompts, answers, scores, pairs. Each part goes on where an earlier start of the run ended."""

from __future__ import annotations

import json
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.problems import ExampleError, first_line
from mindspeed_simpo.errors import ConfigError, DataError, ModelError
from mindspeed_simpo.studies.sampling.engines import Engines
from mindspeed_simpo.studies.sampling.generators.vllm import VllmGenerator
from mindspeed_simpo.studies.sampling.journal import Journal, check_facts, claimed
from mindspeed_simpo.studies.sampling.prompts import PromptSet, Rendering, read_prompts
from mindspeed_simpo.studies.sampling.record import Answer, Candidates, SamplingPrompt
from mindspeed_simpo.studies.sampling.report import Report
from mindspeed_simpo.studies.sampling.rows import PairRows
from mindspeed_simpo.studies.sampling.selection import Scored, select
from mindspeed_simpo.studies.sampling.settings import SamplingSettings
from mindspeed_simpo.studies.whole_file import write_whole
from mindspeed_simpo.training.progress import counting, set_up_logging

logger = logging.getLogger(__name__)


def sample(config: Config, settings: SamplingSettings) -> dict[str, Any]:
    """Sample answers to prompts, score them, and write the pairs of best and worst answer.

    Args:
        config: Of the training that the pairs are for: model, tokenizer, template, ``seq_length``, ``seed``, device.
        settings: The flags of the run.

    Returns:
        The counts and means of the report.

    Raises:
        SimpoError: where data, model, server or scorer fail; what is done so far is kept. Where no pair is left.
    """
    set_up_logging(is_main=True)
    if config.init_from == "config":
        raise ConfigError(
            "init_from: config starts from random weights, which have no answers to sample: set init_from: weights "
            "and model_name_or_path to a model with weights"
        )
    output = Path(settings.output).expanduser()
    work = output.with_name(output.name + ".work")
    with claimed(work):
        run = _Run(config, settings)
        with closing(Journal(work / "answers.jsonl")) as answers, closing(Journal(work / "scores.jsonl")) as scores:
            run.score(answers, scores, begun=run.generate(answers))
            report = run.select(answers, scores, output)
    for line in report.lines():
        logger.info("%s", line)
    return report.as_dict() | {"output": str(output)}


@dataclass(frozen=True)
class _Sifted:
    """The answers to one prompt, sifted."""

    kept: list[int] = field(default_factory=list)
    """Places of the different answers that training would take."""
    tokens: list[int] = field(default_factory=list)
    """Of these, in training."""
    duplicates: int = 0
    empty: int = 0
    refused: list[str] = field(default_factory=list)
    """Why training would refuse answers."""


class _Run:
    """The parts of a run that share its settings."""

    def __init__(self, config: Config, settings: SamplingSettings) -> None:
        self._config, self._settings = config, settings
        self._engines = Engines(config, settings)
        self._rendering = Rendering(config, self._engines.tokenizer, self._engines.images)
        self._set: PromptSet = read_prompts(config, settings, self._rendering)

    def generate(self, journal: Journal) -> str:
        """Generate the answers that the journal does not have; returns the identity of its beginning."""
        prompts, engines = self._set.prompts, self._engines
        facts = engines.generator_facts() | {"prompts (digest)": self._set.digest}
        begun = check_facts(journal.path.with_suffix(".json"), facts, journal)
        missing = frozenset(prompt.index for prompt in prompts if prompt.index not in journal)
        if not missing:
            return begun
        engines.check_scorer()
        logger.info("%d answers each to %d prompts, by %s", self._settings.n, len(missing), engines.kind)
        generator = engines.generator(self._rendering.end_of_turn_id)
        with counting("sampling", len(missing), shown=True) as advance, self._memory_named():
            for index, answers in generator.answers(prompts, missing):
                if index in missing and index not in journal:
                    journal.add(index, {"answers": [[answer.text, answer.cut] for answer in answers]})
                    advance()
        journal.sync()
        if isinstance(generator, VllmGenerator):
            generator.close()
        return begun

    def score(self, answers: Journal, scores: Journal, begun: str) -> None:
        """Score the different answers to each prompt that the journal of scores does not have."""
        facts = self._engines.scorer_facts() | {"scorer_columns (digest)": self._set.columns_digest, "answers": begun}
        check_facts(scores.path.with_suffix(".json"), facts, scores)
        missing = [prompt for prompt in self._set.prompts if prompt.index not in scores]
        if not missing:
            return
        sifted: deque[tuple[int, _Sifted]] = deque()
        single: deque[tuple[int, _Sifted]] = deque()

        def items() -> Iterator[Candidates]:
            for prompt in missing:
                found = _answers(answers, prompt.index)
                kept = self._sift(prompt, found)
                (sifted if len(kept.kept) > 1 else single).append((prompt.index, kept))
                if len(kept.kept) > 1:
                    yield Candidates(prompt, [found[place].text for place in kept.kept])

        with counting("scoring", len(missing), shown=True) as advance, self._memory_named():
            for values in self._engines.scorer().scores(items()):
                index, kept = sifted.popleft()
                scores.add(index, {**vars(kept), "scores": values})
                advance()
            for index, kept in single:
                scores.add(index, {**vars(kept), "scores": [None] * len(kept.kept)})
                advance()
        scores.sync()

    def select(self, answers: Journal, scores: Journal, output: Path) -> Report:
        """Write the pairs and count what became of prompts and answers.

        Raises:
            DataError: where no pair is left.
        """
        found = self._set
        report = Report(found.rows, found.unusable, found.too_long, found.duplicates, len(found.prompts))
        rows = PairRows(self._config.map_keys, self._rendering)
        lines = []
        for prompt in found.prompts:
            row = self._pair(prompt, _answers(answers, prompt.index), scores[prompt.index], rows, report)
            if row is not None:
                lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        if not lines:
            advice = "; --cut-answers keep lets them be chosen, a larger --max-new-tokens ends more of them"
            raise DataError(
                "no pair is left, and nothing was written:\n"
                + "\n".join(f"  {line}" for line in report.lines())
                + (f"\nMost answers were cut{advice}." if 2 * report.cut_answers > report.answers else "")
            )
        write_whole(output, "".join(lines))
        return report

    def _pair(
        self, prompt: SamplingPrompt, found: Sequence[Answer], record: Any, rows: PairRows, report: Report
    ) -> dict[str, Any] | None:
        settings = self._settings
        _count(report, found, record)
        places = [
            (place, Scored(score, tokens, found[place].cut))
            for place, tokens, score in zip(record["kept"], record["tokens"], record["scores"], strict=True)
            if score is not None and not (found[place].cut and settings.cut_answers == "drop")
        ]
        pair = select(
            [scored for _, scored in places],
            min_gap=settings.min_gap,
            max_length_ratio=settings.max_length_ratio,
            cut_may_be_chosen=settings.cut_answers == "keep",
        )
        if isinstance(pair, str):
            setattr(report, pair, getattr(report, pair) + 1)
            return None
        (chosen, better), (rejected, worse) = (places[place] for place in pair)
        further: dict[str, Any] = {
            "score_chosen": better.score,
            "score_rejected": worse.score,
            "source": prompt.source,
        }
        if settings.keep_answers:
            of_place = dict(zip(record["kept"], record["scores"], strict=True))
            further["all_answers"] = [
                {"text": answer.text, "cut": answer.cut, "score": of_place.get(place)}
                for place, answer in enumerate(found)
            ]
        try:
            row, tokens = rows.row(prompt, found[chosen].text, found[rejected].text, further)
        except ExampleError as error:
            report.refused += 1
            report.refuse(error.message)
            return None
        report.add_pair(
            chosen_tokens=tokens[0],
            rejected_tokens=tokens[1],
            chosen_score=better.score,
            rejected_score=worse.score,
            gap=better.score - worse.score,
        )
        return row

    @contextmanager
    def _memory_named(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ModelError(
                f"out of memory: {first_line(error)}\n"
                f"Lower --batch-size, which is {self._settings.batch_size}; what is done so far is kept."
            ) from None

    def _sift(self, prompt: SamplingPrompt, answers: Sequence[Answer]) -> _Sifted:
        """The different answers that training would take. Of equal texts the first that was not cut counts."""
        kept: dict[str, tuple[int, int]] = {}
        duplicates = empty = 0
        refused = []
        for place, answer in sorted(enumerate(answers), key=lambda item: item[1].cut):
            text = answer.text.strip()
            if not text:
                empty += 1
            elif text in kept:
                duplicates += 1
            else:
                try:
                    kept[text] = place, self._rendering.answer_tokens(prompt.prompt, answer.text)
                except ExampleError as error:
                    refused.append(error.message)
        ordered = sorted(kept.values())
        return _Sifted([place for place, _ in ordered], [tokens for _, tokens in ordered], duplicates, empty, refused)


def _count(report: Report, found: Sequence[Answer], record: Any) -> None:
    report.answers += len(found)
    report.cut_answers += sum(answer.cut for answer in found)
    report.duplicate_answers += record["duplicates"]
    report.empty_answers += record["empty"]
    report.unusable_answers += len(record["refused"])
    if len(record["kept"]) > 1:
        report.unscored_answers += sum(score is None for score in record["scores"])
    for reason in record["refused"]:
        report.refuse(reason)


def _answers(journal: Journal, index: int) -> list[Answer]:
    return [Answer(text, cut) for text, cut in journal[index]["answers"]]
