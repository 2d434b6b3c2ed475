"""The parity matrix: one step of the engine at a layout, by each objective, against the dense fp64 oracle."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.objectives import OBJECTIVES as DECLARED
from tests import oracle, oracle_adapters
from tests.hf import make_checkpoint, make_token_pairs
from tests.hf_adapters import make_adapter
from tests.objectives import OBJECTIVES, STATISTICS
from tests.ranks.matrix_rows import BALANCED, EXPERT_FAMILIES, FAMILIES, Row
from tests.ranks.parity import Run, engine_runs, worst_error

LOSS, GRADIENT, PARAMETER = 1e-6, 1e-5, 1e-5
"""The contract: relative error of the loss, relative L2 distance of each gradient and of each updated parameter."""


FORMS = OBJECTIVES | BALANCED

ADAPTER_RANK, ADAPTER_ALPHA = 3, 12.0

SEED = 2_000_000_007
"""Of the masks of dropout."""

LR = 1e-3
# Adam's first step is lr * g / (|g| + eps): an epsilon far above fp32's noise keeps it from scaling that noise up.
ADAM = {"adam_eps": 1e-5, "weight_decay": 0.1, "clip_grad": 0.5}
VOCABULARY, HIDDEN = 517, 48
_LONGEST = 18


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
        step = oracle.train_step(folder, pairs, LR, options, reference, oracle.Running(STATISTICS))
        loss, grad_norm, grads, params = step
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
