"""The model card of an export: ``README.md`` with the metadata of the Hugging Face hub.

The card says what a run knows of itself: base, data, settings, metrics of the held-out pairs, versions of libraries. It
names no license, because that follows from base and data. Local folders are named by their last part alone. The same
checkpoint gives the same card: it has no date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCardData

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.options import OPTION_GROUPS, TaskOptions, TrainingOptions, effect_of, split_weights
from mindspeed_simpo.objectives import OBJECTIVES
from mindspeed_simpo.training.run_facts import Named, RunFacts, data_names, library_versions, model_name

_LONGEST = 120
_ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")
_OTHER_SECTIONS = ("stage", "model_name_or_path", "data_path", "eval_data_path", "bf16")
_NOT_A_METRIC = ("step", "split", "consumed_pairs", "step_seconds")
_ACCURACY = "rewards/accuracies"
_CHAT = """tokenizer = AutoTokenizer.from_pretrained(name)
messages = [{"role": "user", "content": "What is the capital of France?"}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))"""


class Trained(NamedTuple):
    """A run up to the step of the exported weights."""

    config: Config
    facts: RunFacts | None
    """None where the checkpoint does not have them."""
    step: int
    consumed_pairs: int
    data_fingerprint: str


class Weights(NamedTuple):
    """What an export holds."""

    adapters: bool
    """Adapters for peft, not a whole model."""
    images: bool
    """The model takes images beside text."""


def held_out_lines(run: Path, step: int) -> list[dict[str, Any]]:
    """The evaluations of a run up to a step, from its ``metrics.jsonl``; none where that cannot be read.

    Args:
        run: Output folder of the run.
        step: Step of the exported weights.
    """
    try:
        text = (run / "metrics.jsonl").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    found = []
    for line in text.splitlines():
        try:
            values = json.loads(line)
            if values["split"] == "eval" and values["step"] <= step:
                found.append(values)
        except (ValueError, KeyError, TypeError):
            continue  # an incomplete line: the run was killed while writing it
    return found


def model_card(trained: Trained, evaluations: Sequence[Mapping[str, Any]], weights: Weights) -> str:
    """The text of the card.

    Args:
        trained: The run.
        evaluations: Of :func:`held_out_lines`.
        weights: What the export holds.
    """
    config, facts = trained.config, trained.facts
    base = facts.base if facts else model_name(config.model_name_or_path)
    train_data = facts.train_data if facts else data_names(config.data_path)
    title = config.objective.title
    source = _ARXIV.sub(r"[\g<0>](https://arxiv.org/abs/\1)", config.objective.source)
    eval_data = facts.eval_data if facts else data_names(config.eval_data_path)
    metadata = _metadata(config, base, train_data, eval_data or train_data, evaluations, weights)
    sections = [
        f"# {_code(base.name)} with {title}\n\n"
        f"{'LoRA adapters for' if weights.adapters else 'Trained from'} {_link(base, '')}: {trained.step} steps of "
        f"preference training with {title} ({source}) by `mindspeed-simpo`. The card states no license: those of the "
        "base model and of the data apply.",
        f"## Use\n\n`name` is this folder, or its id on the hub.\n\n```python\n{_loading(weights)}\n{_CHAT}\n```",
        _data(trained, train_data),
        _settings(config, trained.step),
        _metrics(evaluations),
        _environment(config, facts),
    ]
    return f"---\n{metadata.to_yaml().rstrip()}\n---\n\n" + "\n\n".join(sections) + "\n"


def _metadata(
    config: Config,
    base: Named,
    train_data: Sequence[Named],
    held_out: Sequence[Named],
    evaluations: Sequence[Mapping[str, Any]],
    weights: Weights,
) -> ModelCardData:
    """The metadata, with names of the hub alone where the hub makes links of them."""
    given: dict[str, Any] = {}
    if base.on_hub:
        given |= {"base_model": base.name, "base_model_relation": "adapter" if weights.adapters else "finetune"}
    if datasets := _hub_ids(train_data):
        given["datasets"] = datasets
    accuracy = evaluations[-1].get(_ACCURACY) if evaluations else None
    if accuracy is not None:
        result = EvalResult(
            task_type="text-generation",
            dataset_type=(_hub_ids(held_out) or ["preference-pairs"])[0],
            dataset_name=", ".join(_plain(named.name) for named in held_out) or "held-out pairs",
            metric_type="accuracy",
            metric_name="held-out pairs whose chosen response has the higher reward",
            metric_value=accuracy,
        )
        given |= {"model_name": f"{_plain(base.name)} with {config.objective.title}", "eval_results": [result]}
    return ModelCardData(
        library_name="peft" if weights.adapters else "transformers",
        pipeline_tag="image-text-to-text" if weights.images else "text-generation",
        tags=[config.stage, "preference-optimization", "mindspeed-simpo", *(["lora"] if config.lora_r else [])],
        **given,
    )


def _loading(weights: Weights) -> str:
    auto = "AutoModelForImageTextToText" if weights.images else "AutoModelForCausalLM"
    if not weights.adapters:
        return f'from transformers import {auto}, AutoTokenizer\n\nmodel = {auto}.from_pretrained(name, dtype="auto")'
    return (
        f"from peft import PeftConfig, PeftModel\nfrom transformers import {auto}, AutoTokenizer\n\n"
        f"base = {auto}.from_pretrained(PeftConfig.from_pretrained(name).base_model_name_or_path, "
        'dtype="auto")\nmodel = PeftModel.from_pretrained(base, name)'
    )


def _data(trained: Trained, train_data: Sequence[Named]) -> str:
    facts = trained.facts
    rows: list[tuple[object, ...]] = [("training", _links(train_data), facts.train_pairs if facts else "not recorded")]
    if facts and facts.eval_pairs is not None:
        part = _links(facts.eval_data) or "a part of the same data sets that is not trained on"
        if not facts.eval_data and split_weights(trained.config.split)[1]:
            part = f"the second part of split {_code(trained.config.split)}"
        rows.append(("held out", part, facts.eval_pairs))
    sources = ""
    if facts and facts.sources:
        counts = [(_code(source.name), source.pairs, source.per_epoch) for source in facts.sources]
        sources = _table(("source", "pairs", "pairs of an epoch"), counts) + "\n\n"
    digest = trained.data_fingerprint.partition(":")[0]
    return (
        f"## Data\n\n{_table(('part', 'data sets', 'pairs'), rows)}\n\n{sources}"
        f"{trained.consumed_pairs} pairs were trained on, repetitions counted. Digest of the token ids of the training "
        f"data: {_code(digest)}."
    )


def _settings(config: Config, steps: int) -> str:
    """The keys that change the result: those of objective and training, and of the others those that were set."""
    others = {name for each in OBJECTIVES.values() for name in each.keys.model_fields} - {
        *config.objective.keys.model_fields
    }
    always = {*TaskOptions.model_fields, *TrainingOptions.model_fields, "seq_length"}
    names = [
        name
        for group in OPTION_GROUPS
        for name, field in group.model_fields.items()
        if effect_of(field) == "result"
        and name not in (*_OTHER_SECTIONS, *others)
        and getattr(config, name) is not None
        and (name in always or getattr(config, name) != field.default)
    ]
    rows = [(_code(name), _code(_shown(getattr(config, name)))) for name in names]
    return (
        f"## Settings\n\n{_table(('key', 'value'), [(_code('stage'), _code(config.stage)), *rows, ('steps', steps)])}"
    )


def _metrics(evaluations: Sequence[Mapping[str, Any]]) -> str:
    if not evaluations:
        return "## Metrics\n\nNo evaluation of held-out pairs is recorded."
    shown = [evaluations[0], *evaluations[1:][-1:]]
    names = [name for name in shown[-1] if name not in _NOT_A_METRIC]
    rows = [(_code(name), *(_number(line.get(name)) for line in shown)) for name in names]
    table = _table(("metric", *(f"step {line['step']}" for line in shown)), rows)
    before = " Step 0 is the model before training." if shown[0]["step"] == 0 else ""
    return f"## Metrics\n\nOf the held-out pairs; log-probabilities in nats per token.{before}\n\n{table}"


def _environment(config: Config, facts: RunFacts | None) -> str:
    if config.backend == "fsdp":
        layout = f"parameters over {config.fsdp_shard_size or 'all'} ranks, context {config.context_parallel_size}"
    else:
        layout = (
            f"tensor {config.tensor_model_parallel_size}, pipeline {config.pipeline_model_parallel_size}, "
            f"context {config.context_parallel_size}, experts {config.expert_model_parallel_size}"
        )
    rows: list[tuple[object, ...]] = [("layout", layout), ("backend", config.backend)]
    rows.append(("precision", "bf16, main parameters fp32" if config.bf16_in_use else "fp32"))
    if facts:
        rows.insert(0, ("devices", f"{facts.ranks} x {facts.device}"))
    versions, of = (facts.versions, "training") if facts else (library_versions(), "the export")
    return (
        f"## Environment\n\n{_table(('', 'of training'), rows)}\n\n"
        f"{_table(('library', f'version of {of}'), versions.items())}"
    )


def _hub_ids(names: Iterable[Named]) -> list[str]:
    """Ids without the splits that may follow them."""
    return list(dict.fromkeys(named.name.partition(":")[0] for named in names if named.on_hub))


def _links(names: Iterable[Named]) -> str:
    return ", ".join(_link(named, "datasets/") for named in names)


def _link(named: Named, kind: str) -> str:
    if not named.on_hub:
        return _code(named.name)
    return f"[{_code(named.name)}](https://huggingface.co/{kind}{named.name.partition(':')[0]})"


def _shown(value: object) -> str:
    """A value as in a configuration file, with paths by their last part."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, str):
        return Path(value).name if "/" in value else value
    if isinstance(value, Mapping):
        return ", ".join(f"{_shown(key)}: {_shown(item)}" for key, item in value.items())
    if isinstance(value, Sequence):
        return ", ".join(map(_shown, value))
    return str(value)


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "-"


def _table(titles: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in lines)


def _plain(text: str) -> str:
    """One line of limited length."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


def _code(text: str) -> str:
    """A code span, which no text of a user can leave, in a table either."""
    return f"`{_plain(text).replace('`', chr(39)).replace('|', chr(92) + '|')}`"
