"""What ``mindspeed-simpo check`` warns of: settings, lengths of runs, token budgets, memory, tokens of the pairs."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

from transformers import PreTrainedTokenizerBase

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.dataset import PairDataset
from mindspeed_simpo.objectives import OBJECTIVES
from mindspeed_simpo.training.memory import MemoryEstimate

INSPECTED_PAIRS = 2000
"""Largest number of pairs of each part, evenly spaced, whose token ids are inspected."""
ADAPTER_LR = 10
"""The learning rate of adapters, over that of all weights."""


def setting_warnings(config: Config) -> Iterator[str]:
    """Warnings about hyper-parameters outside the range of the objective's published runs, and about unused keys."""
    yield from config.objective.warnings(config.keys_of(config.objective))
    for objective in OBJECTIVES.values():
        changed = [name for name, key in objective.keys.model_fields.items() if getattr(config, name) != key.default]
        if changed and objective.stage != config.stage:
            yield f"{', '.join(changed)}: no effect, because the stage is {config.stage}"
    if config.init_from == "config":
        yield "init_from: config starts from random weights; preference training normally starts from a tuned model"
        return
    factor = ADAPTER_LR if config.lora_r else 1
    lowest, highest = (factor * rate for rate in config.objective.learning_rates)
    if not lowest <= config.lr <= highest:
        degrades = "; ten times as much is known to degrade models" if config.lr >= 10 * highest else ""
        runs = f"published runs of {config.objective.title} use {lowest:g} to {highest:g}"
        if config.lora_r:
            runs = (
                f"adapters want about {ADAPTER_LR} times the lr of {config.objective.title}, {lowest:g} to {highest:g}"
            )
        yield f"lr {config.lr:g}: {runs}{degrades}"


def run_length_warnings(config: Config, num_pairs: int) -> Iterator[str]:
    """Warnings about a global batch larger than the training data, and about more than three passes over the data."""
    if num_pairs < config.global_batch_size:
        yield f"the {num_pairs} training pairs do not fill one global batch of {config.global_batch_size}"
        return
    epochs, key = config.num_train_epochs or 1, f"num_train_epochs {config.num_train_epochs}"
    passes = float(epochs)
    if config.train_iters is not None:
        passes = config.train_iters * config.global_batch_size / num_pairs
        key = f"train_iters {config.train_iters}"
    if passes > 3:
        yield f"{key} makes {passes:.1f} passes over the pairs; the paper's runs make one"


def token_budget_warnings(config: Config, parts: dict[str, PairDataset]) -> Iterator[str]:
    """Warnings about pairs with more tokens than ``max_tokens_per_micro_batch``."""
    if config.batching_in_use == "padded":
        return
    batching = Batching.of(config)
    for part, dataset in parts.items():
        sizes = [batching.size_of(*lengths) for lengths in dataset.lengths.tolist()]
        if above := [size for size in sizes if size > batching.max_tokens]:
            yield (
                f"{part}: {len(above)} of {len(sizes)} pairs have more than max_tokens_per_micro_batch "
                f"{batching.max_tokens} tokens, up to {max(above)}: each is a micro-batch of its own"
            )


def answer_warnings(config: Config, parts: dict[str, PairDataset], divided: int) -> Iterator[str]:
    """Warnings about what ``eval_generate`` cannot do, and about its memory where ranks divide the model.

    Args:
        config: Of the run.
        parts: Data that could be read.
        divided: Parameters of a model that several ranks divide, else 0.
    """
    if not config.eval_generate or "eval" not in parts:
        return
    if parts["eval"].has_images:
        yield "eval_generate: no answers are generated: the held-out prompts have images"
        return
    if len(parts["eval"]) < config.eval_generate:
        yield f"eval_generate {config.eval_generate}: there are only {len(parts['eval'])} held-out pairs"
    if divided:
        yield (
            f"eval_generate: at each evaluation rank 0 holds the whole model beside its own part, "
            f"{in_gib(divided * (2 if config.bf16_in_use else 4))} GiB on its device, and in host memory for a moment"
        )


def memory_warnings(config: Config, layout: Layout, estimates: Sequence[MemoryEstimate]) -> Iterator[str]:
    """Warning about a CPU run that needs more memory than this host has."""
    needed = layout.tensor * layout.context * layout.data * sum(estimate.total for estimate in estimates)
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if config.device == "cpu" and needed > present:
        yield f"the ranks need about {in_gib(needed)} GiB together; this host has {in_gib(present)} GiB"


def token_warnings(parts: dict[str, PairDataset], tokenizer: PreTrainedTokenizerBase, end: int) -> Iterator[str]:
    """Warnings about double or missing BOS and missing end-of-turn tokens."""
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a")["input_ids"][0] == bos
    for part, dataset in parts.items():
        pairs = _inspected(dataset)
        problems: dict[str, Callable[[TokenizedPair], bool]] = {
            "begin with two BOS tokens": lambda pair: bos is not None and pair.prompt_ids[:2] == [bos, bos],
            "begin without the BOS token that the tokenizer gives plain text": lambda pair: (
                adds_bos and pair.prompt_ids[:1] != [bos]
            ),
            "lost the end-of-turn token of a response to truncation": lambda pair: (
                pair.chosen_ids[-1] != end or pair.rejected_ids[-1] != end
            ),
        }
        for problem, has in problems.items():
            if found := [pair for pair in pairs if has(pair)]:
                yield f"{part}: {len(found)} of {len(pairs)} inspected pairs {problem}, first {found[0].source}"


def _inspected(dataset: PairDataset) -> list[TokenizedPair]:
    return [dataset[index] for index in range(0, len(dataset), -(-len(dataset) // INSPECTED_PAIRS))]


def in_gib(size: int) -> str:
    """Bytes as GiB, three digits."""
    return f"{size / 2**30:.3g}"
