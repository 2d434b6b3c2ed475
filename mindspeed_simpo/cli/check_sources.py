"""What ``mindspeed-simpo check`` says of the sources: the mixture, and which pairs have the same prompt."""

from __future__ import annotations

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
    """Print a table of the sources of each part, where there are several or their numbers are not those of the data."""
    for part, pairs in parts.items():
        if len(pairs.sources) > 1 or not pairs.mixture.is_whole:
            held_out = parts.get("eval") if part == "train" and config.eval_data_path is None else None
            console.print(_table(config, part, pairs, prompts[part], held_out))


def _table(config: Config, part: str, pairs: PairDataset, prompts: Prompts, held_out: PairDataset | None) -> Table:
    mixture = pairs.mixture
    used_name = "pairs of an epoch" if part == "train" else "pairs evaluated"
    columns = ["pairs found", used_name, "times", "% of pairs", "% of tokens", "prompt again", "prompt elsewhere"]
    columns += ["held out"] if held_out is not None else []
    columns += ["prompt in training"] if prompts.in_training else []
    table = Table(title=f"Sources of {part}", title_justify="left")
    table.add_column("source", overflow="fold")
    for name in columns:
        table.add_column(name, justify="right")
    tokens = [_tokens(pairs, mixture.of_first_epoch(source, config.seed)) for source in range(len(pairs.sources))]
    of_held_out = {} if held_out is None else dict(zip(held_out.sources, held_out.mixture.found, strict=True))
    rows = []
    for source, name in enumerate(pairs.sources):
        found, used = mixture.found[source], mixture.used[source]
        shares = [f"{100 * part / whole:.1f}" for part, whole in ((used, mixture.pairs), (tokens[source], sum(tokens)))]
        times = f"{used / found:.3g}" if found else "-"
        counts = [found, used, times, *shares, prompts.repeated[source], prompts.elsewhere[source]]
        counts += [of_held_out.get(name, 0)] if held_out is not None else []
        counts += [prompts.in_training[source]] if prompts.in_training else []
        rows.append([name, *map(str, counts)])
    whole = [sum(mixture.found), mixture.pairs, "", "100.0", "100.0", prompts.all_repeated, sum(prompts.elsewhere)]
    whole += [len(held_out)] if held_out is not None else []
    whole += [sum(prompts.in_training)] if prompts.in_training else []
    rows.append(["all", *map(str, whole)])
    for number, row in enumerate(rows, start=1):
        table.add_row(*map(Text, row), end_section=number == len(rows) - 1)
    return table


def _tokens(pairs: PairDataset, drawn: Int64[np.ndarray, " pair"]) -> int:
    """Tokens of both sequences of some pairs, prompts included."""
    return int((pairs.lengths[drawn].astype(np.int64) @ np.array([2, 1, 1])).sum())


def _numbers_in(sources: Sequence[UInt64[np.ndarray, " pair"]], digests: UInt64[np.ndarray, " prompt"]) -> list[int]:
    return [int(np.count_nonzero(np.isin(source, digests))) for source in sources]
