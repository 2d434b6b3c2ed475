"""How evenly context-parallel ranks share the attention of packed rows, counted on real pairs.

    python -m scripts.context_balance --data preference_en.json

For each form and number of ranks: the (query, key) pairs of the busiest rank of each micro-batch, added up, over those
of an average rank. The ranks meet in every layer, so 1.10 means 10 % more time in attention than with an even division.
Beside it the same number where the row is cut into equal chunks whatever its documents. Tokens are always divided
evenly.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from mindspeed_simpo.batch import Documents, TokenizedPair
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.parallel.context import chunks_of, spans_of
from scripts.bench_inputs import first_that_fit, train_tokenizer
from scripts.machine import versions

RANKS = (2, 4, 8)
FORMS = ("packed", "prefix_shared")
Spans = list[tuple[int, int]]


def attended(documents: Documents, spans: Spans) -> int:
    """Number of (query, key) pairs of the queries at these positions of a packed row."""
    prefixes = [0] * len(documents.wholes) + [branch.prefix_length for branch in documents.branches]
    total = first = 0
    for length, prefix in zip(documents.lengths, prefixes, strict=True):
        for start, stop in spans:
            begin, end = max(start - first, 0), min(stop - first, length)
            if begin < end:
                total += (end - begin) * (2 * prefix + begin + end + 1) // 2
        first += length
    return total


def by_document(documents: Documents, rank: int, size: int) -> Spans:
    """What a rank holds where each document is cut, as the engine does."""
    return spans_of(documents.lengths, rank, size)


def by_row(documents: Documents, rank: int, size: int) -> Spans:
    """What a rank would hold if the row were cut like one document."""
    chunk = sum(documents.lengths) // (2 * size)
    return [(number * chunk, (number + 1) * chunk) for number in chunks_of(rank, size)]


def imbalance(rows: Sequence[Documents], size: int, spans: Callable[[Documents, int, int], Spans]) -> float:
    """Busiest rank over average rank, added up over the micro-batches."""
    busiest = total = 0
    for documents in rows:
        work = [attended(documents, spans(documents, rank, size)) for rank in range(size)]
        busiest, total = busiest + max(work), total + sum(work)
    return busiest * size / total


def rows_of(lengths: Sequence[tuple[int, int, int]], form: str, size: int, arguments: argparse.Namespace) -> Iterator:
    """Documents of the micro-batches of consecutive global batches."""
    batching = Batching(form, 1, arguments.max_tokens, multiple_of=2 * size)
    pairs = [TokenizedPair([1] * prompt, [1] * one, [1] * other, "") for prompt, one, other in lengths]
    for first in range(0, len(pairs), arguments.global_batch_size):
        batch = pairs[first : first + arguments.global_batch_size]
        yield from (each.packing.documents for each in batching.micro_batches(batch, range(len(batch))))


def main() -> None:
    """Count, and print a table and one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="file of preference pairs")
    parser.add_argument("--pairs", type=int, default=10_000, help="at most this number of pairs, from the start")
    parser.add_argument("--seq-length", type=int, default=2048)
    parser.add_argument("--max-tokens", type=int, default=4096, help="max_tokens_per_micro_batch")
    parser.add_argument("--global-batch-size", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=16_000, help="ids of the tokenizer that is trained on the data")
    parser.add_argument("--micro-batch-size", type=int, default=1, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(Path(folder), arguments.vocab, Path(arguments.data).read_text(encoding="utf-8"))
        _, lengths = first_that_fit(arguments, AutoTokenizer.from_pretrained(folder))
    console, results = Console(), []
    table = Table("batching", "CP", "micro-batches", "documents cut", "row cut", title=f"{len(lengths)} pairs")
    for form in FORMS:
        for size in RANKS:
            rows = list(rows_of(lengths, form, size, arguments))
            ours, row = imbalance(rows, size, by_document), imbalance(rows, size, by_row)
            results.append({"batching": form, "ranks": size, "by_document": ours, "by_row": row})
            table.add_row(form, str(size), str(len(rows)), f"{ours:.4f}", f"{row:.3f}")
    console.print(table)
    console.print(json.dumps({"results": results, **versions()}), soft_wrap=True)


if __name__ == "__main__":
    main()
