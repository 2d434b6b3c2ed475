"""The rows of the parity matrix: layouts and options, chosen so that they cover every claim of ``config.supported``."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mindspeed_simpo.config.layout import Layout


def _products(sizes: Iterable[int], most_ranks: int) -> Iterator[Layout]:
    """Every layout of these sizes, the pipeline's 3 besides, that fits the ranks."""
    sizes = tuple(sizes)
    switches = (False, True)
    for tensor, context, pipeline, data in itertools.product(sizes, sizes, (1, 2, 3, 4), sizes):
        if tensor * context * pipeline * data > most_ranks:
            continue
        for sequence, virtual, sharded in itertools.product(switches, switches, switches):
            if (sequence and tensor == 1) or (virtual and pipeline == 1):
                continue
            yield Layout(tensor, context, pipeline, data, sequence, virtual, sharded)


_ODD_SIZES = (
    Layout(tensor=3),
    Layout(tensor=3, sequence_parallel=True),
    Layout(context=3),
    Layout(data=3, distributed_optimizer=True),
    Layout(tensor=3, pipeline=2, sequence_parallel=True),
    Layout(tensor=2, context=3, sequence_parallel=True, distributed_optimizer=True),
    Layout(context=3, data=2),
)
# All four sizes above one at a time take 16 ranks.
_FOUR_AXES = tuple(
    Layout(2, 2, 2, 2, sequence, virtual, sharded)
    for sequence, virtual, sharded in itertools.product((False, True), repeat=3)
)

MATRIX: tuple[Layout, ...] = (*_products((1, 2, 4), most_ranks=8), *_ODD_SIZES, *_FOUR_AXES)
"""The rows of the matrix in which every option is plain."""

COVERING: tuple[Layout, ...] = (
    Layout(tensor=2),
    Layout(tensor=4),
    Layout(tensor=2, sequence_parallel=True),
    Layout(context=2),
    Layout(context=4),
    Layout(pipeline=2),
    Layout(pipeline=3),
    Layout(pipeline=2, virtual_pipeline=True),
    Layout(data=2),
    Layout(tensor=2, context=2),
    Layout(tensor=2, context=2, pipeline=2),
    Layout(context=2, data=2, distributed_optimizer=True),
    Layout(2, 2, 2, 1, sequence_parallel=True, virtual_pipeline=True, distributed_optimizer=True),
    Layout(2, 1, 2, 2, sequence_parallel=True, virtual_pipeline=True, distributed_optimizer=True),
)
"""Few rows in which every axis, and every pair of axes, occurs: what continuous integration runs."""

LAYOUT_OF_FAMILIES = Layout(tensor=2, pipeline=2, sequence_parallel=True, virtual_pipeline=True)
"""The row of each family in continuous integration."""

_PAIRS_OF_AXES = COVERING[-3:]


def _with_experts(layout: Layout) -> Iterator[Layout]:
    """The layout with expert parallelism, with another expert TP, and with both; with more ranks where needed."""
    other = 2 if layout.tensor == 1 else 1
    for expert, expert_tensor in ((2, None), (1, other), (2, other)):
        found = dataclasses.replace(layout, expert=expert, expert_tensor=expert_tensor)
        needed = expert * found.expert_tensor_ranks
        if found.tensor * found.context * found.data % needed:
            grown = {"data": 4} if found.data > 1 else {"context": 4} if found.context > 1 else {}
            found = dataclasses.replace(found, **grown)
        if found.tensor * found.context * found.data % needed == 0:
            yield found


EXPERT_COVERING: tuple[Layout, ...] = (
    Layout(tensor=2),
    Layout(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1),
    Layout(pipeline=2, data=2, virtual_pipeline=True, distributed_optimizer=True, expert_tensor=2),
    Layout(pipeline=2, data=2, virtual_pipeline=True, expert=2),
    Layout(context=2, data=2, distributed_optimizer=True, expert=2, expert_tensor=2),
    Layout(tensor=2, data=2, expert=4, expert_tensor=1),
)
"""Rows for models with experts in which EP and expert TP meet every other axis: what continuous integration runs."""

EXPERT_MATRIX: tuple[Layout, ...] = tuple(
    dict.fromkeys(
        [
            *EXPERT_COVERING,
            *(found for layout in (*_products((1, 2), 8), *_FOUR_AXES) for found in _with_experts(layout)),
            Layout(data=4, expert=4),
            Layout(data=4, pipeline=2, expert=4, distributed_optimizer=True),
            Layout(context=2, data=2, expert=4),
            Layout(tensor=2, data=2, sequence_parallel=True, expert=4, expert_tensor=1),
            Layout(tensor=2, context=2, data=2, sequence_parallel=True, expert=4, distributed_optimizer=True),
            Layout(data=8, expert=4, expert_tensor=2, distributed_optimizer=True),
        ]
    )
)
"""The rows of models with experts in which every option is plain."""

