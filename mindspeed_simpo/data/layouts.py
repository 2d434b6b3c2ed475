"""Layouts of published preference sets, turned into the columns of a plain pair: prompt, chosen and rejected."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mindspeed_simpo.data.problems import ExampleError, found, malformed, quoted

Order = Literal["first", "second", "tie"]
"""Which of two responses a label prefers."""


def _signed(value: Any) -> Order | None:
    """``-3 .. 3``: negative where the first response is better."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return "tie" if value == 0 else "first" if value < 0 else "second"


def _index(value: Any) -> Order | None:
    """0 or 1, the index of the better response."""
    return "first" if value == 0 else "second" if value == 1 else None


def _first_is_better(value: Any) -> Order | None:
    """1 where the first response is better, 0 where the second is."""
    return "first" if value == 1 else "second" if value == 0 else None


def _winner(value: Any) -> Order | None:
    """``model_a``, ``model_b``, or a text that begins with ``tie`` or says that both are bad."""
    if value in ("model_a", "model_b"):
        return "first" if value == "model_a" else "second"
    return "tie" if isinstance(value, str) and (value.startswith("tie") or value.startswith("both")) else None


@dataclass(frozen=True)
class _Compared:
    """Two responses side by side, and the columns that say which is better."""

    first: str
    second: str
    labels: Mapping[str, Callable[[Any], Order | None]]
    prompt: str | None
    """Column of the prompt; ``None`` where the two columns hold whole conversations."""


_COMPARED = (
    _Compared("response_1", "response_2", {"preference_strength": _signed}, "prompt"),  # HelpSteer2
    _Compared("response1", "response2", {"overall_preference": _signed}, "context"),  # HelpSteer3
    _Compared(  # PKU-SafeRLHF
        "response_0", "response_1", {"better_response_id": _index, "safer_response_id": _index}, "prompt"
    ),
    _Compared("human_ref_A", "human_ref_B", {"labels": _first_is_better}, "history"),  # SHP
    _Compared("conversation_a", "conversation_b", {"winner": _winner}, None),  # Chatbot Arena
)
LABELS = tuple(name for layout in _COMPARED for name in layout.labels)
"""Columns that say which of two responses is better."""

# Names that stand for a plain column where the row has none of the column's own names.
_OTHER_NAMES = {
    "chosen": ("chosen_response", "response_j"),
    "rejected": ("rejected_response", "response_k"),
    "prompt": ("question", "context"),
}
_OWN_NAMES = {
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "prompt": ("prompt", "instruction", "input", "conversations", "messages"),
}
PROMPTS = _OTHER_NAMES["prompt"]
"""Columns that are read as the prompt where the row has no other."""

# Whether a higher number is better.
_ANSWER_SCORES = {"pm_score": True, "score": True, "rank": False}
_ANSWER_TEXTS = ("text", "answer", "response")
_ANSWERS = "answers"

_SINGLE_TEXTS = ("response", "completion", "answer", "output")
_SINGLE_SCORES = ("helpfulness", "score", "reward", "rating", "label")

COLUMNS = (
    *(name for layout in _COMPARED for name in (layout.first, layout.second, layout.prompt) if name),
    *LABELS,
    *(name for names in _OTHER_NAMES.values() for name in names),
    *(_ANSWERS, "status", "original_chosen"),
    *_SINGLE_TEXTS,
    *_SINGLE_SCORES,
)
"""Every column that a layout reads, for tables."""


def plain_pair(example: Mapping[str, Any], label: str | None, mapped: Collection[str]) -> Mapping[str, Any]:
    """The example with the columns ``prompt``, ``chosen`` and ``rejected``; itself where its layout is none of these.

    Two responses with a label, a list of answers with scores (best and worst become the pair), transcripts that begin
    with ``Human:``, and other names of the plain columns.

    Args:
        example: Decoded columns.
        label: The label column to follow where the layout has several, an empty text for none, or ``None`` for the
            layout's own.
        mapped: Of ``prompt``, ``chosen`` and ``rejected``, those for which the user has named a column.

    Raises:
        ExampleError: of kind ``tie`` where the label prefers neither response; of kind ``malformed`` where a label is
            missing, unknown, or contradicts another one.
    """
    if example.get("chosen") is None and example.get("rejected") is None:
        for layout in _COMPARED if label != "" else ():
            if layout.first in example and layout.second in example:
                return _by_label(example, layout, label)
        if isinstance(example.get(_ANSWERS), list):
            return _best_and_worst(example, mapped)
    if example.get("status") == "tie" and "original_chosen" in example:
        raise ExampleError("tie", "the column `status` says that neither response is better")
    return _transcripts(_renamed(example, mapped))


