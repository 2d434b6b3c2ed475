"""Draw docs/benchmarks/NAME.svg from docs/benchmarks/NAME.json: speed and peak memory of every variant.

python -m scripts.bench_plot NAME        # needs matplotlib: pip install matplotlib
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
OURS, OTHERS = "#2a6f97", "#bdbdbd"
PEERS = ("TRL", "LLaMA-Factory")


def draw(name: str, result: dict[str, Any]) -> None:
    """Two bars a variant, each against the first that was run."""
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("matplotlib is not installed: pip install matplotlib") from None
    matplotlib.use("svg")
    # the same file from the same numbers
    matplotlib.rcParams["svg.hashsalt"] = name
    from matplotlib import pyplot

    variants = dict(reversed(result["variants"].items()))
    colours = [OTHERS if variant.startswith(PEERS) else OURS for variant in variants]
    figure, panels = pyplot.subplots(1, 2, figsize=(9, 0.45 * len(variants) + 1.2), sharey=True)
    measures = (
        ("pairs a second", [row["pairs_per_second"] for row in variants.values()], "{:.2f}"),
        ("peak resident memory, MiB", [row["peak_memory_bytes"] / 2**20 for row in variants.values()], "{:.0f}"),
    )
    for panel, (title, values, form) in zip(panels, measures, strict=True):
        bars = panel.barh(list(variants), values, color=colours)
        panel.bar_label(bars, labels=[form.format(value) for value in values], padding=3)
        panel.set_title(title, fontsize=10)
        panel.set_xlim(0, 1.2 * max(values))
        panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"{result['inputs']['parameters'] / 1e6:.0f} million parameters, {result['machine']['processor']}")
    figure.tight_layout()
    figure.savefig(FOLDER / f"{name}.svg", metadata={"Date": None})


def main() -> None:
    """Draw what the one argument names."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    name = sys.argv[1]
    draw(name, json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
