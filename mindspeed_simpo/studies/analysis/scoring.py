"""Scoring of pairs by a session's model, on every layout: rewards and likelihoods of all pairs, tokens of some."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from jaxtyping import Int64
from torch import Tensor

from mindspeed_simpo.batch import IGNORE_INDEX, TokenizedPair
from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.data.loader import PairLoader
from mindspeed_simpo.errors import TrainingError
from mindspeed_simpo.loss.scoring import ScoredBatch
from mindspeed_simpo.parallel.collectives import of_all_ranks
from mindspeed_simpo.studies.analysis.scores import PairScores, ShownAnswers
from mindspeed_simpo.studies.analysis.texts import pieces_of
from mindspeed_simpo.training.pair_values import pair_values
from mindspeed_simpo.training.progress import counting
from mindspeed_simpo.training.schedule.runner import PairSchedule
from mindspeed_simpo.training.session import Session, on_every_rank

TokenLogprobs = Mapping[int, tuple[list[float], list[float]]]
"""By index of the pair: log-probabilities of the scored tokens of chosen and rejected response, nats."""


def score_pairs(
    session: Session, schedule: PairSchedule, loader: PairLoader, pairs: Int64[np.ndarray, " pair"]
) -> PairScores:
    """What the session's model gives each pair; a collective of the world.

    Args:
        session: The session.
        schedule: Evaluates the micro-batches with the session's objective.
        loader: Of the data set.
        pairs: Indices of the pairs, ascending.

    Raises:
        TrainingError: on every rank, where a number is not finite.
    """
    steps = -(-len(pairs) // loader.global_batch_size)
    names = PairScores.names()
    with counting("scoring pairs", steps, shown=session.is_main) as on_step:
        values = pair_values(
            schedule, loader.steps_of(pairs), pairs, session.groups, session.device, on_step, len(names), _values
        )
    columns = values.double().cpu().numpy()
    if (bad := np.flatnonzero(~np.isfinite(columns).all(axis=1))).size:
        weights = session.config.load or session.config.model_name_or_path
        raise on_every_rank(
            TrainingError(
                f"the scores of {bad.size} of {len(pairs)} pairs are not finite, the first of pair {pairs[bad[0]]}: "
                f"see the weights of {weights}"
            )
        )
    return PairScores(**{name: columns[:, number].copy() for number, name in enumerate(names)})


def _values(item: ScoredBatch) -> Sequence[Tensor]:
    of_pairs = vars(item.inputs) | vars(item.output)
    return [of_pairs[name] for name in PairScores.names()]


def token_logprobs(
    session: Session, schedule: PairSchedule, loader: PairLoader, pairs: Int64[np.ndarray, " pair"]
) -> TokenLogprobs:
    """Log-probability of each scored token of some pairs, on every rank; a collective of the world.

    Args:
        session: The session.
        schedule: Its models have the weights.
        loader: Of the data set.
        pairs: Indices of the pairs, ascending.
    """
    own: dict[int, tuple[list[float], list[float]]] = {}
    for micro_batches in loader.steps_of(pairs):
        found = schedule.token_logprobs(micro_batches)
        if not session.groups.contributes_loss:
            continue
        for batch, sequences in zip(micro_batches, found, strict=True):
            number = batch.num_pairs
            for pair, index in enumerate(batch.pair_ids.tolist()):
                if index >= 0:
                    own[index] = sequences[pair].tolist(), sequences[number + pair].tolist()
    parts = of_all_ranks(own, session.groups.control)
    return {index: answers for part in parts for index, answers in part.items()}


def shown_answers(session: Session, data: PairDataset, logprobs: TokenLogprobs) -> dict[int, ShownAnswers]:
    """The text of the pairs in ``logprobs``, by index, their answers token by token."""

    def decode(ids: Sequence[int]) -> str:
        return str(session.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    return {index: _shown(decode, data[index], answers) for index, answers in logprobs.items()}


def _shown(
    decode: Callable[[Sequence[int]], str], pair: TokenizedPair, answers: tuple[list[float], list[float]]
) -> ShownAnswers:
    sides = (pair.chosen_ids, pair.chosen_targets, answers[0]), (pair.rejected_ids, pair.rejected_targets, answers[1])
    chosen, rejected = (pieces_of(decode, ids, _placed(targets, values)) for ids, targets, values in sides)
    return ShownAnswers(decode(pair.prompt_ids), chosen, rejected)


def _placed(targets: Sequence[int], values: Sequence[float]) -> list[float | None]:
    """The values at the scored tokens, None at the others."""
    remaining = iter(values)
    return [None if target == IGNORE_INDEX else next(remaining) for target in targets]
