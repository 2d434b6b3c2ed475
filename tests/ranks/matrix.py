"""The parity matrix: one step of the engine at a layout, by each objective, against the dense fp64 oracle."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.objectives import OBJECTIVES as DECLARED
from tests import oracle, oracle_adapters
from tests.hf import make_adapter, make_checkpoint, make_token_pairs
from tests.objectives import OBJECTIVES, STATISTICS
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
from tests.ranks.parity import Run, engine_runs, worst_error

LOSS, GRADIENT, PARAMETER = 1e-6, 1e-5, 1e-5
"""The contract: relative error of the loss, relative L2 distance of each gradient and of each updated parameter."""

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
FORMS = OBJECTIVES | BALANCED
OF_FAMILIES = ("sigmoid + ftx", "dpo")
"""And on the rows of the other families, and on all rows with the older megatron-core."""

OF_EXPERTS = (*OF_FAMILIES, *BALANCED)
OF_ADAPTERS = ("sigmoid + ftx", "dpo", "alphadpo")
"""And on the rows with adapters: one without a reference, and those whose reference is the model without adapters."""
ADAPTER_RANK, ADAPTER_ALPHA = 3, 12.0

SEED = 2_000_000_007
"""Of the masks of dropout."""

LR = 1e-3
# Adam's first step is lr * g / (|g| + eps): an epsilon far above fp32's noise keeps it from scaling that noise up.
ADAM = {"adam_eps": 1e-5, "weight_decay": 0.1, "clip_grad": 0.5}
VOCABULARY, HIDDEN = 517, 48
_LONGEST = 18


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


@dataclass(frozen=True)
class Cell:
    """How far one step of a row, by one objective, is from the oracle's."""

    row: Row
    objective: str
    loss: float
    grad_norm: float
    gradient: float
    gradient_of: str
    parameter: float
    parameter_of: str

    @property
    def holds(self) -> bool:
        """Whether it is within the contract; numbers that are not finite are not."""
        errors = (self.loss, LOSS), (self.grad_norm, GRADIENT), (self.gradient, GRADIENT), (self.parameter, PARAMETER)
        return all(error <= limit for error, limit in errors)


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
    """What continuous integration runs: every pair of axes, all options at once, each family, and experts."""
    families = [Row(LAYOUT_OF_FAMILIES, family=family) for family in FAMILIES]
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


@dataclass(frozen=True)
class _Shape:
    family: str
    layers: int
    heads: int
    kv_heads: int
    pairs: int


def _shape_of(layout: Layout, family: str) -> _Shape:
    """A model and a global batch that the layout divides; four layers are uneven on three stages."""
    layers = {3: 6, 4: 8}.get(layout.pipeline, 4) if layout.virtual_pipeline else 4
    heads, kv_heads = (6, 3) if layout.tensor == 3 else (8, 4)
    return _Shape(family, layers, heads, kv_heads, pairs=6 if 3 in (layout.data, layout.pipeline) else 8)


