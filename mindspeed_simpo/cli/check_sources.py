"""What ``mindspeed-simpo check`` says of the sources: the mixture, and which pairs have the same prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Int64, UInt64
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.dataset import PairDataset


@dataclass(frozen=True)
class Prompts:
    """Pairs of one part that have a prompt in common."""

    digests: UInt64[np.ndarray, " pair"]
    """Of the prompt of each pair."""
    repeated: Sequence[int]
    """Of each source: pairs whose prompt an earlier pair of the source has."""
    elsewhere: Sequence[int]
    """Of each source: pairs whose prompt another source has too."""
    in_training: Sequence[int] = field(default_factory=list)
    """Of each held-out source: pairs whose prompt a training pair has."""

    @classmethod
    def of(cls, pairs: PairDataset, training: Prompts | None = None) -> Prompts:
        """The counts of the pairs of one part; ``training`` those of the train part."""
        digests = pairs.prompt_digests()
        sources = np.split(digests, pairs.mixture.starts[1:-1])
        distinct = [np.unique(source) for source in sources]
        prompts, numbers = np.unique(np.concatenate(distinct), return_counts=True)
        return cls(
            digests,
            [len(source) - len(own) for source, own in zip(sources, distinct, strict=True)],
            _numbers_in(sources, prompts[numbers > 1]),
            _numbers_in(sources, training.digests) if training is not None else [],
        )

    @property
    def all_repeated(self) -> int:
        """Pairs whose prompt an earlier pair of any source has."""
        return len(self.digests) - len(np.unique(self.digests))


def count_prompts(parts: Mapping[str, PairDataset]) -> dict[str, Prompts]:
    """The prompts of the train and the eval part, where they exist."""
    found: dict[str, Prompts] = {}
    for part, pairs in parts.items():
        found[part] = Prompts.of(pairs, found.get("train") if part == "eval" else None)
    return found


def decontaminate(config: Config, parts: dict[str, PairDataset], prompts: dict[str, Prompts]) -> None:
    """Leave the held-out pairs out of ``parts`` that ``eval_decontaminate`` leaves out.

    Raises:
        DataError: where no pair is left.
    """
    if config.eval_decontaminate and parts.keys() == {"train", "eval"}:
        parts["eval"] = parts["eval"].without_prompts(prompts["train"].digests)
        prompts["eval"] = dataclasses.replace(Prompts.of(parts["eval"]), in_training=prompts["eval"].in_training)


def prompt_warnings(config: Config, prompts: Mapping[str, Prompts]) -> Iterator[str]:
    """Warning about held-out prompts that training shows the model."""
    held_out = prompts.get("eval")
    if held_out is not None and (number := sum(held_out.in_training)) and not config.eval_decontaminate:
        yield (
            f"eval: the prompts of {number} of {len(held_out.digests)} held-out pairs are training prompts too: their "
            "metrics flatter the model; eval_decontaminate: true leaves these pairs out"
        )


def print_sources(
    console: Console, config: Config, parts: Mapping[str, PairDataset], prompts: Mapping[str, Prompts]
) -> None:
    """Print the sources of each part, where there are several or their numbers are not those of the data."""
    for part, pairs in parts.items():
        if len(pairs.sources) == 1 and pairs.mixture.is_whole:
            continue
        held_out = parts.get("eval") if part == "train" and config.eval_data_path is None else None
        columns: dict[str, Sequence[object]] = {"source": pairs.sources}
        columns |= _numbers(config, part, pairs, held_out)
        console.print(_table(f"Sources of {part}", columns))
        columns = {"source": pairs.sources, "pairs": pairs.mixture.found}
        columns |= {"prompt again": prompts[part].repeated, "in other sources": prompts[part].elsewhere}
        if prompts[part].in_training:
            columns["in training"] = prompts[part].in_training
        console.print(_table(f"Prompts of {part}", columns))


def _numbers(
    config: Config, part: str, pairs: PairDataset, held_out: PairDataset | None
) -> dict[str, Sequence[object]]:
    """Columns of the mixture; ``held_out`` are the pairs that ``split`` holds out of the train part."""
    mixture = pairs.mixture
    columns: dict[str, Sequence[object]] = {"pairs found": mixture.found}
    columns["per epoch" if part == "train" else "used"] = mixture.used
    if part == "train":
        times = zip(mixture.used, mixture.found, strict=True)
        columns["times"] = [f"{used / found:.3g}" if found else "-" for used, found in times]
    tokens = [_tokens(pairs, mixture.of_first_epoch(source, config.seed)) for source in range(len(pairs.sources))]
    columns["% of pairs"] = [f"{100 * used / mixture.pairs:.1f}" for used in mixture.used]
    columns["% of tokens"] = [f"{100 * of_source / sum(tokens):.1f}" for of_source in tokens]
    if held_out is not None:
        found = dict(zip(held_out.sources, held_out.mixture.found, strict=True))
        columns["held out"] = [found.get(name, 0) for name in pairs.sources]
    return columns


def _table(title: str, columns: Mapping[str, Sequence[object]]) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("source", overflow="fold", min_width=min(24, max(map(len, map(str, columns["source"])))))
    for name in [*columns][1:]:
        table.add_column(name, justify="right", min_width=max(map(len, name.split())))
    for row in zip(*columns.values(), strict=True):
        table.add_row(*(Text(str(cell)) for cell in row))
    return table


def _tokens(pairs: PairDataset, drawn: Int64[np.ndarray, " pair"]) -> int:
    """Tokens of both sequences of some pairs, prompts included."""
    return int((pairs.lengths[drawn].astype(np.int64) @ np.array([2, 1, 1])).sum())


def _numbers_in(sources: Sequence[UInt64[np.ndarray, " _"]], digests: UInt64[np.ndarray, " prompt"]) -> list[int]:
    return [int(np.count_nonzero(np.isin(source, digests))) for source in sources]
