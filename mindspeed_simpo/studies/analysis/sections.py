"""The sections of the page: each figure with one sentence that says how to read it, and the pairs with their text."""

from __future__ import annotations

import html
from collections.abc import Sequence

from mindspeed_simpo.studies.analysis import figures, texts
from mindspeed_simpo.studies.analysis.scores import Measured, Numbers, Pairs, Piece
from mindspeed_simpo.studies.page import Section


def sections(
    numbers: Numbers, pairs: Pairs, models: Sequence[Measured], shown: tuple[list[int], list[int]]
) -> list[Section]:
    """The sections in their order; arguments as for :func:`~mindspeed_simpo.studies.analysis.report.write_analysis`."""
    drawn = [numbers[name] for name in ("run", "against") if name in numbers]
    return [
        *([_side_by_side(numbers, drawn)] if len(drawn) > 1 else []),
        *_of_rewards(drawn),
        *_of_likelihoods(drawn),
        _of_training(drawn),
        *_of_pairs(pairs, models, shown),
    ]


def _side_by_side(numbers: Numbers, models: Sequence[Numbers]) -> Section:
    run, against = (model["label"] for model in models)
    return Section(
        f"{run} against {against}",
        f"Each cell has the share and the number of pairs that {run} (row) and {against} (column), each by its own "
        "rewards, rank as the data do or not: the two cells off the diagonal are what the two models see differently.",
        figures.agreement(models, numbers["run_and_against"]),
    )


def _of_rewards(models: Sequence[Numbers]) -> list[Section]:
    return [
        Section(
            "Reward margins",
            "Right of the thin line at zero lie the pairs that the rewards rank as the data do, and the dashed line is "
            "the mean margin; the outermost bars also hold what lies beyond them.",
            figures.margins(models),
        ),
        Section(
            "Accuracy by length difference",
            "Each bar is the share of pairs ranked right among those whose chosen answer is longer (+) or shorter (−) "
            "by so many tokens, with its 95 % interval: bars that rise to the right say that the model prefers length.",
            figures.accuracy_by_length(models),
        ),
        Section(
            "Accuracy by source",
            "Each bar is the share of a source's pairs (their number in brackets) ranked right, with its 95 % "
            "interval, against the dotted line of a coin toss.",
            figures.accuracy_by_source(models),
        ),
    ]


def _of_likelihoods(models: Sequence[Numbers]) -> list[Section]:
    return [
        Section(
            "Average log-probabilities",
            "The further a response lies to the right the likelier are its tokens to the model, and the more the two "
            "distributions overlap the less likelihood alone tells chosen from rejected.",
            figures.likelihoods(models),
        ),
        Section(
            "Likelihood and length",
            "The stronger the colour of a cell the more responses, chosen and rejected, have this length and this "
            "average log-probability; a ρ far from zero says that likelihood goes with length (+: longer is likelier).",
            figures.lengths(models),
        ),
        Section(
            "Reward ranking against likelihood ranking",
            "Rows say whether the reward, columns whether the average log-probability of the chosen answer is "
            "above that of the rejected one: pairs off the diagonal are those where a better reward does not mean a "
            "likelier answer, and length-normalised SimPO has none by construction.",
            figures.rankings(models),
        ),
    ]


def _of_training(models: Sequence[Numbers]) -> Section:
    drawn = figures.displacement(models)
    without = [model["label"] for model in models if not model["displacement"]]
    note = f"<p>No metrics of a training are known of: {html.escape(', '.join(without))}.</p>" if without else ""
    return Section(
        "Likelihood displacement over training",
        "Lines show how the average log-probabilities have moved since the first measurement: where the chosen line "
        "falls with the rejected one, the model gains margin by making both answers less likely.",
        drawn or None,
        note,
    )


def _of_pairs(pairs: Pairs, models: Sequence[Measured], shown: tuple[list[int], list[int]]) -> list[Section]:
    kinds = ("The hardest pairs", "smallest", shown[0]), ("The most confident pairs", "largest", shown[1])
    return [_pairs(title, extreme, positions, pairs, models) for title, extreme, positions in kinds if positions]


def _pairs(title: str, extreme: str, positions: Sequence[int], pairs: Pairs, models: Sequence[Measured]) -> Section:
    reading = (
        f"The pairs with the {extreme} reward margins of {models[0].label}, the extreme one first: the stronger the "
        "colour of a token, the less likely the model finds it where it stands."
    )
    body = "".join(_pair(position, pairs, models) for position in positions)
    return Section(title, reading, body=texts.scale() + body)


def _pair(position: int, pairs: Pairs, models: Sequence[Measured]) -> str:
    source, place = pairs.sources[int(pairs.source_of[position])], pairs.places[position]
    margins = ", ".join(f"{model.label} {model.scores.margin[position]:+.3f}" for model in models)
    origin = f"{source} · {place}" if len(pairs.sources) > 1 else place
    facts = html.escape(f"margin {margins} · {origin}")
    head = f"<b>Pair {int(pairs.indices[position])}</b> · {facts}"
    prompt = html.escape(texts.without_repeats(models[0].shown[position].prompt))
    answers = "".join(_answers(position, model) for model in models)
    return (
        f'<details class="pair"><summary>{head}</summary>'
        f'<h4>Prompt</h4><pre dir="auto">{prompt}</pre>{answers}</details>'
    )


def _answers(position: int, model: Measured) -> str:
    scores, shown = model.scores, model.shown[position]
    chosen = _answer("chosen", model.label, shown.chosen, scores.chosen_mean[position], scores.chosen_reward[position])
    rejected = _answer(
        "rejected", model.label, shown.rejected, scores.rejected_mean[position], scores.rejected_reward[position]
    )
    return f'<div class="beside">{chosen}{rejected}</div>'


def _answer(side: str, label: str, pieces: Sequence[Piece], mean: float, reward: float) -> str:
    tokens = sum(len(piece.logprobs) for piece in pieces)
    facts = f"{side}, {label}: {tokens} tokens, {mean:.3f} nats per token, reward {reward:+.3f}"
    return f"<div><h4>{html.escape(facts)}</h4>{texts.coloured(pieces)}</div>"
