"""What the project claims to compute exactly, in one list that fails closed.

Every combination of axes is claimed (sequence parallelism with tensor parallelism, virtual stages with pipeline
parallelism). An option that declares ``effect: arithmetic`` is claimed for the values and axes below and refused for
any other. The parity matrix of the tests holds a row for each claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from mindspeed_simpo.config.layout import AXES, Layout, names_of

ANY: Final = object()
"""Every value that the option's type and range admit."""

PLAIN: Mapping[str, object] = {
    "pair_schedule": "concat",
    "batching": "padded",
    "fused_logprob": False,
    "overlap_grad_reduce": False,
    "recompute_granularity": None,
    "context_parallel_algo": "gathered",
}
"""The options whose values are claimed one by one, at those that every combination of axes is held with."""

_EVERY_AXIS = frozenset(AXES)


@dataclass(frozen=True)
class Claim:
    """A value of an option that changes the arithmetic."""

    key: str
    value: object
    axes: frozenset[str] = _EVERY_AXIS
    """What it may be combined with."""
    excludes: tuple[tuple[str, object], ...] = ()
    """Values of other options that it cannot be combined with."""

    def __str__(self) -> str:
        return f"{self.key}: {self.value}"


# packed rows are cut by tokens, not by context ranks, and differ in length, which virtual stages cannot exchange
_WHOLE_ROWS = _EVERY_AXIS - {"CP", "VPP"}
_SPLIT, _TWO_PASS = ("pair_schedule", "split"), ("pair_schedule", "two_pass")

CLAIMS: tuple[Claim, ...] = (
    *(Claim(key, value) for key, value in PLAIN.items()),
    Claim("pair_schedule", "split"),
    Claim("pair_schedule", "two_pass"),
    Claim("fused_logprob", True),
    Claim("overlap_grad_reduce", True),
    Claim("recompute_granularity", "full"),
    Claim("recompute_granularity", "selective"),
    Claim("batching", "packed", _WHOLE_ROWS, excludes=(_SPLIT,)),
    Claim("batching", "prefix_shared", _WHOLE_ROWS, excludes=(_SPLIT, _TWO_PASS)),
    # compared with `gathered` where MindSpeed is installed
    Claim("context_parallel_algo", "megatron_cp_algo"),
    Claim("context_parallel_algo", "ulysses_cp_algo"),
    # sizes of pieces: the rows have some of each
    Claim("micro_batch_size", ANY),
    Claim("max_tokens_per_micro_batch", ANY),
    Claim("logprob_chunk_tokens", ANY),
    Claim("recompute_method", ANY),
    Claim("recompute_num_layers", ANY),
    # the kernels of a device: the matrix is held on the CPU
    Claim("device", ANY),
)
"""All that is claimed of options that change the arithmetic."""


def refusal(layout: Layout, options: Mapping[str, Any]) -> str | None:
    """Why a run may not use this layout with these options; None where it may.

    Args:
        layout: What the configuration and the number of ranks ask for.
        options: Every option that changes the arithmetic, with its value.
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
