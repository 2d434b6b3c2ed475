"""``mindspeed-simpo check``: the pre-flight report on data, hyper-parameters, parallel layout and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.batch import IGNORE_INDEX, TokenizedPair
from mindspeed_simpo.cli.check_sources import Prompts, count_prompts, decontaminate, print_sources, prompt_warnings
from mindspeed_simpo.cli.check_warnings import (
    answer_warnings,
    in_gib,
    memory_warnings,
    run_length_warnings,
    setting_warnings,
    token_budget_warnings,
    token_warnings,
)
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.config.resolution import computation, resolve
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.dataset import PairDataset, has_eval_data, prepare_pairs
from mindspeed_simpo.data.largest import LargestPass, largest_pass
from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.data.processor import ImageProcessor, load_processor
from mindspeed_simpo.data.template import ChatFormat, TemplateSettings
from mindspeed_simpo.data.tokenizer import load_tokenizer
from mindspeed_simpo.device import find_device
from mindspeed_simpo.errors import DataError, SimpoError
from mindspeed_simpo.model.adapter_folder import AdapterFolder
from mindspeed_simpo.model.adapters import Adapters
from mindspeed_simpo.model.description import ModelDescription
from mindspeed_simpo.model.folder import resolve_model
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.model.naming import pipeline_chunks
from mindspeed_simpo.model.weight_source import SafetensorsFolder
from mindspeed_simpo.training.memory import MemoryEstimate, count_parameters, estimate_memory
from mindspeed_simpo.training.watch.required import check_held_out

if TYPE_CHECKING:
    from mindspeed_simpo.model.fsdp.description import TransformersModel

_COUNTS = ("rows", "kept", "malformed", "empty", "identical", "not_prefix", "too_long", "unreadable", "tie", "unpaired")
_T = TypeVar("_T")


@dataclass
class Findings:
    """Errors and warnings of the checks, in the order of the checks."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def attempt(self, work: Callable[[], _T]) -> _T | None:
        """The result of ``work``, or None after a ``SimpoError``, whose message joins ``errors``."""
        try:
            return work()
        except SimpoError as error:
            self.errors.append(str(error))
            return None


def check(config: Config, world_size: int, console: Console | None = None) -> bool:
    """Check model, data, tokens, hyper-parameters, layout and memory, and print a report.

    Args:
        config: Validated; ``make_layout(config, world_size)`` accepts it.
        world_size: Number of ranks of the run.
        console: Console for the report; stdout by default.

    Returns:
        Whether training may start; False where training would stop with an error.
    """
    console = console or Console(highlight=False)
    findings = Findings()
    device = find_device() if config.device == "auto" else config.device
    spec = findings.attempt(lambda: _model(config, world_size, device))
    if spec is not None:
        given, config = config, resolve(config, spec, device)
        console.print(computation(given, config, device), soft_wrap=True, highlight=False)
    tokenizer, processor = _readers(config, spec, findings)
    parts: dict[str, PairDataset] = {}
    if tokenizer is not None:
        parts = _prepare(config, tokenizer, spec.vocab_size if spec is not None else None, processor, findings)
    prompts = count_prompts(parts)
    findings.attempt(lambda: decontaminate(config, parts, prompts))
    if tokenizer is not None and parts:
        findings.warnings += _report_data(console, config, tokenizer, processor, parts, prompts)
    if "train" in parts:
        findings.warnings += run_length_warnings(config, parts["train"].mixture.pairs)
    findings.warnings += token_budget_warnings(config, parts)
    findings.warnings += setting_warnings(config)
    findings.attempt(lambda: check_held_out(config))
    findings.warnings += answer_warnings(config, parts, _divided_parameters(config, world_size, spec))
    if spec is not None and not isinstance(spec, ModelDescription):
        _sharded().print_layout(console, config, make_layout(config, world_size), spec)
    elif spec is not None:
        layout = make_layout(config, world_size)
        estimates = estimate_memory(spec, config, layout, _largest(config, layout, parts), device)
        _print_layout(console, config, layout, spec, estimates)
        findings.warnings += memory_warnings(config, layout, estimates)
    for title, style, messages in (("warning", "yellow", findings.warnings), ("error", "red", findings.errors)):
        for message in messages:
            console.print(f"[{style}]{title}[/]: {escape(message)}", soft_wrap=True)
    if not findings.errors:
        console.print(f"[green]ready to train[/], {len(findings.warnings)} warnings")
    return not findings.errors


