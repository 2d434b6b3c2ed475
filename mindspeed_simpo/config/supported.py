"""The layouts that the project claims to compute exactly, in one list: the rows of the parity matrix.

``scripts/parity.py`` holds every row to the dense oracle; a configuration whose combination of axes stands in no row is
refused. What is claimed is the combination: the size of an axis is free beyond the sizes that the rows have.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

AXES = {
    "TP": "tensor_model_parallel_size",
    "SP": "sequence_parallel",
    "CP": "context_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "VPP": "num_layers_per_virtual_pipeline_stage",
    "DP": "data parallelism (more ranks than TP x CP x PP)",
    "DO": "use_distributed_optimizer",
}
"""The configuration key that turns each axis on."""


PLAIN: dict[str, object] = {
    "pair_schedule": "concat",
    "batching": "padded",
    "fused_logprob": False,
    "overlap_grad_reduce": False,
    "recompute_granularity": None,
}
"""The keys that change how the same numbers are computed, at the values that the matrix starts from."""


@dataclass(frozen=True)
class Topology:
    """Sizes of the parallel axes, and the switches that change what is exchanged along them."""

    tensor: int = 1
    context: int = 1
    pipeline: int = 1
    data: int = 1
    sequence_parallel: bool = False
    virtual_stages: bool = False
    distributed_optimizer: bool = False

    @property
    def ranks(self) -> int:
        """Processes that it takes."""
        return self.tensor * self.context * self.pipeline * self.data

    @property
    def axes(self) -> frozenset[str]:
        """The axes in use, of ``AXES``; sequence parallelism does nothing on one tensor-parallel rank."""
        used = {
            "TP": self.tensor > 1,
            "SP": self.sequence_parallel and self.tensor > 1,
            "CP": self.context > 1,
            "PP": self.pipeline > 1,
            "VPP": self.virtual_stages,
            "DP": self.data > 1,
            "DO": self.distributed_optimizer,
        }
        return frozenset(axis for axis, on in used.items() if on)

    def __str__(self) -> str:
        sizes = {"TP": self.tensor, "CP": self.context, "PP": self.pipeline, "DP": self.data}
        parts = [f"{axis}{sizes.get(axis, '')}" for axis in AXES if axis in self.axes]
        return " ".join(parts) or "one rank"


@dataclass(frozen=True)
class Option:
    """A value of a key of ``PLAIN``, other than the one there."""

    key: str
    value: object
    rows: tuple[Topology, ...]
    """Where the matrix has it; their axes are those that it may be combined with."""
    companions: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Keys that have to be set with it."""
    excludes: tuple[tuple[str, object], ...] = ()
    """Other options that it cannot be combined with."""

    def __str__(self) -> str:
        return f"{self.key}: {self.value}"

    @property
    def axes(self) -> frozenset[str]:
        """Every axis of its rows."""
        return frozenset().union(*(row.axes for row in self.rows))


def _products(sizes: Iterable[int], most_ranks: int) -> Iterator[Topology]:
    """Every topology of these sizes, the pipeline's 3 besides, that fits the ranks."""
    sizes = tuple(sizes)
    switches = (False, True)
    for tensor, context, pipeline, data in itertools.product(sizes, sizes, (1, 2, 3, 4), sizes):
        if tensor * context * pipeline * data > most_ranks:
            continue
        for sequence, virtual, sharded in itertools.product(switches, switches, switches):
            if (sequence and tensor == 1) or (virtual and pipeline == 1):
                continue
            yield Topology(tensor, context, pipeline, data, sequence, virtual, sharded)


_ODD_SIZES = (
    Topology(tensor=3),
    Topology(tensor=3, sequence_parallel=True),
    Topology(context=3),
    Topology(data=3, distributed_optimizer=True),
    Topology(tensor=3, pipeline=2, sequence_parallel=True),
    Topology(tensor=2, context=3, sequence_parallel=True, distributed_optimizer=True),
    Topology(context=3, data=2),
)
# All four sizes above one at a time take 16 ranks.
_FOUR_AXES = tuple(
    Topology(2, 2, 2, 2, sequence, virtual, sharded)
    for sequence, virtual, sharded in itertools.product((False, True), repeat=3)
)

MATRIX: tuple[Topology, ...] = (*_products((1, 2, 4), most_ranks=8), *_ODD_SIZES, *_FOUR_AXES)
"""The rows of the matrix in which every option is plain."""

