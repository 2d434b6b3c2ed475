"""The parts of the data, train and eval: which sources belong to each, which of their examples, and how many pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from mindspeed_simpo.config.options import DataOptions, DataSource, split_weights
from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.mixture import Mixture
from mindspeed_simpo.data.paths import Part
from mindspeed_simpo.errors import ConfigError, DataError


def has_own_paths(options: DataOptions, part: Part) -> bool:
    """Whether the part has data of its own, in place of a share of ``data_path``."""
    return part == "eval" and options.eval_data_path is not None


def sources_of(options: DataOptions, part: Part) -> list[DataSource]:
    """The sources of a part.

    Raises:
        ConfigError: where the options name none.
    """
    if has_own_paths(options, part):
        return options.eval_sources
    if part == "train":
        if options.data_path is None:
            raise ConfigError("no training data: set data_path")
        return options.sources
    if not options.has_held_out:
        raise ConfigError("no evaluation data: set eval_data_path, or give split a second weight, such as 95,5")
    return [source for source in options.sources if split_weights(source.sizes or options.split)[1] > 0]


def readers_of(options: DataOptions, part: Part, *, takes_images: bool) -> Iterator[tuple[DataSource, ExampleReader]]:
    """The sources of a part, each with the reader of its columns.

    Raises:
        ConfigError: as :func:`sources_of`, and where ``map_keys`` is wrong.
    """
    key = "eval_data_path" if has_own_paths(options, part) else "data_path"
    for number, source in enumerate(sources_of(options, part)):
        if source.map_keys is None:
            yield source, ExampleReader(options.map_keys, takes_images=takes_images)
            continue
        try:
            yield source, ExampleReader(source.map_keys, takes_images=takes_images)
        except ConfigError as error:
            raise ConfigError(f"{key}[{number}].{error}") from None


def mixture_of(options: DataOptions, part: Part, sources: Sequence[DataSource], found: Sequence[int]) -> Mixture:
    """The mixture of the sources of a part, of which ``found`` pairs can be used.

    Raises:
        DataError: where a source has too few of them.
    """
    if part == "train":
        return Mixture.of(sources, found)
    if not has_own_paths(options, part):
        return Mixture.of_all(*found)
    for number, (source, pairs) in enumerate(zip(sources, found, strict=True)):
        if source.pairs is not None and source.pairs > pairs:
            raise DataError(
                f"eval_data_path[{number}].pairs: {source.pairs}, but {source.name} ({source.path}) has {pairs}, and "
                "held-out pairs are evaluated once each"
            )
    return Mixture.of(sources, found)


def bounds_of(options: DataOptions, part: Part, rows: Sequence[int]) -> list[tuple[int, int]]:
    """First example of a part and the one after its last, of each source.

    ``split`` divides plain paths as one sequence of examples; where an entry is a mapping, it divides each source.
    """
    if has_own_paths(options, part):
        return [(0, number) for number in rows]
    entries = options.data_path if isinstance(options.data_path, list) else [options.data_path]
    if all(isinstance(entry, str) for entry in entries):
        starts = [0, *accumulate(rows)]
        whole = _part(options.split, part, starts[-1], "split")
        return [
            (min(max(whole[0] - start, 0), number), min(max(whole[1] - start, 0), number))
            for start, number in zip(starts[:-1], rows, strict=True)
        ]
    bounds = []
    for source, number in zip(sources_of(options, part), rows, strict=True):
        key = f"{source.name} ({source.path}): split"
        may_be_empty = part == "eval" and source.sizes is None and sum(rows) > number
        bounds.append(_part(source.sizes or options.split, part, number, key, may_be_empty=may_be_empty))
    if not any(first < last for first, last in bounds):
        raise DataError(f"split {options.split} leaves no row of any source for the {part} part")
    return bounds


def _part(split: str, part: Part, examples: int, key: str, *, may_be_empty: bool = False) -> tuple[int, int]:
    """First example of a part and the one after its last.

    Raises:
        DataError: where no example is between them.
    """
    weights = split_weights(split)
    middle, end = (round(examples * sum(weights[:number]) / sum(weights)) for number in (1, 2))
    first, last = (0, middle) if part == "train" else (middle, end)
    if first == last and not may_be_empty:
        raise DataError(f"{key} {split} of {examples} rows leaves no row for the {part} part")
    return first, last