def _sharded() -> ModuleType:
    """What only ``backend: fsdp`` needs, which imports the model classes of transformers."""
    from mindspeed_simpo.cli import check_sharded

    return check_sharded


def _divided_parameters(config: Config, world_size: int, spec: ModelDescription | TransformersModel | None) -> int:
    """Parameters of the model where several ranks divide them; 0 where each rank has all, or the model is unknown."""
    if spec is None:
        return 0
    layout = make_layout(config, world_size)
    if isinstance(spec, ModelDescription):
        divided = layout.tensor * layout.pipeline * layout.expert > 1
        return count_parameters(spec, pipeline_chunks(spec, 1)) if divided else 0
    return spec.parameters if (config.fsdp_shard_size or layout.ranks) > 1 else 0


def _model(config: Config, world_size: int, device: str) -> ModelDescription | TransformersModel:
    if config.backend == "fsdp":
        return _sharded().described(config, world_size, device)  # type: ignore[no-any-return]
    spec = read_description(config.model_name_or_path)
    make_layout(resolve(config, spec, device), world_size, spec, device)
    if config.init_from == "weights":
        SafetensorsFolder(resolve_model(config.model_name_or_path, weights=True), spec)
    adapters = Adapters.of(config, spec)
    if adapters is not None and config.lora_load is not None:
        AdapterFolder(Path(config.lora_load), adapters, spec)
    return spec


def _readers(
    config: Config, spec: ModelDescription | TransformersModel | None, findings: Findings
) -> tuple[PreTrainedTokenizerBase | None, ImageProcessor | None]:
    """Tokenizer, and processor of a model that takes images."""
    processor = None
    if spec is not None and spec.takes_images:
        processor = findings.attempt(lambda: load_processor(config.model_name_or_path))
    of_processor = None if processor is None else processor.chat_template
    tokenizer = findings.attempt(lambda: load_tokenizer(config.model_name_or_path, config.chat_template, of_processor))
    return tokenizer, processor


def _prepare(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int | None,
    processor: ImageProcessor | None,
    findings: Findings,
) -> dict[str, PairDataset]:
    wanted: list[Literal["train", "eval"]] = ["train", "eval"] if has_eval_data(config) else ["train"]
    lenient = config.model_copy(
        update={"data_errors": "drop", "truncation": "drop" if config.truncation == "error" else config.truncation}
    )
    parts: dict[str, PairDataset] = {}
    of_model: dict[str, Any] = {"vocab_size": vocab_size, "images": processor}
    for part in wanted:
        try:
            parts[part] = prepare_pairs(config, tokenizer, part, progress=True, **of_model)
        except DataError as error:
            findings.errors.append(f"{part}: {error}")
            try:  # statistics of the usable pairs
                parts[part] = prepare_pairs(lenient, tokenizer, part, progress=True, **of_model)
            except SimpoError:
                continue
        except SimpoError as error:
            findings.errors.append(f"{part}: {error}")
    return parts


def _report_data(
    console: Console,
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    processor: ImageProcessor | None,
    parts: dict[str, PairDataset],
    prompts: dict[str, Prompts],
) -> list[str]:
    """Print counts, what the chat template does of itself, and a sample; return the warnings about tokens."""
    console.print(_data_table(config, parts, prompts))
    print_sources(console, config, parts, prompts)
    chat_format = ChatFormat(tokenizer, TemplateSettings.of(config), images=processor is not None)
    for note in chat_format.notes():
        console.print(f"note: {escape(note)}", soft_wrap=True)
    if "train" in parts:
        pair = parts["train"][0]
        _print_sample(console, pair, tokenizer)
        if processor is not None and pair.images:
            _print_images(console, pair, processor)
    return [*prompt_warnings(config, prompts), *token_warnings(parts, tokenizer, chat_format.end_of_turn_id)]


def _data_table(config: Config, parts: dict[str, PairDataset], prompts: dict[str, Prompts]) -> Table:
    table = Table("", *parts, title="Pairs", title_justify="left")
    reports = [dataset.report for dataset in parts.values()]
    for name in _COUNTS:
        table.add_row(name.replace("_", " "), *(str(getattr(report, name)) for report in reports))
    table.add_row("prompt again", *(str(prompts[part].all_repeated) for part in parts))
    if "eval" in prompts and prompts["eval"].in_training:
        in_training = f"{sum(prompts['eval'].in_training)}{', left out' if config.eval_decontaminate else ''}"
        table.add_row("prompt in training", *("" if part == "train" else in_training for part in parts))
    table.add_row("prompts truncated", *(str(report.truncated_prompts) for report in reports))
    table.add_row("responses truncated", *(str(report.truncated_responses) for report in reports))
    for name in ("prompt", "chosen", "rejected"):
        statistics = [getattr(report, f"{name}_tokens") for report in reports]
        table.add_row(
            f"{name} tokens: mean, median, 95 %, longest",
            *(f"{item.mean:.1f}, {item.median:g}, {item.p95:g}, {item.longest}" for item in statistics),
        )
    return table


