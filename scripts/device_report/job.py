"""What a section of the report is given, and where its rows go."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_simpo.device import Device, DeviceName, open_device


@dataclass(frozen=True)
class Job:
    """A section's work on one rank."""

    device_name: DeviceName
    small: bool
    """Whether shapes are those of the test on a CPU."""
    rows: Path
    """A file of JSON lines that rank 0 appends to."""
    folder: Path
    """For files that the section needs; shared by the sections."""
    deadline: float
    """Of ``time.time()``; a section that has more to do then leaves it out and says so."""
    rank: int = 0
    ranks: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    def add(self, **row: Any) -> None:
        """Append a row, so that it is kept whatever happens afterwards."""
        if self.rank:
            return
        with self.rows.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")

    def open_device(self) -> Device:
        """The device of this rank; must run before megatron-core is imported."""
        return open_device(self.device_name, 0 if self.options.get("share_device") else self.rank)

    def has_time_for(self, what: str) -> bool:
        """Whether the deadline has not passed; else a row says that ``what`` was left out."""
        if time.time() < self.deadline:
            return True
        self.add(left_out=what)
        return False
