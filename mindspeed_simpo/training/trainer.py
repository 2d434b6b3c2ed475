"""The training loop: updates, evaluations, checkpoints and metrics lines."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from signal import Signals
from typing import Any

import torch
import yaml
from torch import Tensor

from mindspeed_simpo.batch import PairBatch
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options import OutputOptions
from mindspeed_simpo.data.dataset import PairDataset, has_eval_data
from mindspeed_simpo.data.loader import PrefetchingLoader
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import ConfigError, TrainingError
from mindspeed_simpo.loss.reference import ReferenceTable
from mindspeed_simpo.loss.scoring import ScoredBatch
from mindspeed_simpo.parallel.collectives import fail_together
from mindspeed_simpo.training import checkpoint, not_finite
from mindspeed_simpo.training.base_model import check_base
from mindspeed_simpo.training.evaluation import mean_metrics
from mindspeed_simpo.training.metrics import MetricsWriter
from mindspeed_simpo.training.output import claimed
from mindspeed_simpo.training.progress import Progress, log_to_file
from mindspeed_simpo.training.reference_pass import UsedPairs, configured_tables
from mindspeed_simpo.training.resume import check_resumable, find_resumed
from mindspeed_simpo.training.run_facts import facts_of
from mindspeed_simpo.training.session import Session, on_every_rank, open_session
from mindspeed_simpo.training.stepper import Stepper
from mindspeed_simpo.training.stop import StopRequests

logger = logging.getLogger(__name__)


def train(config: Config, device: Device) -> int:
    """Train, and write metrics, checkpoints and the model to ``output_dir``.

    Args:
        config: A validated configuration.
        device: The opened device of this rank.

    Returns:
        Exit code: 0, or 128 + N where signal N stopped the run, which then has a checkpoint of its last step.

    Raises:
        SimpoError: on every rank; files that are already complete remain valid.
    """
    with open_session(config, device) as session, ExitStack() as stack:
        config = session.config
        root = Path(config.output_dir)
        stack.enter_context(claimed(root, session.groups))
        resumed = find_resumed(root, config.load, session.groups)
        train_data = session.prepare("train")
        eval_data = session.prepare("eval") if has_eval_data(config) and config.eval_iters != 0 else None
        order = session.loader(train_data)
        train_iters = config.train_iters
        if train_iters is None:
            train_iters = (config.num_train_epochs or 1) * order.steps_per_epoch
        used = UsedPairs(train_data, order.train_pairs(resumed[1].step if resumed else 0, train_iters))
        used_of_eval = None
        if eval_data is not None:
            used_of_eval = UsedPairs(eval_data, session.loader(eval_data).eval_pairs(config.eval_iters))
        tables = configured_tables(session, config, [used, used_of_eval])
        models = session.backend.for_training()
        stepper = session.backend.stepper(models, train_iters)
        run = Run(session, config, models, stepper, train_data, eval_data, tables, train_iters)
        if resumed is not None:
            run.resume(*resumed)
        with fail_together(session.groups.control):
            if session.is_main:
                run.open_outputs(stack, resumed_step=run.step if resumed else None)
        return run.fit()


class Run:
    """A training run: its parts, and the current step."""

    def __init__(
        self,
        session: Session,
        config: Config,
        models: list[torch.nn.Module],
        stepper: Stepper,
        train_data: PairDataset,
        eval_data: PairDataset | None,
        tables: Sequence[ReferenceTable | None],
        train_iters: int,
    ) -> None:
        """Assemble the run. ``config`` is recorded in the checkpoints and in ``config.yaml``."""
        self.session, self.recorded = session, config
        self.options: OutputOptions = config
        self.models, self.stepper, self.train_data = models, stepper, train_data
        self.train_iters = train_iters
        self.schedule = session.schedule(models, tables[0])
        self.eval_schedule = session.schedule(models, tables[1])
        self.order = session.loader(train_data)
        self.train_loader = PrefetchingLoader(self.order)
        self.eval_loader = session.loader(eval_data) if eval_data is not None else None
        self.facts = facts_of(
            config,
            device=session.device.name,
            ranks=session.groups.world.size(),
            train_pairs=len(train_data),
            eval_pairs=None if eval_data is None else len(eval_data),
        )
        self.root = Path(config.output_dir)
        self.checkpoints = checkpoint.CheckpointWriter(
            self.root / "checkpoints",
            session.groups,
            session.device,
            config.save_total_limit,
            in_background=config.async_save,
        )
        self.timeout_minutes = config.distributed_timeout_minutes
        self.writer: MetricsWriter | None = None
        self.progress: Progress | None = None
        self.step = 0
        self.unlogged_seconds: list[float] = []
        """Host time of each step since the last metrics line."""

    @property
    def consumed_pairs(self) -> int:
        """Number of pairs of all steps so far."""
        return self.order.consumed_pairs(self.step)

    def resume(self, folder: Path, state: checkpoint.TrainingState) -> None:
        """Continue from a verified checkpoint.

        Raises:
            CheckpointError: on every rank, where the objective, the data, the precision or the model differ from those
                of the checkpoint.
        """
        with fail_together(self.session.groups.control):
            check_resumable(folder, state, self.recorded, self.train_data.fingerprint)
            check_base(folder, state.base, self.session.base)
        checkpoint.load(folder, self.models, self.stepper, self.session.groups, self.session.device)
        self.session.running.load(state.running)
        self.step = state.step
        logger.info("resumed from %s at step %d", folder, self.step)

    def open_outputs(self, stack: ExitStack, resumed_step: int | None) -> None:
        """Open the output files and the progress display; on the main rank only.

        Args:
            stack: Closes the files and the display.
            resumed_step: Step of the loaded checkpoint; None for a new run.

        Raises:
            ConfigError: where a file cannot be written.
        """
        resolved = self.recorded.model_dump()
        text = yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True)
        try:
            (self.root / "config.yaml").write_text(text, encoding="utf-8")
            stack.enter_context(log_to_file(self.root / "run.log"))
            self.writer = stack.enter_context(MetricsWriter(self.options, resolved, resumed_step))
        except OSError as error:
            raise ConfigError(f"output_dir: cannot write in {self.root}: {error}") from None
        self.progress = stack.enter_context(Progress(self.train_iters, self.step))

    def fit(self) -> int:
        """Train from the current step to ``train_iters``, with evaluations, checkpoints and the export.

        Returns:
            Exit code: 0, or 128 + N where signal N asked to stop.
        """
        options = self.options
        if self.step >= self.train_iters:
            logger.warning("nothing to train: the checkpoint is at step %d of %d", self.step, self.train_iters)
        if self.step == 0:
            self.evaluate()
        with StopRequests(self.session.groups.control, self.timeout_minutes) as requests:
            while self.step < self.train_iters:
                last = self.step + 1 == self.train_iters
                self.train_step(logged=last or (self.step + 1) % options.log_interval == 0)
                stop = requests.agreed() if not last else None
                if last or (options.eval_interval and self.step % options.eval_interval == 0 and stop is None):
                    self.evaluate()
                if last or stop or (options.save_interval and self.step % options.save_interval == 0):
                    self.save()
                if stop is not None:
                    return self._stopped(stop)
            self.checkpoints.wait()
        if options.export_hf:
            self.session.export(self.root / "hf", False, self.state(), self.root)
        return 0

    def _stopped(self, signal: Signals) -> int:
        self.checkpoints.wait()
        logger.warning("stopped by %s after step %d, which is saved; load: auto goes on", signal.name, self.step)
        return 128 + signal

    def train_step(self, *, logged: bool) -> None:
        """Run one update.

        Args:
            logged: Whether to write a metrics line, which forces a host synchronisation.

        Raises:
            TrainingError: where the loss or the gradient norm is not finite; the parameters are then not changed.
        """
        begin = time.perf_counter()
        session = self.session
        num_pairs = self.order.num_pairs(self.consumed_pairs)
        micro_batches = self.train_loader.train_step(self.consumed_pairs)
        self.stepper.zero_grad()
        scored = self.schedule.forward_backward(micro_batches, num_pairs, self.step)
        sums = session.metric_sums.reduce(session.metric_sums.local(scored))
        squared_norm = self.stepper.squared_norm()
        if not self._is_finite(sums[0], squared_norm.squeeze(), logged=logged):
            self.stop_not_finite("loss" if not sums[0].isfinite() else "gradient norm", micro_batches, scored)
        learning_rate = self.stepper.update(squared_norm)
        session.running.update(scored)
        self.step += 1
        totals = session.metric_sums.totals(sums) if logged else None
        self.unlogged_seconds.append(time.perf_counter() - begin)
        if totals is not None:
            # the wait of this step includes the queued device work of the unlogged steps before it
            seconds = statistics.fmean(self.unlogged_seconds)
            self.unlogged_seconds.clear()
            self.report(
                {
                    "step": self.step,
                    "split": "train",
                    **totals.means,
                    "grad_norm": squared_norm.item() ** 0.5,
                    "learning_rate": learning_rate,
                    "consumed_pairs": self.consumed_pairs,
                    "pairs_per_second": totals.pairs / seconds,
                    "tokens_per_second": totals.tokens / seconds,
                    "peak_memory_bytes": session.device.peak_memory_bytes(),
                    "step_seconds": seconds,
                }
            )

    def _is_finite(self, *numbers: Tensor, logged: bool) -> bool:
        """Whether all numbers are finite; only a ``logged`` step forces a host synchronisation.

        Without one the result is True, and the device itself stops before it updates the parameters.
        """
        finite = torch.stack([number.isfinite() for number in numbers]).all()
        if logged:
            return bool(finite)
        try:
            self.session.device.assert_async(
                finite,
                f"step {self.step + 1}: the loss or the gradient norm is not finite; resume from the last checkpoint "
                "with a lower lr, and with log_interval: 1 to have the pairs of that step written",
            )
        except RuntimeError:  # on a CPU the assertion raises immediately
            return False
        return True

    def evaluate(self) -> None:
        """Evaluate the held-out pairs, where there are any, and write a metrics line."""
        if self.eval_loader is None:
            return
        begin = time.perf_counter()
        for model in self.models:
            model.eval()
        values = mean_metrics(self.session, self.eval_schedule, self.eval_loader, self.options.eval_iters)
        for model in self.models:
            model.train()
        line = {"step": self.step, "split": "eval", **values, "consumed_pairs": self.consumed_pairs}
        self.report(line | {"step_seconds": time.perf_counter() - begin})

    def state(self) -> checkpoint.TrainingState:
        """The state of the current step apart from parameters, optimizer and random state."""
        return checkpoint.TrainingState(
            step=self.step,
            consumed_pairs=self.consumed_pairs,
            data_fingerprint=self.train_data.fingerprint,
            running=self.session.running.state(),
            base=self.session.base,
            facts=self.facts,
            config=self.recorded,
        )

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        self.checkpoints.save(self.state(), self.models, self.stepper)

    def report(self, line: dict[str, Any]) -> None:
        """Show and write a metrics line; does nothing except on the main rank.

        Raises:
            TrainingError: where the line cannot be written.
        """
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
        """Write the pairs of the batch to a file and raise on all ranks.

        Raises:
            TrainingError: always, on every rank.
        """
        step, groups = self.step + 1, self.session.groups
        reports = not_finite.gather(micro_batches, scored, groups)
        path = self.root / f"not_finite_step_{step:07d}.json"
        with fail_together(groups.control):
            if self.session.is_main:
                not_finite.write_pairs(path, step, reports, self.train_data)
        ranks = ", ".join(str(report.rank) for report in reports)
        raise on_every_rank(
            TrainingError(
                f"step {step}: {what} is not finite on rank {ranks}; the pairs of that batch are in {path}. Nothing of "
                "this step was saved: resume from the last checkpoint with a lower lr, or without these pairs"
            )
        )