def plain_prompt(example: Mapping[str, Any], mapped: Collection[str]) -> Mapping[str, Any]:
    """The example with its prompt under the name ``prompt``; labels and scores are not read.

    Two whole conversations side by side become ``chosen`` and ``rejected``, whichever is better: their shared turns are
    the prompt.

    Args:
        example: Decoded columns.
        mapped: See :func:`plain_pair`.
    """
    changed = dict(example)
    for layout in _COMPARED:
        if layout.first in example and layout.second in example and example.get("chosen") is None:
            if layout.prompt is None:
                changed |= {"chosen": example[layout.first], "rejected": example[layout.second]}
            elif "prompt" not in mapped:
                changed["prompt"] = changed.pop(layout.prompt, None)
    return _transcripts(_renamed(changed, mapped))


def refuse_unread_label(example: Mapping[str, Any], chosen: str, rejected: str) -> None:
    """Refuse an example whose columns ``chosen`` and ``rejected`` stand beside a label that says which is better.

    Raises:
        ExampleError: naming the label.
    """
    for layout in _COMPARED:
        own = {chosen, rejected} & {layout.first, layout.second}
        names = [name for name in layout.labels if example.get(name) is not None and (own or name != "labels")]
        if names:
            advice = "leave chosen and rejected out of map_keys to have it decide" if own else "keep one of the two"
            raise malformed(
                f"`{chosen}` and `{rejected}` are read as chosen and rejected, but {quoted(names)} says which response "
                f"is better: {advice}, or set map_keys `label` to an empty text where it is no preference"
            )


def _by_label(example: Mapping[str, Any], layout: _Compared, label: str | None) -> Mapping[str, Any]:
    if label is not None and label not in layout.labels:
        raise malformed(f"map_keys: `label` is {label!r}, this row is labelled by {quoted(layout.labels)}")
    names = [name for name in ([label] if label else layout.labels) if example.get(name) is not None]
    if not names:
        raise malformed(
            f"the responses `{layout.first}` and `{layout.second}` have no label: expected {quoted(layout.labels)}"
        )
    orders = {name: layout.labels[name](example[name]) for name in names}
    for name, order in orders.items():
        if order is None:
            raise malformed(f"{name}: {found(example[name])} does not say which response is better")
    if len(set(orders.values())) > 1:
        raise malformed(
            f"the labels {quoted(orders)} prefer different responses; name the one to follow: map_keys, `label`"
        )
    order = orders[names[0]]
    if order == "tie":
        raise ExampleError("tie", f"{names[0]}: neither response is better")
    chosen, rejected = (layout.first, layout.second) if order == "first" else (layout.second, layout.first)
    used = {layout.first, layout.second, layout.prompt, *layout.labels}
    rest = {name: value for name, value in example.items() if name not in used}
    prompt = {} if layout.prompt is None else {"prompt": example.get(layout.prompt)}
    return _transcripts({**rest, **prompt, "chosen": example[chosen], "rejected": example[rejected]})


def _best_and_worst(example: Mapping[str, Any], mapped: Collection[str]) -> Mapping[str, Any]:
    scored = [_scored(answer, f"{_ANSWERS}[{index}]") for index, answer in enumerate(example[_ANSWERS])]
    rest = {name: value for name, value in example.items() if name != _ANSWERS}
    chosen, rejected = best_and_worst(scored)
    return _transcripts(_renamed({**rest, "chosen": chosen, "rejected": rejected}, mapped))


