"""The parity matrix: one step of the engine at a topology, by each objective, against the dense fp64 oracle."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from mindspeed_simpo.config import supported
from mindspeed_simpo.config.supported import Option, Topology
from mindspeed_simpo.objectives import OBJECTIVES as DECLARED
from tests import oracle
from tests.hf import make_checkpoint, make_token_pairs
from tests.objectives import OBJECTIVES, STATISTICS, stage_of
from tests.ranks.parity import Run, engine_runs, worst_error

LOSS, GRADIENT, PARAMETER = 1e-6, 1e-5, 1e-5
"""The contract: relative error of the loss, relative L2 distance of each gradient and of each updated parameter."""

FAMILIES = {
    "qwen2": {"family": "qwen2", "tied": True},
    "qwen3": {"family": "qwen3", "head_dim": 16},
    "llama": {"family": "llama", "rope_scaling": "llama3"},
    "mistral": {"family": "mistral"},
}
"""Queries share keys in all; Qwen2 has biases and a head tied to the embedding, Qwen3 wider heads with norms."""

ON_EVERY_ROW = ("sigmoid", "sigmoid + ftx", "hinge", "hinge + ftx", "ipo", "ipo + ftx", "dpo")
"""The objectives that continuous integration has on every one of its rows."""

LR = 1e-3
# Adam's first step is lr * g / (|g| + eps): an epsilon far above fp32's noise keeps it from scaling that noise up.
ADAM = {"adam_eps": 1e-5, "weight_decay": 0.1, "clip_grad": 0.5}
VOCABULARY = 517
_LONGEST = 18


@dataclass(frozen=True)
class Row:
    """A topology, with the options that are not plain, for a family of models."""

    topology: Topology
    options: tuple[Option, ...] = ()
    family: str = "qwen2"

    def __str__(self) -> str:
        parts = [str(self.topology), *map(str, self.options)]
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
    most_axes = supported.COVERING[-3:]
    options = [Row(topology, (option,)) for option in supported.OPTIONS for topology in option.rows]
    together = [Row(topology, options) for options in supported.OPTIONS_TOGETHER for topology in _rows_of_all(options)]
    families = [Row(topology, family=family) for family in FAMILIES for topology in most_axes]
    rows = [*map(Row, supported.MATRIX), *options, *together, *families]
    return sorted(dict.fromkeys(rows), key=lambda row: row.topology.ranks)


def quick_rows() -> list[Row]:
    """What continuous integration runs: every pair of axes, all options at once, and each family."""
    most_axes = supported.COVERING[-1]
    families = [Row(most_axes, family=family) for family in FAMILIES]
    together = [Row(_rows_of_all(options)[-1], options) for options in supported.OPTIONS_TOGETHER]
    return list(dict.fromkeys([*map(Row, supported.COVERING), *together, *families]))


def quick_objectives(row: Row) -> tuple[str, ...]:
    """The objectives of a row in continuous integration: all where most axes and options meet, else a choice.

    Every objective reaches the model through the same two sums of each pair, so layouts and objectives are separable.
    """
    return tuple(OBJECTIVES) if row in _rows_of_all_objectives() else ON_EVERY_ROW


@functools.cache
def _rows_of_all_objectives() -> frozenset[Row]:
    together = [Row(_rows_of_all(options)[-1], options) for options in supported.OPTIONS_TOGETHER[1:]]
    return frozenset({Row(supported.COVERING[-2]), *together})


def _rows_of_all(options: tuple[Option, ...]) -> list[Topology]:
    """The topologies of the option that has the fewest axes; every one of them claims these axes."""
    narrowest = min(options, key=lambda option: len(option.axes))
    return [topology for topology in narrowest.rows if all(topology.axes <= option.axes for option in options)]


@dataclass(frozen=True)
class _Shape:
    family: str
    layers: int
    heads: int
    kv_heads: int
    pairs: int


def _shape_of(topology: Topology, family: str) -> _Shape:
    """A model and a global batch that the topology divides; four layers are uneven on three stages."""
    layers = {3: 6, 4: 8}.get(topology.pipeline, 4) if topology.virtual_stages else 4
    heads, kv_heads = (6, 3) if topology.tensor == 3 else (8, 4)
    return _Shape(family, layers, heads, kv_heads, pairs=6 if 3 in (topology.data, topology.pipeline) else 8)


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
        self._references = functools.cache(self._reference_sums)
        self._expected = functools.cache(self._by_oracle)

    def cells(self, row: Row, objectives=tuple(OBJECTIVES), prepare=None) -> list[Cell]:
        """One optimizer step by each objective; ``prepare`` as :func:`tests.ranks.parity.engine_runs` takes it."""
        shape = _shape_of(row.topology, row.family)
        runs = [self._run(shape, name) for name in objectives]
        keys = {**ADAM, "lr": LR, "lr_decay_style": "constant", **layout_keys(row.topology, shape.layers, shape.pairs)}
        for option in row.options:
            keys |= {option.key: option.value, **option.companions}
        batches = [global_batch(shape.pairs)]
        results = engine_runs(self._checkpoint(shape), batches, runs, prepare, timeout_s=900, **keys)
        return [
            _compare(row, objective, result, *self._expected(shape, objective))
            for objective, result in zip(objectives, results, strict=True)
        ]

    def _run(self, shape: _Shape, objective: str) -> Run:
        declared = DECLARED[stage_of(objective)]
        return Run(
            OBJECTIVES[objective],
            references=self._references(shape) if declared.needs_reference else None,
            running=STATISTICS if declared.tracked is not None else None,
        )

    def _make_checkpoint(self, shape: _Shape, seed=0) -> Path:
        options = FAMILIES[shape.family] | {"heads": shape.heads, "kv_heads": shape.kv_heads}
        folder = self._folder / f"{shape.family}-{shape.layers}-{shape.heads}-{seed}"
        if not folder.exists():
            make_checkpoint(
                folder, hidden=48, layers=shape.layers, vocab_size=VOCABULARY, std=0.15, seed=seed, **options
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

    def _by_oracle(self, shape: _Shape, objective: str):
        """Loss, gradient norm, gradients and updated parameters."""
        options = oracle.Options(**OBJECTIVES[objective], **ADAM)
        pairs = [pair for pair in global_batch(shape.pairs) if pair]
        folder, reference = self._checkpoint(shape), self._make_checkpoint(shape, seed=1)
        grads = oracle.gradients(folder, pairs, options, reference, oracle.Running(STATISTICS))
        [(loss, grad_norm)], params = oracle.train(
            folder, [pairs], [LR], options, reference, oracle.Running(STATISTICS)
        )
        return loss, grad_norm, grads, {name: param.detach() for name, param in params.items()}


def layout_keys(topology: Topology, num_layers, num_pairs):
    """The configuration keys of a topology, and the micro-batches that its pipeline needs."""
    stages = topology.pipeline
    size = 2 if num_pairs % (2 * topology.data) == 0 else 1
    if topology.virtual_stages and num_pairs // (size * topology.data) % stages:
        size = 1
    return {
        "tensor_model_parallel_size": topology.tensor,
        "context_parallel_size": topology.context,
        "pipeline_model_parallel_size": stages,
        "data_parallel_size": topology.data,
        "sequence_parallel": topology.sequence_parallel,
        "use_distributed_optimizer": topology.distributed_optimizer,
        "num_layers_per_virtual_pipeline_stage": num_layers // (2 * stages) if topology.virtual_stages else None,
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