def _print_sample(console: Console, pair: TokenizedPair, tokenizer: PreTrainedTokenizerBase) -> None:
    def decoded(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    console.print(
        f"\nFirst pair, {escape(pair.source)}; the loss is computed on the coloured tokens only", soft_wrap=True
    )
    for name, ids, targets, style in (
        ("chosen", pair.chosen_ids, pair.chosen_targets, "green"),
        ("rejected", pair.rejected_ids, pair.rejected_targets, "red"),
    ):
        console.print(Text(f"{name}, {len(pair.prompt_ids)} + {len(ids)} tokens", style="bold"))
        parts = [(decoded(pair.prompt_ids), "dim")]
        for scored, run in groupby(zip(ids, targets, strict=True), lambda token: token[1] != IGNORE_INDEX):
            parts.append((decoded([token for token, _ in run]), style if scored else "dim"))
        console.print(Text.assemble(*parts), soft_wrap=True)
    console.print()


def _print_images(console: Console, pair: TokenizedPair, processor: ImageProcessor) -> None:
    """One line for each image: where it is, its size and its tokens."""
    for number, stored in enumerate(pair.images, start=1):
        try:
            image = stored.open()
            tokens = processor.inputs([image])[1]
        except ExampleError as error:
            console.print(f"image {number}: {escape(str(error))}", soft_wrap=True)
            continue
        where = stored.path or f"{len(stored.data)} bytes in the row"
        console.print(
            f"image {number}: {escape(where)}, {image.width} x {image.height}, {tokens} tokens", soft_wrap=True
        )
    console.print()


def _largest(config: Config, layout: Layout, parts: dict[str, PairDataset]) -> LargestPass:
    half = config.seq_length // 2
    # without data: prompts and responses of half of seq_length, the longest pairs
    if "train" not in parts:
        return largest_pass(np.full((config.global_batch_size, 3), half), config, Batching.of(config), layout)
    train = parts["train"]
    return largest_pass(train.lengths, config, Batching.of(config), layout, train.mixture)


def _print_layout(
    console: Console, config: Config, layout: Layout, spec: ModelDescription, estimates: Sequence[MemoryEstimate]
) -> None:
    chunks = pipeline_chunks(spec, 1)
    parameters = f"{count_parameters(spec, chunks):,} parameters"
    adapters = Adapters.of(config, spec)
    if adapters is not None:
        parameters += f", frozen, {adapters.count(spec, chunks):,} of adapters (r {adapters.r})"
    axes = ("tensor", "pipeline", "context", "data")
    degrees = " x ".join(f"{axis} {getattr(layout, axis)}" for axis in axes)
    experts = f"; experts {layout.expert} x their tensor {layout.expert_tensor_ranks}" if spec.has_experts else ""
    pairs = config.global_batch_size // layout.data
    console.print(
        f"{spec.family}, {parameters}; {degrees}{experts}; {pairs} pairs per step on each data-parallel rank",
        soft_wrap=True,
    )
    console.print(_memory_options(config), soft_wrap=True)
    table = Table("GiB per rank", *(f"pipeline rank {estimate.pipeline_rank}" for estimate in estimates))
    names = ["parameters", "gradients", "optimizer", "activations", "head", "backward"]
    names += ["communication"] if any(estimate.communication for estimate in estimates) else []
    for name in (*names, "total"):
        table.add_row(name, *(in_gib(getattr(estimate, name)) for estimate in estimates))
    console.print(table)


def _memory_options(config: Config) -> str:
    """One line of the precision, and of the options that change the memory and the time of a step only."""
    form = config.batching_in_use
    size = f"{config.micro_batch_size} pairs" if form == "padded" else f"up to {config.token_budget} tokens"
    fused = f"chunks of {config.chunk_tokens_in_use} tokens" if config.fused_logprob else "off"
    return (
        f"bf16: {str(config.bf16_in_use).lower()}; batching: {form}, {size}; pair_schedule: {config.pair_schedule}; "
        f"fused_logprob: {fused}; recompute: {config.recompute_granularity or 'off'}"
    )