def best_and_worst(scored: Sequence[tuple[float, Any]]) -> tuple[Any, Any]:
    """The answers with the highest and the lowest score, the first of them among equals.

    Raises:
        ExampleError: of kind ``unpaired`` for fewer than two answers, of kind ``tie`` where all scores are equal.
    """
    if len(scored) < 2:
        raise ExampleError("unpaired", f"{len(scored)} answer to this prompt; a pair needs two")
    scores = [score for score, _ in scored]
    if max(scores) == min(scores):
        raise ExampleError("tie", f"all {len(scored)} answers have the score {scores[0]:g}")
    return scored[scores.index(max(scores))][1], scored[scores.index(min(scores))][1]


def _scored(answer: Any, where: str) -> tuple[float, Any]:
    if not isinstance(answer, Mapping):
        raise malformed(f"{where}: expected an object with a text and a score, found {found(answer)}")
    texts = [name for name in _ANSWER_TEXTS if answer.get(name) is not None]
    scores = [name for name in _ANSWER_SCORES if answer.get(name) is not None]
    if len(texts) != 1 or len(scores) != 1:
        raise malformed(
            f"{where}: expected one text of {quoted(_ANSWER_TEXTS)} and one score of {quoted(_ANSWER_SCORES)}, "
            f"found {found(answer)}"
        )
    score = number(answer[scores[0]], f"{where}.{scores[0]}")
    return (score if _ANSWER_SCORES[scores[0]] else -score), answer[texts[0]]


def number(value: Any, where: str) -> float:
    """A score as a number; booleans are 0 and 1.

    Raises:
        ExampleError: where it is none.
    """
    if not isinstance(value, int | float):
        raise malformed(f"{where}: expected a number, found {found(value)}")
    return float(value)


def single_answer(example: Any, prompts: Sequence[str], score: str | None) -> tuple[str, str] | None:
    """The columns of text and score of an example that holds one answer with its score; ``None`` for another example.

    Args:
        example: Decoded columns, or anything else.
        prompts: Columns of which the example has at least one.
        score: The column of the score, or ``None`` for the known ones.
    """
    if not isinstance(example, Mapping) or not any(example.get(name) is not None for name in prompts):
        return None
    if any(name in example for name in ("chosen", "rejected", _ANSWERS)):
        return None
    if any(layout.first in example or layout.second in example for layout in _COMPARED):
        return None
    texts = [name for name in _SINGLE_TEXTS if example.get(name) is not None]
    scores = [score] if score else [name for name in _SINGLE_SCORES if example.get(name) is not None]
    if len(texts) != 1 or not scores or example.get(scores[0]) is None:
        return None
    text = example[texts[0]]
    one = isinstance(text, str | Mapping) or (
        isinstance(text, list) and len(text) == 1 and isinstance(text[0], Mapping)
    )
    return (texts[0], scores[0]) if one else None


def _renamed(example: Mapping[str, Any], mapped: Collection[str]) -> Mapping[str, Any]:
    """The example with its plain columns under their own names."""
    renamed = dict(example)
    for name, others in _OTHER_NAMES.items():
        present = [other for other in others if example.get(other) is not None]
        if name not in mapped and len(present) == 1 and all(example.get(column) is None for column in _OWN_NAMES[name]):
            renamed[name] = renamed.pop(present[0])
    return renamed


_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def _transcripts(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """The example with transcripts (``Human: ... Assistant: ...``) in place of prompt or answers as lists of turns."""
    changed = dict(example)
    prompt = _turns_of(example.get("prompt"))
    if prompt is not None:
        last = prompt[-1]
        changed["prompt"] = prompt[:-1] if last["role"] == "assistant" and not last["content"] else prompt
    if example.get("prompt") is None:
        chosen, rejected = _turns_of(example.get("chosen")), _turns_of(example.get("rejected"))
        if chosen is not None and rejected is not None:
            changed |= {"chosen": chosen, "rejected": rejected}
    return changed


def _turns_of(text: Any) -> list[dict[str, str]] | None:
    """The turns of a transcript that begins with a human's turn and has an assistant's, else ``None``."""
    if not isinstance(text, str) or not text.lstrip().startswith("Human:"):
        return None
    parts = _TURN.split(text.strip())
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[speaker], "content": content.strip()}
        for speaker, content in zip(parts[1::2], parts[2::2], strict=True)
    ]
    return turns if any(turn["role"] == "assistant" for turn in turns) else None
