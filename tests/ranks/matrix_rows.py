"""The rows of the parity matrix, all and those of continuous integration, and the objectives of each row."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata

from mindspeed_simpo.config.layout import Layout
from tests.objectives import OBJECTIVES
from tests.ranks.claimed import (
    ADAPTER_COVERING,
    ADAPTER_MATRIX,
    COVERING,
    EXPERT_COVERING,
    EXPERT_MATRIX,
    LAYOUT_OF_FAMILIES,
    MATRIX,
    OPTIONS,
    OPTIONS_TOGETHER,
    Option,
)

FAMILIES = {
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "llama": {"family": "llama", "rope_scaling": "llama3"},
    "mistral": {"family": "mistral", "window": 8},
    "gemma2": {"family": "gemma2", "tied": True},
    "gemma3_text": {"family": "gemma3_text", "rope_scaling": "linear", "tied": True},
    "phi3": {"family": "phi3", "head_dim": 16, "partial": 0.5, "window": 8},
    "glm4": {"family": "glm4", "head_dim": 8},
    "shared key-value heads": {"family": "qwen2", "head_dim": 8, "heads": 7, "kv_heads": 1},
}
"""Queries share keys in all; Qwen2 has biases and a head tied to the embedding, Qwen3 wider heads with norms. Windows
are shorter than the sequences. With the last, tensor-parallel ranks share one key-value head and divide its queries
unevenly."""


EXPERT_FAMILIES = {
    "qwen3_moe": {"family": "qwen3_moe", "head_dim": 8},
    "qwen3_moe, 8 experts": {"family": "qwen3_moe", "head_dim": 8, "experts": 8},
    "mixtral": {"family": "mixtral", "window": 8},
    "glm4_moe": {"family": "glm4_moe", "head_dim": 8},
    "deepseek_v3": {"family": "deepseek_v3", "rope_scaling": "yarn"},
    "gpt_oss": {"family": "gpt_oss", "head_dim": 8, "rope_scaling": "yarn"},
}
"""A token chooses two experts, of four where the name does not say otherwise, and three of DeepSeek-V3's eight; in the
layers of the first model, one has an MLP, and GLM-4.5's and DeepSeek-V3's first."""


ON_EVERY_ROW = ("sigmoid", "sigmoid + ftx", "hinge", "hinge + ftx", "ipo", "ipo + ftx", "dpo")
"""The objectives that continuous integration has on each of its rows of the first family."""


BALANCED = {
    "sigmoid, balanced": {"moe_aux_loss_coeff": 0.5},
    "dpo, balanced": {"stage": "dpo", "moe_aux_loss_coeff": 2.0},
}
"""Objectives with the auxiliary loss of the routers, for models with experts."""


OF_FAMILIES = ("sigmoid + ftx", "dpo")
"""And on the rows of the other families, and on all rows with the older megatron-core."""


OF_EXPERTS = (*OF_FAMILIES, *BALANCED)


OF_ADAPTERS = ("sigmoid + ftx", "dpo", "alphadpo")
"""And on the rows with adapters: one without a reference, and those whose reference is the model without adapters."""


@dataclass(frozen=True)
class Row:
    """A layout, with the options that are not plain, for a family of models."""

    layout: Layout
    options: tuple[Option, ...] = ()
    family: str = "qwen2"
    adapters: tuple[str, ...] = ()
    """Adapted modules; none where all weights are trained."""
    dropout: float = 0.0
    """Of the adapters' inputs."""

    def __str__(self) -> str:
        parts = [str(self.layout), *map(str, self.options)]
        if self.adapters:
            parts.append(f"adapters {' '.join(self.adapters)}")
        if self.dropout:
            parts.append(f"dropout {self.dropout}")
        return ", ".join([*parts, self.family] if self.family != "qwen2" else parts)


def all_rows() -> list[Row]:
    """Everything that is claimed, by rising number of ranks."""
    most_axes = (*COVERING[-3:], LAYOUT_OF_FAMILIES)
    options = [Row(layout, (option,)) for option in OPTIONS for layout in option.rows]
    together = [Row(layout, options) for options in OPTIONS_TOGETHER for layout in _rows_of_all(options)]
    families = [Row(layout, family=family) for family in FAMILIES for layout in most_axes]
    packed = [option for option in OPTIONS if option.key == "batching"]
    families += [Row(option.rows[-1], (option,), family) for family in FAMILIES for option in packed]
    adapters = [Row(*row) for row in ADAPTER_MATRIX]
    rows = [*map(Row, MATRIX), *options, *together, *families, *adapters, *_expert_rows()]
    return sorted(dict.fromkeys(rows), key=lambda row: row.layout.ranks)