_EXPERT_ROWS = (
    Layout(context=2, data=2, distributed_optimizer=True, expert=2, expert_tensor=2),
    Layout(tensor=2, pipeline=2, sequence_parallel=True, virtual_pipeline=True, expert=2, expert_tensor=1),
)
_PACKED_EXPERT_ROWS = (
    *_EXPERT_ROWS,
    Layout(data=4, distributed_optimizer=True, expert=2, expert_tensor=2),
    Layout(tensor=2, pipeline=2, data=2, sequence_parallel=True, expert=2),
)

_PACKED_ROWS = (
    Layout(),
    Layout(tensor=4),
    Layout(context=2),
    Layout(context=3),
    Layout(context=4),
    Layout(pipeline=2, virtual_pipeline=True),
    Layout(tensor=2, context=2, sequence_parallel=True),
    Layout(tensor=2, data=2, sequence_parallel=True, distributed_optimizer=True),
    Layout(tensor=2, pipeline=2, sequence_parallel=True),
    Layout(pipeline=3, data=2),
    Layout(2, 1, 2, 2, sequence_parallel=True, virtual_pipeline=True, distributed_optimizer=True),
    Layout(2, 2, 2, 1, sequence_parallel=True, virtual_pipeline=True, distributed_optimizer=True),
    Layout(context=2, data=2, distributed_optimizer=True),
    Layout(context=2, pipeline=2, virtual_pipeline=True),
)
"""Of the packed forms, whose rows differ in length and whose documents context-parallel ranks cut."""

# a budget that gives several micro-batches, and not equally many to all ranks
_BUDGET = {"max_tokens_per_micro_batch": 60}


@dataclass(frozen=True)
class Option:
    """A claimed value of an option, and the rows that hold it."""

    key: str
    value: object
    rows: tuple[Layout, ...]
    companions: dict = field(default_factory=dict, hash=False)
    """Keys that are set with it."""
    expert_rows: tuple[Layout, ...] = _EXPERT_ROWS
    """The rows of a model with experts."""

    def __str__(self) -> str:
        return f"{self.key}: {self.value}"

    @property
    def axes(self) -> frozenset[str]:
        """Every axis of its rows."""
        return frozenset().union(*(row.axes for row in (*self.rows, *self.expert_rows)))


_PACKED = Option("batching", "packed", _PACKED_ROWS, _BUDGET, _PACKED_EXPERT_ROWS)
_PREFIX_SHARED = Option("batching", "prefix_shared", _PACKED_ROWS, _BUDGET, _PACKED_EXPERT_ROWS)
OPTIONS: tuple[Option, ...] = (
    Option("pair_schedule", "split", _PAIRS_OF_AXES),
    Option("pair_schedule", "two_pass", _PAIRS_OF_AXES),
    # a chunk that does not divide the tokens
    Option("fused_logprob", True, _PAIRS_OF_AXES, {"logprob_chunk_tokens": 7}),
    Option("overlap_grad_reduce", True, _PAIRS_OF_AXES),
    Option("recompute_granularity", "full", _PAIRS_OF_AXES, {"recompute_method": "uniform", "recompute_num_layers": 1}),
    Option("recompute_granularity", "selective", _PAIRS_OF_AXES),
    # rows whose optimizer is distributed
    Option("overlap_param_gather", True, _PAIRS_OF_AXES, {"overlap_grad_reduce": True}, _EXPERT_ROWS[:1]),
    _PACKED,
    _PREFIX_SHARED,
)
"""A line for each claim of ``config.supported`` that is not plain and not :data:`HELD_ELSEWHERE`."""

HELD_ELSEWHERE: dict[tuple[str, object], str] = {
    # models of transformers, which the oracle of the matrix does not have
    ("backend", "fsdp"): "tests/ranks/test_fsdp.py",
    # MindSpeed's own algorithms, which run where MindSpeed is installed
    ("context_parallel_algo", "megatron_cp_algo"): "tests/upstream/test_context_parallel.py",
    ("context_parallel_algo", "ulysses_cp_algo"): "tests/upstream/test_context_parallel.py",
    # operators of torch_npu, for which a stand-in computes
    ("use_ascend_mc2", True): "tests/ranks/test_npu_mc2.py",
}
"""Claims that no row of the matrix can hold, and the tests that hold them."""

OPTIONS_TOGETHER: tuple[tuple[Option, ...], ...] = (
    (*OPTIONS[1:5], OPTIONS[6]),
    (_PACKED, *OPTIONS[1:5]),
    (_PREFIX_SHARED, *OPTIONS[2:5]),
)
"""Options that the matrix also has all at once: without packing, packed, and with shared prompts."""

