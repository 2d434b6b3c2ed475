"""The loop: batches in, updates, evaluations, checkpoints and metrics out."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml

from mindspeed_simpo.batch import PairBatch
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.dataset import PairDataset, has_eval_data
from mindspeed_simpo.data.loader import PairLoader, PreparedAhead
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import CheckpointError, ConfigError, TrainingError
from mindspeed_simpo.parallel.collectives import fail_together
from mindspeed_simpo.training import checkpoint, metrics, not_finite
from mindspeed_simpo.training.optimizer import Stepper, build_stepper, wrap_for_training, wrap_precision
from mindspeed_simpo.training.progress import Progress, log_to_file
from mindspeed_simpo.training.schedule import PairSchedule, ScoredBatch
from mindspeed_simpo.training.session import Session, open_session, reference_tables

logger = logging.getLogger(__name__)


def train(config: Config, device: Device) -> None:
    """Train as ``config`` says and leave its metrics, checkpoints and model in ``output_dir``.

    Raises:
        SimpoError: on every rank; what was written before stays whole.
    """
    with open_session(config, device) as session, ExitStack() as stack:
        with fail_together(session.groups.world):
            _claim_output(config, is_main=session.is_main)
        resumed = None
        with fail_together(session.groups.world):
            if config.load is not None:
                resumed = checkpoint.find(config.load)
        train_data = session.prepare("train")
        eval_data = session.prepare("eval") if _evaluates(config) else None
        tables = reference_tables(session, [train_data, eval_data])
        models = wrap_for_training(session.models, config)
        train_iters = config.train_iters
        if train_iters is None:
            train_iters = max(1, len(train_data) // config.global_batch_size)
        stepper = build_stepper(models, config, device, train_iters)
        run = Run(session, models, stepper, train_data, eval_data, tables, train_iters)
        if resumed is not None:
            run.resume(*resumed)
        with fail_together(session.groups.world):
            if session.is_main:
                run.open_outputs(stack, resumed_step=run.step if resumed else None)
        run.fit()


def evaluate(config: Config, device: Device) -> dict[str, float]:
    """Score all held-out pairs with the starting weights, or with those of ``load``.

    Returns:
        Mean over pairs of every metric, the same on every rank.
    """
    with open_session(config, device) as session:
        data = session.prepare("eval")
        [table] = reference_tables(session, [data])
        if config.load is not None:
            with fail_together(session.groups.world):
                folder, _ = checkpoint.find(config.load)
            checkpoint.load(folder, session.models, None, session.groups, device)
        schedule = session.schedule(wrap_precision(session.models, config), table)
        values = _evaluate(session, schedule, session.loader(data), None)
    if not math.isfinite(values["loss"]):
        weights = config.load or config.model_name_or_path
        raise _everywhere(TrainingError(f"the loss of the held-out pairs is not finite: see the weights of {weights}"))
    return values


class Run:
    """A training run between its first and its last step."""

    def __init__(
        self,
        session: Session,
        models: list[torch.nn.Module],
        stepper: Stepper,
        train_data: PairDataset,
        eval_data: PairDataset | None,
        tables: Sequence[Any],
        train_iters: int,
    ) -> None:
        """Put the parts together; nothing runs yet."""
        self.session, self.config = session, session.config
        self.models, self.stepper, self.train_data = models, stepper, train_data
        self.train_iters = train_iters
        self.schedule = session.schedule(models, tables[0])
        self.eval_schedule = session.schedule(models, tables[1])
        self.train_loader = PreparedAhead(session.loader(train_data))
        self.eval_loader = session.loader(eval_data) if eval_data is not None else None
        self.root = Path(self.config.output_dir)
        self.writer: metrics.MetricsWriter | None = None
        self.progress: Progress | None = None
        self.step = 0
        self.consumed_pairs = 0

    def resume(self, folder: Path, state: checkpoint.TrainingState) -> None:
        """Go on from a verified checkpoint."""
        if state.data_fingerprint != self.train_data.fingerprint or state.config.seed != self.config.seed:
            raise _everywhere(
                CheckpointError(
                    f"load: {folder} was written by a run on other data or another seed; the order of the pairs would "
                    "not go on where it stopped. Give the same data, tokenizer, seq_length and seed"
                )
            )
        if state.config.bf16 != self.config.bf16:
            raise _everywhere(
                CheckpointError(f"load: {folder} was written with bf16: {state.config.bf16}; go on with the same")
            )
        checkpoint.load(folder, self.models, self.stepper, self.session.groups, self.session.device)
        self.step, self.consumed_pairs = state.step, state.consumed_pairs
        logger.info("resumed from %s at step %d", folder, self.step)

    def open_outputs(self, stack: ExitStack, resumed_step: int | None) -> None:
        """Open the files and the display of the main rank."""
        text = yaml.safe_dump(self.config.model_dump(), sort_keys=False, allow_unicode=True)
        try:
            (self.root / "config.yaml").write_text(text, encoding="utf-8")
            stack.enter_context(log_to_file(self.root / "run.log"))
            self.writer = stack.enter_context(metrics.MetricsWriter(self.config, resumed_step))
        except OSError as error:
            raise ConfigError(f"output_dir: cannot write in {self.root}: {error}") from None
        self.progress = stack.enter_context(Progress(self.train_iters, self.step))

    def fit(self) -> None:
        """Train from the current step to the last one."""
        config = self.config
        if self.step >= self.train_iters:
            logger.warning("nothing to train: the checkpoint is at step %d of %d", self.step, self.train_iters)
        if self.step == 0:
            self.evaluate()
        while self.step < self.train_iters:
            line = self.train_step()
            if self.step % config.log_interval == 0 or self.step == self.train_iters:
                self.report(line)
            last = self.step == self.train_iters
            if last or (config.eval_interval and self.step % config.eval_interval == 0):
                self.evaluate()
            if last or (config.save_interval and self.step % config.save_interval == 0):
                self.save()
        if config.export_hf:
            self.session.export(self.root / "hf")

    def train_step(self) -> dict[str, Any]:
        """One update; returns its metrics line."""
        begin = time.perf_counter()
        micro_batches = self.train_loader.train_step(self.consumed_pairs)
        for model in self.models:
            model.zero_grad_buffer()  # type: ignore[operator]
        self.stepper.optimizer.zero_grad()
        scored = self.schedule.forward_backward(micro_batches, self.config.global_batch_size)
        session = self.session
        sums = metrics.reduce_sums(metrics.local_sums(scored, session.groups, session.device), session.groups)
        values = metrics.means(sums)
        if not math.isfinite(values["loss"]):
            self.stop_not_finite("loss", micro_batches, scored)
        grad_norm, learning_rate = self.stepper.step()
        if not math.isfinite(grad_norm):
            self.stop_not_finite("gradient norm", micro_batches, scored)
        self.step += 1
        self.consumed_pairs += self.config.global_batch_size
        seconds = time.perf_counter() - begin
        pairs, tokens = values.pop("pairs"), values.pop("tokens")
        return {
            "step": self.step,
            "split": "train",
            **values,
            "grad_norm": grad_norm,
            "learning_rate": learning_rate,
            "consumed_pairs": self.consumed_pairs,
            "pairs_per_second": pairs / seconds,
            "tokens_per_second": tokens / seconds,
            "peak_memory_bytes": session.device.peak_memory_bytes(),
            "step_seconds": seconds,
        }

    def evaluate(self) -> None:
        """Score the held-out pairs and write the line."""
        if self.eval_loader is None:
            return
        begin = time.perf_counter()
        for model in self.models:
            model.eval()
        values = _evaluate(self.session, self.eval_schedule, self.eval_loader, self.config.eval_iters)
        for model in self.models:
            model.train()
        line = {"step": self.step, "split": "eval", **values, "consumed_pairs": self.consumed_pairs}
        self.report(line | {"step_seconds": time.perf_counter() - begin})

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        state = checkpoint.TrainingState(
            step=self.step,
            consumed_pairs=self.consumed_pairs,
            data_fingerprint=self.train_data.fingerprint,
            config=self.config,
        )
        session = self.session
        folder = checkpoint.save(
            self.root / "checkpoints",
            state,
            self.models,
            self.stepper,
            session.groups,
            session.device,
            self.config.save_total_limit,
        )
        logger.info("saved %s", folder)

    def report(self, line: dict[str, Any]) -> None:
        """Show and write a metrics line, on the main rank."""
        if self.writer is None or self.progress is None:
            return
        try:
            self.writer.write(line)
        except OSError as error:
            raise TrainingError(
                f"step {self.step}: cannot write the metrics in {self.root}: {error}; resume from the last checkpoint"
            ) from None
        self.progress.show(line)

    def stop_not_finite(self, what: str, micro_batches: Sequence[PairBatch], scored: Sequence[ScoredBatch]) -> None:
        """Save the pairs of the batch to a file and stop all ranks.

        Raises:
            TrainingError: always, on every rank.
        """
        step, groups = self.step + 1, self.session.groups
        reports = not_finite.gather(micro_batches, scored, groups)
        path = self.root / f"not_finite_step_{step:07d}.json"
        with fail_together(groups.world):
            if self.session.is_main:
                not_finite.write_pairs(path, step, reports, self.train_data)
        ranks = ", ".join(str(report.rank) for report in reports)
        raise _everywhere(
            TrainingError(
                f"step {step}: {what} is not finite on rank {ranks}; the pairs of that batch are in {path}. Nothing of "
                "this step was saved: resume from the last checkpoint with a lower lr, or without these pairs"
            )
        )


def _evaluate(
    session: Session, schedule: PairSchedule, loader: PairLoader, max_batches: int | None
) -> dict[str, float]:
    total = metrics.local_sums([], session.groups, session.device)
    for micro_batches in loader.eval_steps(max_batches):
        total += metrics.local_sums(schedule.forward(micro_batches), session.groups, session.device)
    values = metrics.means(metrics.reduce_sums(total, session.groups))
    values.pop("tokens")
    values.pop("pairs")
    return values


def _evaluates(config: Config) -> bool:
    return has_eval_data(config) and config.eval_iters != 0


def _claim_output(config: Config, *, is_main: bool) -> None:
    root = Path(config.output_dir)
    earlier = checkpoint.complete(root / "checkpoints")
    if earlier and config.load is None:
        raise ConfigError(
            f"output_dir: {root} holds checkpoints of another run (newest {earlier[-1].name}); set load: {root} to go "
            "on with it, or another output_dir"
        )
    if is_main:
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output_dir: cannot make {root}: {error}") from None


def _everywhere(error: Any) -> Any:
    error.everywhere = True
    return error
