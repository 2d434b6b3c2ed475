"""What the main rank says of a run: files of lines, progress, alarms, answers, and the closing summary."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.errors import ConfigError, TrainingError
from mindspeed_simpo.training.checkpoint import folder_of
from mindspeed_simpo.training.metrics import JsonLines, MetricsWriter, json_number
from mindspeed_simpo.training.progress import Progress, log_to_file, warn
from mindspeed_simpo.training.watch import summary
from mindspeed_simpo.training.watch.alarms import Alarms
from mindspeed_simpo.training.watch.generation import Answer

logger = logging.getLogger(__name__)

_SHOWN_ANSWERS = 2
_SHOWN_CHARACTERS = 200


class Reporter:
    """Opens the output files of a run, and writes to them; on the main rank only.

    Args:
        config: The recorded configuration.
        train_iters: Steps of the run.
        resumed_step: Step of the loaded checkpoint; None for a new run.
        stack: Closes the files and the display.

    Raises:
        ConfigError: where a file cannot be written.
    """

    def __init__(self, config: Config, train_iters: int, resumed_step: int | None, stack: ExitStack) -> None:
        self._config, self._train_iters = config, train_iters
        self._root, self._first_step = Path(config.output_dir), resumed_step or 0
        self._begin = time.monotonic()
        resolved = config.model_dump()
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        try:
            summary.remove(self._root)
            (self._root / "config.yaml").write_text(text, encoding="utf-8")
            stack.enter_context(log_to_file(self._root / "run.log"))
            self._writer = stack.enter_context(MetricsWriter(config, resolved, resumed_step))
            self._samples = self._open_samples(resumed_step, stack)
        except OSError as error:
            raise ConfigError(f"output_dir: cannot write in {self._root}: {error}") from None
        self._alarms = Alarms(config, train_iters)
        self._alarms.replay(self._writer.earlier)
        self._raised = [line for line in self._writer.earlier if line["split"] == "alarm"]
        evaluations = [line for line in self._writer.earlier if line["split"] == "eval"]
        self._evaluations: list[Mapping[str, Any]] = [*evaluations[:1], *evaluations[1:][-1:]]
        self._progress = stack.enter_context(Progress(train_iters, self._first_step))

    def _open_samples(self, resumed_step: int | None, stack: ExitStack) -> JsonLines | None:
        path = self._root / "samples.jsonl"
        if not self._config.eval_generate and not path.exists():
            return None
        samples = JsonLines(path, resumed_step)
        stack.callback(samples.close)
        return samples

    def report(self, line: Mapping[str, Any], answers: Sequence[Answer] = ()) -> None:
        """Show and write a metrics line, the answers of its evaluation, and the alarms that it raises.

        Raises:
            TrainingError: where a line cannot be written.
        """
        alarms = self._alarms.read(line)
        try:
            self._writer.write(line)
            for answer in answers:
                assert self._samples is not None, "the file is open where answers are generated"
                self._samples.write({"step": line["step"], **asdict(answer)})
            for alarm in alarms:
                self._writer.write_alarm(alarm.line)
        except OSError as error:
            raise TrainingError(
                f"step {line['step']}: cannot write the metrics in {self._root}: {error}; resume from the last "
                "checkpoint"
            ) from None
        self._progress.show(line)
        for answer in answers[:_SHOWN_ANSWERS]:
            logger.info("answer to held-out prompt %d: %r", answer.index, _shortened(answer.answer))
        for alarm in alarms:
            warn(str(alarm))
        self._raised += [alarm.line for alarm in alarms]
        if line["split"] == "eval":
            written = {name: json_number(value) for name, value in line.items()}
            self._evaluations = [*self._evaluations[:1], written]

    def close(self, ending: summary.Ending, *, pairs: int, held_out_pairs: int, ranks: int) -> None:
        """Write and show the closing summary.

        Args:
            ending: How the run ended.
            pairs: Training pairs.
            held_out_pairs: Held-out pairs.
            ranks: Of the world.

        Raises:
            TrainingError: where the summary cannot be written.
        """
        self._progress.stop()
        facts = summary.Facts(
            self._config,
            self._root,
            self._train_iters,
            pairs,
            held_out_pairs,
            ranks,
            time.monotonic() - self._begin,
            self._first_step,
            partial(folder_of, self._root / "checkpoints"),
        )
        try:
            summary.close(facts, ending, self._evaluations, self._raised)
        except OSError as error:
            raise TrainingError(f"{self._root}: cannot write the summary: {error}; the model is saved") from None


def _shortened(text: str) -> str:
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
