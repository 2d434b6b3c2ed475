"""The files of an analysis: ``analysis.json``, ``pairs.jsonl`` and the page."""

from __future__ import annotations

import html
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_simpo.studies.analysis import statistics, texts
from mindspeed_simpo.studies.analysis.history import displacement
from mindspeed_simpo.studies.analysis.scores import Measured, Numbers, Pairs, PairScores
from mindspeed_simpo.studies.analysis.sections import sections
from mindspeed_simpo.studies.page import table, write_page
from mindspeed_simpo.studies.whole_file import write_whole

FILES = ("analysis.json", "pairs.jsonl", "index.html")


def write_analysis(folder: Path, pairs: Pairs, models: Sequence[Measured], shown: tuple[list[int], list[int]]) -> None:
    """Write the files, each completely or not at all, the page last.

    Args:
        folder: Where to write; it exists.
        pairs: The analysed pairs.
        models: The run, then the model that it is compared with, if any.
        shown: Positions of the hardest and of the most confident pairs, among the analysed ones.

    Raises:
        OSError: where a file cannot be written.
    """
    numbers = numbers_of(pairs, models, shown)
    write_whole(folder / "analysis.json", json.dumps(numbers, ensure_ascii=False, indent=1, allow_nan=False) + "\n")
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in _rows(pairs, models))
    write_whole(folder / "pairs.jsonl", "".join(lines))
    titles = " and ".join(model.label for model in models)
    title = f"Analysis of {len(pairs.indices)} pairs: {titles}"
    write_page(folder / "index.html", title, sections(numbers, pairs, models, shown), _summary(numbers), texts.STYLE)


def numbers_of(pairs: Pairs, models: Sequence[Measured], shown: tuple[list[int], list[int]]) -> Numbers:
    """The content of ``analysis.json``; arguments as for :func:`write_analysis`."""
    hardest, confident = ([int(pairs.indices[each]) for each in positions] for positions in shown)
    names = ("run", "against")
    numbers: Numbers = {
        "pairs": len(pairs.indices),
        "sources": list(pairs.sources),
        "chosen_is_longer": float(np.mean(models[0].scores.length_difference > 0)),
        "hardest": hardest,
        "most_confident": confident,
    }
    numbers |= {name: _of_model(model, pairs) for name, model in zip(names, models, strict=False)}
    if len(models) > 1:
        run, against = (model.scores.right for model in models)
        numbers["run_and_against"] = {
            "both_right": int(np.count_nonzero(run & against)),
            "run_right_only": int(np.count_nonzero(run & ~against)),
            "against_right_only": int(np.count_nonzero(~run & against)),
            "both_wrong": int(np.count_nonzero(~run & ~against)),
            "spearman_of_margins": statistics.spearman(models[0].scores.margin, models[1].scores.margin),
        }
    return numbers


def _of_model(model: Measured, pairs: Pairs) -> Numbers:
    scores = model.scores
    limits = statistics.limits_of(scores.chosen_mean, scores.rejected_mean)
    tokens = np.concatenate([scores.chosen_tokens, scores.rejected_tokens])
    means = np.concatenate([scores.chosen_mean, scores.rejected_mean])
    return {
        "label": model.label,
        "weights": model.weights,
        "step": model.step,
        "stage": model.stage,
        "objective": model.title,
        "keys": dict(model.keys),
        "rewards": model.rewards,
        "means": scores.means(),
        "margins": statistics.distribution(scores.margin),
        "mean_logprobs": {
            "chosen": statistics.distribution(scores.chosen_mean, limits),
            "rejected": statistics.distribution(scores.rejected_mean, limits),
        },
        "accuracy": {
            "all": statistics.accuracy(scores.right),
            "of_likelihood": statistics.accuracy(scores.likelier),
            "by_length_difference": statistics.accuracy_by_length(scores.right, scores.length_difference),
            "by_source": statistics.accuracy_by_source(scores.right, pairs.source_of, pairs.sources),
        },
        "spearman": {
            "chosen": statistics.spearman(scores.chosen_mean, scores.chosen_tokens),
            "rejected": statistics.spearman(scores.rejected_mean, scores.rejected_tokens),
            "both": statistics.spearman(means, tokens),
            "margin_and_length_difference": statistics.spearman(scores.margin, scores.length_difference),
        },
        "length_density": statistics.density(tokens, means),
        "contingency": statistics.contingency(scores.right, scores.likelier),
        "displacement": displacement(model.history),
    }


def _rows(pairs: Pairs, models: Sequence[Measured]) -> Iterator[dict[str, Any]]:
    names = PairScores.names()
    arrays = [[getattr(model.scores, name).tolist() for name in names] for model in models]
    for position, index in enumerate(pairs.indices.tolist()):
        row: dict[str, Any] = {
            "index": index,
            "place": pairs.places[position],
            "source": pairs.sources[int(pairs.source_of[position])],
        }
        for key, columns in zip(("run", "against"), arrays, strict=False):
            row[key] = {name: column[position] for name, column in zip(names, columns, strict=True)}
        yield row


def _summary(numbers: Numbers) -> str:
    models = [numbers[name] for name in ("run", "against") if name in numbers]
    items = "".join(
        f"<li><b>{html.escape(model['label'])}</b>: {html.escape(model['weights'])}; rewards: "
        f"{html.escape(model['rewards'].replace('`', ''))}; {html.escape(_keys(model['keys']))}</li>"
        for model in models
    )
    rows = [(name, *(value(model) for model in models)) for name, value in _ROWS]
    return f"<ul>{items}</ul>{table(['', *(model['label'] for model in models)], rows)}"


def _keys(keys: Numbers) -> str:
    return ", ".join(f"{name}: {value}" for name, value in keys.items()) or "no keys"


def _percent(numbers: Numbers) -> str:
    low, high = numbers["interval"]
    return f"{numbers['accuracy']:.1%} ({low:.1%} to {high:.1%})"


def _number(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.4f}"


_ROWS: tuple[tuple[str, Callable[[Numbers], str]], ...] = (
    ("accuracy of the rewards (95 % interval)", lambda model: _percent(model["accuracy"]["all"])),
    ("accuracy of the likelihoods (95 % interval)", lambda model: _percent(model["accuracy"]["of_likelihood"])),
    ("reward margin, mean", lambda model: _number(model["margins"]["mean"])),
    ("reward margin, median", lambda model: _number(model["margins"]["quantiles"]["50"])),
    ("average log-probability of chosen, nats per token", lambda model: _number(model["means"]["logps/chosen"])),
    ("average log-probability of rejected, nats per token", lambda model: _number(model["means"]["logps/rejected"])),
    ("Spearman ρ of average log-probability and length", lambda model: _number(model["spearman"]["both"])),
    (
        "Spearman ρ of margin and length difference",
        lambda model: _number(model["spearman"]["margin_and_length_difference"]),
    ),
    ("loss", lambda model: _number(model["means"]["loss"])),
)
