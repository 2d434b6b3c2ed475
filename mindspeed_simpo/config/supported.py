"""The supported combinations of options and parallel axes: a list of claims, outside of which a run is refused.

A claim states that the gradients equal those of the oracle. Every combination of axes is claimed (sequence parallelism
needs tensor parallelism, virtual pipeline parallelism needs pipeline parallelism). An option with
``effect="arithmetic"`` is claimed for the values and axes below and refused for any other. The parity matrix of the
tests checks each claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mindspeed_simpo.config.layout import AXES, Layout, names_of

ANY: Final = object()
"""Every value that the option's type and range admit."""

PLAIN: Mapping[str, object] = {
    "backend": "megatron",
    "pair_schedule": "concat",
    "batching": "padded",
    "fused_logprob": False,
    "overlap_grad_reduce": False,
    "overlap_param_gather": False,
    "recompute_granularity": None,
    "context_parallel_algo": "gathered",
    "use_ascend_mc2": False,
}
"""The baseline value of each option whose values are claimed one by one; the tests check every combination of axes
with these values."""

_EVERY_AXIS = frozenset(AXES)


@dataclass(frozen=True)
class Claim:
    """One supported value of an option with ``effect="arithmetic"``."""

    key: str
    value: object
    axes: frozenset[str] = _EVERY_AXIS
    """Axes that the value may be combined with."""
    excludes: tuple[tuple[str, object], ...] = ()
    """``(option, value)`` pairs that the value cannot be combined with."""

    def __str__(self) -> str:
        return f"{self.key}: {self.value}"


_SPLIT, _TWO_PASS = ("pair_schedule", "split"), ("pair_schedule", "two_pass")
# MindSpeed's ring cuts every document into equal chunks, so that packed documents would need padding of their own
_RING = ("context_parallel_algo", "megatron_cp_algo")

CLAIMS: tuple[Claim, ...] = (
    *(Claim(key, value) for key, value in PLAIN.items()),
    Claim("backend", "fsdp", axes=frozenset({"CP", "DP"})),
    Claim("pair_schedule", "split"),
    Claim("pair_schedule", "two_pass"),
    Claim("fused_logprob", True),
    Claim("overlap_grad_reduce", True),
    Claim("overlap_param_gather", True),
    Claim("recompute_granularity", "full"),
    Claim("recompute_granularity", "selective"),
    Claim("batching", "packed", excludes=(_SPLIT, _RING)),
    Claim("batching", "prefix_shared", excludes=(_SPLIT, _TWO_PASS, _RING)),
    # MindSpeed's own algorithms: compared with `gathered` in the tests that need an installed MindSpeed
    Claim("context_parallel_algo", "megatron_cp_algo"),
    Claim("context_parallel_algo", "ulysses_cp_algo"),
    # operators of NPUs: compared in the tests that have a stand-in for torch_npu
    Claim("use_ascend_mc2", True),
    # sizes of micro-batches and chunks: the matrix checks several of each
    Claim("micro_batch_size", ANY),
    Claim("max_tokens_per_micro_batch", ANY),
    Claim("logprob_chunk_tokens", ANY),
    Claim("recompute_method", ANY),
    Claim("recompute_num_layers", ANY),
    # the kernels of a device: the matrix runs on the CPU
    Claim("device", ANY),
)
"""The claimed values of all options with ``effect="arithmetic"``."""


def refusal(layout: Layout, options: Mapping[str, Any]) -> str | None:
    """The reason why a run with this layout and these options is refused; None where it is supported.

    Args:
        layout: The parallel layout of the run.
        options: Every option with ``effect="arithmetic"`` and its value.
    """
    where = "what no row of the parity matrix checks (docs/numerics.md) is refused"
    for key, value in options.items():
        claim = next((claim for claim in CLAIMS if claim.key == key and claim.value in (value, ANY)), None)
        if claim is None:
            return f"{key}: {value} is not claimed to be exact: {where}; remove it"
        others = [f"{other}: {excluded}" for other, excluded in claim.excludes if options.get(other) == excluded]
        if not layout.axes <= claim.axes:
            others.append(names_of(layout.axes - claim.axes))
        if others:
            return (
                f"{key}: {value} is not claimed to be exact with {', '.join(others)}: {where}; "
                f"remove {key} or turn the other off"
            )
    return None
