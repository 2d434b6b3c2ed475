"""The sections of the report, in the order of their value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Section:
    """A part of the report with a process of its own, or one for each rank."""

    name: str
    title: str
    reading: str
    """What the table says, in a sentence or two."""
    seconds: float
    """Limit."""
    module: str = ""
    """Importable name of what runs it; default that of this package with its name."""
    numerics: bool = False
    """Whether the verdict depends on it."""
    optional: bool = False
    """Whether it may fail: two ranks on one device."""
    ranks: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def module_name(self) -> str:
        """``module`` with its default."""
        return self.module or f"{_HERE}.{self.name}"


RANKS = (2, 4, 8)
"""Numbers of ranks that :data:`scripts.device_report.ranks.LAYOUTS` has; importing that takes seconds."""
_HERE = "scripts.device_report"
_SPEED_MODULE, _RANKS_MODULE = f"{_HERE}.speed", f"{_HERE}.ranks"
_SPEED = (
    "One training step, all of it, of as many layers as fit with the optimizer. MFU counts 6 operations a weight and "
    "token and 12 hidden a layer, query and key of the causal mask, prompts as often as the form computes them, and "
    "nothing twice; useful counts each prompt once. Memory: what check expects over what the allocator held at the "
    "peak (on a CPU: counted tensors)."
)
CONDITIONS = Section("conditions", "Conditions", "What this was made on.", 60)
BEFORE_RANKS = (
    Section(
        "operators",
        "Operators",
        "Relative L2 error of each value and gradient against the formula in fp64 on the host.",
        150,
        numerics=True,
    ),
    Section(
        "models",
        "Whole models",
        "One training step against the dense fp64 oracle: loss, the worst gradient of a parameter, the worst parameter "
        "after the step.",
        150,
        numerics=True,
    ),
    Section("rates", "Rates", "Single operators of the engine; device_kind.json has them for plan.", 40),
    Section("speed_1b", "Speed and memory, 1B", _SPEED, 90, _SPEED_MODULE, options={"shape": "1B"}),
    Section(
        "head",
        "Output layer alone",
        "Forward and backward of the log-probabilities beside their three bare matrix products.",
        40,
    ),
    Section(
        "kernels",
        "Kernels",
        "The kernels of one training step by time; expected is an operator that computes attention without dense "
        "scores, and none that has them.",
        60,
    ),
    Section("waits", "Host synchronisations", "How often one training step makes the host wait, and where.", 60),
    Section("speed_8b", "Speed and memory, 8B", _SPEED, 100, _SPEED_MODULE, options={"shape": "8B"}),
)


def of_ranks(device: str, devices: int) -> Iterator[Section]:
    """The sections with several ranks that this host can have."""
    reading = (
        "A step of each layout against the oracle, its speed on a model of two layers, and the rate of each "
        "collective, bytes of the whole message a second."
    )
    if device != "cpu" and devices == 1:
        own = {"npu": "hccl", "cuda": "nccl"}[device]
        for backend in (own, "gloo"):
            options = {"share_device": True, "backend": backend}
            title = f"Two ranks on one device, {backend}"
            name = f"one_device_{backend}"
            yield Section(
                name, title, reading, 60, _RANKS_MODULE, numerics=True, optional=True, ranks=2, options=options
            )
        return
    for ranks in RANKS:
        if (device == "cpu" and ranks == 2) or ranks <= devices:
            yield Section(f"ranks_{ranks}", f"{ranks} ranks", reading, 90, _RANKS_MODULE, numerics=True, ranks=ranks)