COVERING: tuple[Topology, ...] = (
    Topology(tensor=2),
    Topology(tensor=4),
    Topology(tensor=2, sequence_parallel=True),
    Topology(context=2),
    Topology(context=4),
    Topology(pipeline=2),
    Topology(pipeline=3),
    Topology(pipeline=2, virtual_stages=True),
    Topology(data=2),
    Topology(tensor=2, context=2),
    Topology(tensor=2, context=2, pipeline=2),
    Topology(context=2, data=2, distributed_optimizer=True),
    Topology(2, 2, 2, 1, sequence_parallel=True, virtual_stages=True, distributed_optimizer=True),
    Topology(2, 1, 2, 2, sequence_parallel=True, virtual_stages=True, distributed_optimizer=True),
)
"""Few rows in which every axis, and every pair of axes, occurs: what continuous integration runs."""

_PAIRS_OF_AXES = COVERING[-3:]

_WHOLE_ROWS = (
    Topology(),
    Topology(tensor=4),
    Topology(tensor=2, data=2, sequence_parallel=True, distributed_optimizer=True),
    Topology(tensor=2, pipeline=2, sequence_parallel=True),
    Topology(pipeline=3, data=2),
    Topology(2, 1, 2, 2, sequence_parallel=True, distributed_optimizer=True),
)
"""Packed rows are cut by tokens, not by context ranks, and differ in length, which virtual stages cannot exchange."""

# a budget that gives several micro-batches, and not equally many to all ranks
_BUDGET = {"max_tokens_per_micro_batch": 60}
_SPLIT, _TWO_PASS = ("pair_schedule", "split"), ("pair_schedule", "two_pass")
_PACKED = Option("batching", "packed", _WHOLE_ROWS, _BUDGET, excludes=(_SPLIT,))
_PREFIX_SHARED = Option("batching", "prefix_shared", _WHOLE_ROWS, _BUDGET, excludes=(_SPLIT, _TWO_PASS))

OPTIONS: tuple[Option, ...] = (
    Option("pair_schedule", "split", _PAIRS_OF_AXES),
    Option("pair_schedule", "two_pass", _PAIRS_OF_AXES),
    # a chunk that does not divide the tokens
    Option("fused_logprob", True, _PAIRS_OF_AXES, {"logprob_chunk_tokens": 7}),
    Option("overlap_grad_reduce", True, _PAIRS_OF_AXES),
    Option("recompute_granularity", "full", _PAIRS_OF_AXES, {"recompute_method": "uniform", "recompute_num_layers": 1}),
    Option("recompute_granularity", "selective", _PAIRS_OF_AXES),
    _PACKED,
    _PREFIX_SHARED,
)
"""Values of keys that the matrix holds beside the plain ones; any other value of these keys is refused."""

OPTIONS_TOGETHER: tuple[tuple[Option, ...], ...] = (
    OPTIONS[1:5],
    (_PACKED, *OPTIONS[1:5]),
    (_PREFIX_SHARED, *OPTIONS[2:5]),
)
"""Options that the matrix also has all at once: without packing, packed, and with shared prompts."""


def refusal(topology: Topology, options: Mapping[str, object]) -> str | None:
    """Why a run may not use this topology with these options; None where it may.

    Args:
        topology: What the configuration and the number of ranks ask for.
        options: Keys of ``PLAIN`` with their values.
    """
    where = "what no row of the parity matrix checks (docs/numerics.md) is refused"
    if not any(row.axes == topology.axes for row in MATRIX):
        return f"{_named(topology.axes)} together are not claimed to be exact: {where}; turn one of them off"
    for key, value in options.items():
        if value == PLAIN[key]:
            continue
        claimed = next((option for option in OPTIONS if (option.key, option.value) == (key, value)), None)
        if claimed is None:
            return f"{key}: {value} is not claimed to be exact: {where}; remove it"
        others = [f"{other}: {excluded}" for other, excluded in claimed.excludes if options.get(other) == excluded]
        if not topology.axes <= claimed.axes:
            others.append(_named(topology.axes - claimed.axes))
        if others:
            return (
                f"{key}: {value} is not claimed to be exact with {', '.join(others)}: {where}; "
                f"remove {key} or turn the other off"
            )
    return None


def _named(axes: frozenset[str]) -> str:
    return " and ".join(AXES[axis] for axis in AXES if axis in axes)