_FULL, _SELECTIVE = OPTIONS[4:6]
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_SOME = ("down_proj", "up_proj", "v_proj")
_OF_MLPS = ("gate_proj", "up_proj", "down_proj")
_OF_MIXTRAL = ("w1", "w2", "w3")
_FROM_LATENT = ("kv_b_proj", "o_proj", "q_b_proj")
_LATENT = ("kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "q_a_proj", "q_b_proj", *_OF_MLPS)
_TO_LATENT = ("kv_a_proj_with_mqa", "q_a_proj")

AdapterRow = (
    tuple[Layout, tuple[Option, ...], str, tuple[str, ...]]
    | tuple[Layout, tuple[Option, ...], str, tuple[str, ...], float]
)

ADAPTER_COVERING: tuple[AdapterRow, ...] = (
    (Layout(tensor=2, sequence_parallel=True), (_PACKED, *OPTIONS[1:5]), "qwen2", _PROJECTIONS),
    (Layout(tensor=2, pipeline=2), (_PREFIX_SHARED, OPTIONS[2], _FULL), "qwen3", _SOME),
    (Layout(context=2, data=2, distributed_optimizer=True), (OPTIONS[1], _SELECTIVE), "qwen2", _PROJECTIONS),
    (Layout(pipeline=2, virtual_pipeline=True), (OPTIONS[0],), "qwen2", _SOME),
    (Layout(tensor=4, sequence_parallel=True), (), "shared key-value heads", _PROJECTIONS),
    (Layout(2, 2, 2, 1, sequence_parallel=True), (_FULL,), "phi3", ("gate_up_proj", "o_proj", "qkv_proj")),
    (
        Layout(tensor=2, data=2, sequence_parallel=True, expert=2, expert_tensor=2),
        (_PACKED, OPTIONS[2], _FULL),
        "mixtral",
        ("o_proj", *_OF_MIXTRAL),
    ),
    (
        Layout(pipeline=2, data=2, distributed_optimizer=True, expert_tensor=2),
        (_PREFIX_SHARED,),
        "glm4_moe",
        _OF_MLPS,
    ),
    (
        Layout(tensor=2, context=2, sequence_parallel=True, expert=2),
        (_PREFIX_SHARED, _FULL),
        "qwen3_moe",
        _PROJECTIONS,
        0.25,
    ),
)
"""Rows with adapters in continuous integration: (layout, options, family, adapted modules, dropout if any)."""

ADAPTER_MATRIX = (
    *ADAPTER_COVERING,
    *((layout, (), "qwen2", _PROJECTIONS) for layout in COVERING),
    *((layout, options, "qwen2", _PROJECTIONS) for options in OPTIONS_TOGETHER for layout in options[0].rows),
    *((layout, (option,), "qwen2", _SOME) for option in OPTIONS for layout in option.rows[-2:]),
    *((layout, (), "qwen3_moe", _PROJECTIONS) for layout in EXPERT_COVERING),
    *((layout, (), "mixtral", _OF_MIXTRAL) for layout in EXPERT_COVERING),
    *((layout, (), "glm4_moe", _OF_MLPS) for layout in EXPERT_COVERING),
    *((options[0].expert_rows[0], options, "qwen3_moe", _PROJECTIONS) for options in OPTIONS_TOGETHER),
    *((layout, (option,), "qwen3_moe", _OF_MLPS) for option in OPTIONS for layout in option.expert_rows[-2:]),
    *((layout, (), "qwen2", _PROJECTIONS, 0.1) for layout in COVERING[-4:]),
    *((options[0].rows[-1], options, "qwen3", _PROJECTIONS, 0.1) for options in OPTIONS_TOGETHER),
    *((layout, (), "glm4_moe", _PROJECTIONS, 0.1) for layout in EXPERT_COVERING),
    *((options[0].expert_rows[0], options, "qwen3_moe", _PROJECTIONS, 0.1) for options in OPTIONS_TOGETHER),
    (Layout(tensor=4, sequence_parallel=True), (), "shared key-value heads", _PROJECTIONS, 0.1),
    (_EXPERT_ROWS[1], (_PACKED, _SELECTIVE), "gpt_oss", _PROJECTIONS[:4]),
    (_EXPERT_ROWS[1], (_PREFIX_SHARED,), "gpt_oss", _PROJECTIONS[:4], 0.1),
    (Layout(tensor=2), (), "deepseek_v3", _FROM_LATENT),
    (Layout(tensor=2, sequence_parallel=True), (_PACKED,), "deepseek_v3", _FROM_LATENT),
    (Layout(context=2, data=2, distributed_optimizer=True), (_PREFIX_SHARED,), "deepseek_v3", _FROM_LATENT),
    (
        Layout(tensor=2, sequence_parallel=True, expert=2, expert_tensor=1),
        (_PREFIX_SHARED,),
        "deepseek_v3",
        _LATENT,
        0.1,
    ),
    (Layout(tensor=2), (_FULL,), "deepseek_v3", _TO_LATENT),
    (Layout(tensor=2, pipeline=2, sequence_parallel=True, expert=2, expert_tensor=1), (), "deepseek_v3", _LATENT),
    (Layout(context=2, data=2, distributed_optimizer=True), (_PREFIX_SHARED,), "deepseek_v3", _LATENT),
    (Layout(tensor=2), (), "deepseek_v3", _LATENT, 0.1),
    # a pipeline rank whose adapters are all of experts, beside one that has none of them
    (Layout(pipeline=4), (), "qwen3_moe", _OF_MLPS),
    (Layout(tensor=2, pipeline=4, distributed_optimizer=True), (), "qwen3_moe", _OF_MLPS),
)
"""All rows with adapters."""
