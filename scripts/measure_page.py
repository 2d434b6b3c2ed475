"""How long the page of an analysis takes to open: from the navigation until every figure is drawn.

The page is that of ``mindspeed-simpo analyse --against``, of made-up scores of two models, which its own code writes:
numbers of so many pairs, and the longest texts that a page usually shows. A headless Chromium opens it from the disk,
each time in a context of its own, without a cache.

    python -m scripts.measure_page                 # 10,000 pairs
    python -m scripts.measure_page --write         # and write docs/benchmarks/page.{json,md}
"""

from __future__ import annotations

import argparse
import json
import os
import statistics as averages
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_simpo.studies.analysis.report import write_analysis
from mindspeed_simpo.studies.analysis.scores import Measured, Pairs, PairScores, Piece, ShownAnswers
from mindspeed_simpo.studies.analysis.statistics import extremes
from scripts.machine import processor, versions
from tests.browser import open_browser

DOCS = Path(__file__).parent.parent / "docs"
PAIRS, SHOWN, SHOWN_TOKENS, STEPS, SOURCES = (
    10_000,
    10,
    500,
    1000,
    ("dialogues", "mathematics", "programs", "a <i> & b"),
)
DRAWN = "document.querySelectorAll('.figure[data-drawn]').length == document.querySelectorAll('.figure').length"


def made_up_analysis(folder: Path, pairs: int = PAIRS, shown_tokens: int = SHOWN_TOKENS, steps: int = STEPS) -> Path:
    """Write an analysis of made-up scores of two models.

    Args:
        folder: Where to write; it exists.
        pairs: Number of pairs.
        shown_tokens: Tokens of each answer that is shown.
        steps: Lines of metrics of each model.

    Returns:
        The page.
    """
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(5.3, 0.7, (2, pairs)).round() + 1
    first, second = (_scores(draw, lengths, beta) for beta in (2.5, 0.1))
    shown = extremes(first.margin, SHOWN)
    answers = {place: _shown(draw, shown_tokens) for place in (*shown[0], *shown[1])}
    history = [_line(step, steps) for step in range(0, steps + 1)]
    measured = [
        Measured(title, f"step {steps} of outputs/{title.lower()}", title.lower(), title, {"beta": beta}, "made up",
                 steps, history, scores, answers)
        for title, beta, scores in (("SimPO", 2.5, first), ("DPO", 0.1, second))
    ]  # fmt: skip
    places = [f"pairs.jsonl:{number}" for number in range(1, pairs + 1)]
    source_of = draw.integers(len(SOURCES), size=pairs)
    write_analysis(folder, Pairs(np.arange(pairs), places, SOURCES, source_of), measured, shown)
    return folder / "index.html"


def _scores(draw: np.random.Generator, lengths: Any, beta: float) -> PairScores:
    means = draw.normal([[-1.0], [-1.2]], 0.35, lengths.shape)
    rewards = beta * (means if beta > 1 else draw.normal([[0.4], [0.0]], 1.0, lengths.shape))
    loss = np.log1p(np.exp(rewards[1] - rewards[0]))
    return PairScores(*(means * lengths), *lengths, *rewards, loss)


def _shown(draw: np.random.Generator, tokens: int) -> ShownAnswers:
    words = np.array(["the ", "answer", " is ", "42", ".\n", "日本", "語", "مرحبا ", "<b>", "🙂"])

    def answer() -> list[Piece]:
        texts, values = words[draw.integers(len(words), size=tokens)], -draw.exponential(1.5, tokens)
        return [Piece(str(text), (float(value),)) for text, value in zip(texts, values, strict=True)]

    return ShownAnswers("What is the answer? " * 40, answer(), answer())


def _line(step: int, steps: int) -> dict[str, Any]:
    part = step / steps
    values = {"logps/chosen": -1 - 0.1 * part, "logps/rejected": -1 - 0.3 * part}
    return {"step": step, "split": "eval" if step % 50 == 0 else "train", **values}


def open_seconds(browser: Any, page_file: Path, width: int = 1200) -> tuple[float, float]:
    """Seconds from the navigation until every figure is drawn, and those that the page's thread has worked.

    Where other programs share the processors, the first number grows and the second hardly.
    """
    context = browser.new_context(viewport={"width": width, "height": 900})
    try:
        page = context.new_page()
        client = context.new_cdp_session(page)
        client.send("Performance.enable", {"timeDomain": "threadTicks"})
        begin = time.perf_counter()
        page.goto(page_file.as_uri())
        page.wait_for_function(DRAWN)
        seconds = time.perf_counter() - begin
        measured = {each["name"]: each["value"] for each in client.send("Performance.getMetrics")["metrics"]}
        return seconds, measured["TaskDuration"]
    finally:
        context.close()


def main() -> None:
    """Measure, and print or write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=PAIRS)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--write", action="store_true", help="write docs/benchmarks/page.{json,md}")
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        page = made_up_analysis(Path(folder), arguments.pairs)
        written, size = time.perf_counter() - begin, page.stat().st_size
        with open_browser() as browser:
            chromium = browser.version
            wide = [open_seconds(browser, page) for _ in range(arguments.repeats)]
            narrow = [open_seconds(browser, page, width=375) for _ in range(arguments.repeats)]
    result = {
        "pairs": arguments.pairs,
        "page_bytes": size,
        "write_seconds": written,
        "open_seconds": {"wide": [each for each, _ in wide], "phone": [each for each, _ in narrow]},
        "work_seconds": averages.median(work for _, work in (*wide, *narrow)),
        "machine": {"processor": processor(), "cores": os.cpu_count(), "load": load, "priority": _priority()},
        **versions(),
        "plotly": version("plotly"),
        "chromium": chromium,
    }
    text = _sentence(result)
    print(text)  # noqa: T201
    if arguments.write:
        target = DOCS / "benchmarks" / "page"
        target.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        target.with_suffix(".md").write_text(text + "\n", encoding="utf-8")


def _priority() -> str:
    """With real-time priority (``chrt -r 10``) other programs do not take part in the measurement."""
    real_time = os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR)
    return "real-time" if real_time else "ordinary"


def _sentence(result: dict[str, Any]) -> str:
    machine, times = result["machine"], result["open_seconds"]
    wide, phone = (f"{averages.median(times[name]):.2f} s ({max(times[name]):.2f} s)" for name in ("wide", "phone"))
    return (
        f"A page of {result['pairs']:,} pairs and two models ({result['page_bytes'] / 1e6:.1f} MB) opens in {wide} at "
        f"1200 pixels and in {phone} at 375 pixels, from the navigation until every figure is drawn: median (longest) "
        f"of {len(times['wide'])}. The page's thread works {result['work_seconds']:.2f} s of it. The files are written "
        f"in {result['write_seconds']:.1f} s. {machine['processor']}, {machine['cores']} cores, load average "
        f"{machine['load']:.1f} at the start, {machine['priority']} priority; Chromium {result['chromium']}, plotly "
        f"{result['plotly']}, mindspeed-simpo {result['mindspeed-simpo']}, python {result['python']}, date "
        f"{result['date']}."
    )


if __name__ == "__main__":
    main()