def _expert_rows() -> list[Row]:
    """Everything that is claimed with experts."""
    rows = [Row(layout, family=_experts_for(layout)) for layout in EXPERT_MATRIX]
    rows += [Row(layout, (option,), "qwen3_moe") for option in OPTIONS for layout in option.expert_rows]
    rows += [Row(layout, (option,), "gpt_oss") for option in OPTIONS[-2:] for layout in option.expert_rows]
    packed = [option for option in OPTIONS if option.key == "batching"]
    # values that are narrower than keys go through every form of attention
    rows += [Row(layout, (option,), "deepseek_v3") for option in packed for layout in option.expert_rows[:2]]
    return rows + [Row(layout, family=family) for family in EXPERT_FAMILIES for layout in EXPERT_COVERING]


def _experts_for(layout: Layout) -> str:
    return "qwen3_moe, 8 experts" if layout.expert > 2 and layout.expert_tensor_ranks > 1 else "qwen3_moe"


def _quick_expert_rows() -> list[Row]:
    rows = [Row(layout, family="qwen3_moe") for layout in EXPERT_COVERING]
    rows += [Row(EXPERT_COVERING[-1], family="mixtral"), Row(EXPERT_COVERING[2], family="glm4_moe")]
    rows += [Row(EXPERT_COVERING[1], family="deepseek_v3")]
    # shared prompts in a model with sinks and short windows
    rows += [Row(EXPERT_COVERING[4], OPTIONS[-1:], "gpt_oss")]
    together = [(options, options[0].expert_rows[0]) for options in OPTIONS_TOGETHER]
    return rows + [Row(layout, options, "qwen3_moe") for options, layout in together]


def quick_rows() -> list[Row]:
    """What continuous integration runs: every pair of axes, all options at once, each family, and experts.

    The layers of the families are this package's: with the older megatron-core one family stands for all.
    """
    older = megatron_version().startswith("0.12.")
    families = [] if older else [Row(LAYOUT_OF_FAMILIES, family=family) for family in FAMILIES]
    together = [Row(_rows_of_all(options)[-1], options) for options in OPTIONS_TOGETHER]
    adapters = [Row(*row) for row in ADAPTER_COVERING]
    return list(dict.fromkeys([*map(Row, COVERING), *together, *families, *adapters, *_quick_expert_rows()]))


def objectives_of(row: Row) -> tuple[str, ...]:
    """The objectives of a row in the whole matrix: all on covering rows and with every option, else a choice.

    Every objective reaches the model through the same two sums of each pair, so layouts and objectives are separable.
    """
    if row.adapters:
        return (*OF_ADAPTERS, *BALANCED) if row.family in EXPERT_FAMILIES else OF_ADAPTERS
    if row.family in EXPERT_FAMILIES:
        return OF_EXPERTS
    covering = row.layout in COVERING or bool(row.options)
    return tuple(OBJECTIVES) if row.family == "qwen2" and covering else ON_EVERY_ROW


def megatron_version() -> str:
    """Of the megatron-core that the ranks import: the first in the path."""
    return metadata.version("megatron-core")


def quick_objectives(row: Row) -> tuple[str, ...]:
    """The objectives of a row in continuous integration: all where most axes and options meet, else a choice.

    Every objective reaches the model through the same two sums of each pair, so layouts and objectives are separable.
    """
    if row.adapters:
        return (OF_ADAPTERS[0], *OF_EXPERTS[3:]) if row.family in EXPERT_FAMILIES else OF_ADAPTERS
    if row.family in EXPERT_FAMILIES:
        return OF_EXPERTS[1:]
    if row.family != "qwen2" or megatron_version().startswith("0.12."):
        return OF_FAMILIES
    return tuple(OBJECTIVES) if row in _rows_of_all_objectives() else ON_EVERY_ROW


@functools.cache
def _rows_of_all_objectives() -> frozenset[Row]:
    together = [Row(_rows_of_all(options)[-1], options) for options in OPTIONS_TOGETHER[1:]]
    return frozenset({Row(COVERING[-1]), *together})


def _rows_of_all(options: tuple[Option, ...]) -> list[Layout]:
    """The topologies of the option that has the fewest axes; every one of them claims these axes."""
    narrowest = min(options, key=lambda option: len(option.axes))
    return [layout for layout in narrowest.rows if all(layout.axes <= option.axes for option in options)]