def boundary_ids(vocab_size, ranks=(2, 3, 4)):
    """First and last id, and both ids at each boundary of the shards of a vocabulary padded to equal parts."""
    edges = {0, vocab_size - 1}
    for size in ranks:
        shard = -(-vocab_size // size)
        edges |= {start - side for start in range(shard, vocab_size, shard) for side in (0, 1)}
    return sorted(edges)


def global_batch(num_pairs, vocab_size=VOCABULARY):
    """Pairs with the labels that break sharded softmaxes, one-token responses, and at the end a filler pair."""
    pairs = make_token_pairs(num_pairs - 1, vocab_size, max_response=_LONGEST - 2)
    edges = boundary_ids(vocab_size)
    assert len(edges) <= _LONGEST
    pairs[0] = (pairs[0][0], edges, edges[::-1])
    return [*pairs, None]


class Matrix:
    """Cells of the matrix; checkpoints and the oracle's results are kept under ``folder`` and in memory."""

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._checkpoint = functools.cache(self._make_checkpoint)
        self._adapters = functools.cache(self._make_adapters)
        self._references = functools.cache(self._reference_sums)
        self._expected = functools.cache(self._by_oracle)

    def cells(self, row: Row, objectives=tuple(OBJECTIVES), prepare=None) -> list[Cell]:
        """One optimizer step by each objective; ``prepare`` as :func:`tests.ranks.parity.engine_runs` takes it."""
        shape = _shape_of(row.layout, row.family)
        runs = [self._run(shape, name, row.adapters) for name in objectives]
        keys = {**ADAM, "lr": LR, "lr_decay_style": "constant", **layout_keys(row.layout, shape.layers, shape.pairs)}
        if row.adapters:
            folder = self._adapters(shape, row.adapters)
            keys |= {"lora_r": ADAPTER_RANK, "lora_alpha": ADAPTER_ALPHA, "lora_load": str(folder)}
            keys |= {"lora_target_modules": list(row.adapters), "lora_dropout": row.dropout, "seed": SEED}
        for option in row.options:
            keys |= {option.key: option.value, **option.companions}
        batches = [global_batch(shape.pairs)]
        results = engine_runs(self._checkpoint(shape), batches, runs, prepare, timeout_s=900, **keys)
        return [
            _compare(row, objective, result, *self._expected(shape, objective, row.adapters, row.dropout))
            for objective, result in zip(objectives, results, strict=True)
        ]

    def _run(self, shape: _Shape, objective: str, adapters: tuple[str, ...]) -> Run:
        declared = DECLARED[FORMS[objective].get("stage", "simpo")]
        return Run(
            FORMS[objective],
            references=self._references(shape) if declared.needs_reference and not adapters else None,
            running=STATISTICS if declared.tracked is not None else None,
        )

    def _make_checkpoint(self, shape: _Shape, seed=0) -> Path:
        options = {"heads": shape.heads, "kv_heads": shape.kv_heads} | (FAMILIES | EXPERT_FAMILIES)[shape.family]
        folder = self._folder / f"{shape.family}-{shape.layers}-{shape.heads}-{seed}"
        if not folder.exists():
            make_checkpoint(
                folder, hidden=HIDDEN, layers=shape.layers, vocab_size=VOCABULARY, std=0.15, seed=seed, **options
            )
        return folder

    def _reference_sums(self, shape: _Shape) -> list[list[float]]:
        """The oracle's sums under other weights; what stands in the row of a filler pair is never used."""
        params, config = oracle.load(self._make_checkpoint(shape, seed=1))
        return [
            [oracle.sequence_logprob(params, config, pair[0], ids)[0].item() for ids in pair[1:]]
            if pair
            else [0.0, 0.0]
            for pair in global_batch(shape.pairs)
        ]

    def _make_adapters(self, shape: _Shape, modules: tuple[str, ...]) -> Path:
        base = self._checkpoint(shape)
        folder = base.with_name(f"{base.name}-{'-'.join(modules)}")
        if not folder.exists():
            make_adapter(folder, base, modules, r=ADAPTER_RANK, alpha=ADAPTER_ALPHA)
        return folder

    def _by_oracle(self, shape: _Shape, objective: str, adapters: tuple[str, ...], dropout: float):
        """Loss, gradient norm, gradients and updated parameters."""
        options = oracle.Options(**FORMS[objective], **ADAM)
        pairs = [pair for pair in global_batch(shape.pairs) if pair]
        if adapters:
            folders = self._checkpoint(shape), self._adapters(shape, adapters)
            statistics = oracle.Running(STATISTICS)
            return oracle_adapters.train_step(*folders, pairs, LR, options, statistics, dropout, SEED)
        folder, reference = self._checkpoint(shape), self._make_checkpoint(shape, seed=1)
        grads = oracle.gradients(folder, pairs, options, reference, oracle.Running(STATISTICS))
        [(loss, grad_norm)], params = oracle.train(
            folder, [pairs], [LR], options, reference, oracle.Running(STATISTICS)
        )
        return loss, grad_norm, grads, {name: param.detach() for name, param in params.items()}


def layout_keys(layout: Layout, num_layers, num_pairs):
    """The configuration keys of a layout, and the micro-batches that its pipeline needs."""
    stages = layout.pipeline
    size = 2 if num_pairs % (2 * layout.data) == 0 else 1
    if layout.virtual_pipeline and num_pairs // (size * layout.data) % stages:
        size = 1
    return {
        "tensor_model_parallel_size": layout.tensor,
        "context_parallel_size": layout.context,
        "pipeline_model_parallel_size": stages,
        "data_parallel_size": layout.data,
        "sequence_parallel": layout.sequence_parallel,
        "use_distributed_optimizer": layout.distributed_optimizer,
        "expert_model_parallel_size": layout.expert,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "num_layers_per_virtual_pipeline_stage": num_layers // (2 * stages) if layout.virtual_pipeline else None,
        "micro_batch_size": size,
    }


def _compare(row, objective, result, loss, grad_norm, grads, params) -> Cell:
    return Cell(
        row,
        objective,
        abs(result["losses"][0] - loss) / abs(loss),
        abs(result["grad_norms"][0] - grad_norm) / grad_norm,
        *worst_error(result["grads"], grads),
        *worst_error(result["params"], params),
    )
