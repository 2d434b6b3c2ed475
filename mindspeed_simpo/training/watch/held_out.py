"""The held-out pairs of a run: their metrics and answers at each evaluation."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import torch

from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.loss.reference import ReferenceTable
from mindspeed_simpo.training.evaluation import mean_metrics
from mindspeed_simpo.training.session import Session
from mindspeed_simpo.training.watch.generation import Answer, AnswerGenerator


class HeldOut:
    """Evaluates the held-out pairs with the weights of the moment.

    Args:
        session: The run's session.
        models: Pipeline chunks as they train.
        data: The held-out pairs.
        table: Their sums under the reference model; None where there is none.
    """

    def __init__(
        self, session: Session, models: list[torch.nn.Module], data: PairDataset, table: ReferenceTable | None
    ) -> None:
        self._session, self._models = session, models
        self._data, self._schedule, self._loader = data, session.schedule(models, table), session.loader(data)
        self._generator = AnswerGenerator(session, data) if session.config.eval_generate else None
        self.pairs = len(data)

    def evaluate(self) -> tuple[dict[str, float], Sequence[Answer]]:
        """Metrics, the same on every rank but for ``answer_tokens``, and the answers, on the main rank; a collective.

        Raises:
            SimpoError: on every rank.
        """
        for model in self._models:
            model.eval()
        batches = self._session.config.eval_iters
        metrics = mean_metrics(self._session, self._schedule, self._data, self._loader, batches)
        for model in self._models:
            model.train()
        answers = self._generator.generate() if self._generator is not None else []
        if answers:
            metrics["answer_tokens"] = statistics.fmean(answer.tokens for answer in answers)
        return metrics, answers
