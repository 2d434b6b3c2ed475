"""The examples of some sources end to end: their table, and where each of them comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
from jaxtyping import Int64

from mindspeed_simpo.data.source import Source


@dataclass(frozen=True)
class SourceExamples:
    """The examples of one source that belong to a part of the data."""

    name: str
    files: Sequence[Source]
    table: Any
    """Of the cache's schema, memory-mapped; its column ``source`` counts ``files``."""


@dataclass(frozen=True)
class Examples:
    """The examples of some sources, numbered end to end."""

    of_sources: Sequence[SourceExamples]

    @cached_property
    def table(self) -> Any:
        """The examples of all sources, without a copy; of its column ``source`` each source has numbers of its own."""
        return pa.concat_tables([source.table for source in self.of_sources])

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the sources."""
        return tuple(source.name for source in self.of_sources)

    @property
    def files(self) -> tuple[str, ...]:
        """The names of the files of all sources."""
        return tuple(file.name for source in self.of_sources for file in source.files)

    @cached_property
    def starts(self) -> Int64[np.ndarray, " bound"]:
        """Number of the first example of each source, then the number of all examples."""
        return np.array([0, *accumulate(source.table.num_rows for source in self.of_sources)], np.int64)

    def where(self, example: int) -> str:
        """Name an example in a message, such as ``FILE:LINE``."""
        source = int(np.searchsorted(self.starts, example, side="right")) - 1
        file, number = (self.table.column(name)[example].as_py() for name in ("source", "line"))
        return str(self.of_sources[source].files[file].where(number))
