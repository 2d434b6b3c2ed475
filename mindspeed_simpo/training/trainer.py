"""The training loop: updates, evaluations, checkpoints and metrics lines."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from signal import Signals

import torch

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.dataset import PairDataset, has_eval_data
from mindspeed_simpo.data.loader import PrefetchingLoader
from mindspeed_simpo.device import Device
from mindspeed_simpo.loss.reference import ReferenceTable
from mindspeed_simpo.parallel.collectives import fail_together
from mindspeed_simpo.training import checkpoint, not_finite
from mindspeed_simpo.training.base_model import check_base
from mindspeed_simpo.training.output import claimed
from mindspeed_simpo.training.reference_pass import UsedPairs, configured_tables
from mindspeed_simpo.training.resume import check_resumable, find_resumed, resumed_best
from mindspeed_simpo.training.run_facts import facts_of
from mindspeed_simpo.training.session import Session, open_session
from mindspeed_simpo.training.stepper import Stepper
from mindspeed_simpo.training.stop import StopRequests
from mindspeed_simpo.training.watch.best_model import BestModel
from mindspeed_simpo.training.watch.held_out import HeldOut
from mindspeed_simpo.training.watch.reporter import Reporter
from mindspeed_simpo.training.watch.required import check_held_out
from mindspeed_simpo.training.watch.summary import Ending

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
    check_held_out(config)
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
                run.reporter = Reporter(config, train_iters, run.step if resumed else None, stack)
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
        self.session, self.config = session, config
        self.models, self.stepper, self.train_data = models, stepper, train_data
        self.train_iters = train_iters
        self.schedule = session.schedule(models, tables[0])
        self.order = session.loader(train_data)
        self.train_loader = PrefetchingLoader(self.order)
        self.held_out = None if eval_data is None else HeldOut(session, models, eval_data, tables[1])
        self.facts = facts_of(
            config,
            device=session.device.name,
            ranks=session.groups.world.size(),
            train_data=train_data,
            eval_data=eval_data,
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
        self.reporter: Reporter | None = None
        """Of the main rank."""
        self.best = BestModel(session, self.checkpoints.root)
        self.evaluation_due = True
        """Whether the weights of this step are to be evaluated before the next one."""
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
            check_resumable(folder, state, self.config, self.train_data.order_fingerprint)
            check_base(folder, state.base, self.session.base)
        checkpoint.load(folder, self.models, self.stepper, self.session.groups, self.session.device)
        self.session.running.load(state.running)
        self.step, self.evaluation_due = state.step, state.evaluation_due
        self.best.state = resumed_best(self.checkpoints.root, state, self.config, self.session.groups)
        logger.info("resumed from %s at step %d", folder, self.step)

    def fit(self) -> int:
        """Train from the current step to ``train_iters``, with evaluations, checkpoints and the export.

        Returns:
            Exit code: 0, or 128 + N where signal N asked to stop.
        """
        config = self.config
        if self.step >= self.train_iters:
            logger.warning("nothing to train: the checkpoint is at step %d of %d", self.step, self.train_iters)
        if self.evaluation_due and self.evaluate():
            self.save()
        with StopRequests(self.session.groups.control, self.timeout_minutes) as requests:
            while self.step < self.train_iters and not self.best.stops_early:
                last = self.step + 1 == self.train_iters
                self.train_step(logged=last or (self.step + 1) % config.log_interval == 0)
                stop = requests.agreed() if not last else None
                self.evaluation_due = bool(last or (config.eval_interval and self.step % config.eval_interval == 0))
                improved = self.evaluate() if self.evaluation_due and stop is None else False
                due = bool(config.save_interval and self.step % config.save_interval == 0)
                if last or stop or improved or due or self.best.stops_early:
                    self.save()
                if stop is not None:
                    return self._stopped(stop)
            self.checkpoints.wait()
        return self._finished()

    def _stopped(self, signal: Signals) -> int:
        self.checkpoints.wait()
        logger.warning("stopped by %s after step %d, which is saved; load: auto goes on", signal.name, self.step)
        self._close(Ending("stopped_by_signal", self.step, None, self.best.state, signal.name))
        return 128 + signal

    def _finished(self) -> int:
        early = self.step < self.train_iters
        best = self.best.state
        if early and best is not None:
            logger.warning(
                "stopped early after step %d of %d: the last %d evaluations were no improvement of %s",
                self.step,
                self.train_iters,
                best.without_improvement,
                best.metric,
            )
        exported = None
        if self.config.export_hf:
            exported = self.best.load(self.step)
            of_exported = {"step": exported, "consumed_pairs": self.order.consumed_pairs(exported)}
            self.session.export(self.root / "hf", False, self.state().model_copy(update=of_exported), self.root)
        self._close(Ending("stopped_early" if early else "finished", self.step, exported, best))
        return 0

    def _close(self, ending: Ending) -> None:
        """Write and show the closing summary; a collective of the world."""
        held_out = 0 if self.held_out is None else self.held_out.pairs
        with fail_together(self.session.groups.control):
            if self.reporter is not None:
                ranks = self.session.groups.world.size()
                self.reporter.close(ending, pairs=len(self.train_data), held_out_pairs=held_out, ranks=ranks)

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
        if not not_finite.is_finite(session.device, self.step + 1, sums[0], squared_norm.squeeze(), logged=logged):
            what = "loss" if not sums[0].isfinite() else "gradient norm"
            not_finite.stop(session, self.root, self.step + 1, what, micro_batches, scored, self.train_data)
        learning_rate = self.stepper.update(squared_norm)
        session.running.update(scored)
        self.step += 1
        totals = session.metric_sums.totals(sums) if logged else None
        self.unlogged_seconds.append(time.perf_counter() - begin)
        if totals is not None:
            # the wait of this step includes the queued device work of the unlogged steps before it
            seconds = statistics.fmean(self.unlogged_seconds)
            self.unlogged_seconds.clear()
            line = {
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
            if self.reporter is not None:
                self.reporter.report(line)

    def evaluate(self) -> bool:
        """Evaluate the held-out pairs, where there are any, and write a metrics line; a collective of the world.

        Returns:
            Whether the step has the best value of ``metric_for_best_model`` so far.

        Raises:
            SimpoError: on every rank.
        """
        self.evaluation_due = False
        if self.held_out is None:
            return False
        begin = time.perf_counter()
        metrics, answers = self.held_out.evaluate()
        line = {"step": self.step, "split": "eval", **metrics, "consumed_pairs": self.consumed_pairs}
        line["step_seconds"] = time.perf_counter() - begin
        with fail_together(self.session.groups.control):
            if self.reporter is not None:
                self.reporter.report(line, answers)
        return self.best.judge(self.step, metrics)

    def state(self) -> checkpoint.TrainingState:
        """The state of the current step apart from parameters, optimizer and random state."""
        return checkpoint.TrainingState(
            step=self.step,
            consumed_pairs=self.consumed_pairs,
            data_fingerprint=self.train_data.order_fingerprint,
            running=self.session.running.state(),
            base=self.session.base,
            best=self.best.state,
            evaluation_due=self.evaluation_due,
            facts=self.facts,
            config=self.config,
        )

    def save(self) -> None:
        """Write a checkpoint of the current step."""
        self.checkpoints.save(self.state(), self.models, self.stepper)
