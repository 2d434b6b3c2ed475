"""Weak and strong scaling of four models from 8 to 4,096 NPUs as ``plan`` simulates them: tables of docs/scaling.md.

    python -m scripts.plan_curves                # the tables
    python -m scripts.plan_curves --write-docs   # into docs/scaling.md

Strong scaling keeps the pairs of a step, weak scaling keeps them for each NPU. Every number is simulated.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.studies.plan.devices import KINDS
from mindspeed_simpo.studies.plan.layouts import Space
from mindspeed_simpo.studies.plan.rank import NAMES, search
from mindspeed_simpo.studies.plan.report import describe
from mindspeed_simpo.studies.plan.run_lengths import RunLengths, assumed_lengths
from mindspeed_simpo.studies.plan.simulation import Simulator
from scripts.layouts import MODELS

DOCS = Path(__file__).parent.parent / "docs" / "scaling.md"
BEGIN, END = "<!-- plan: begin -->", "<!-- plan: end -->"
SHOWN = ("Qwen3-8B", "Qwen3-32B", "Llama-3.1-70B", "Qwen3-30B-A3B")
DEVICES = tuple(2**power for power in range(3, 13))
LENGTHS, SEQ = (512, 384, 384), 4096
STRONG_PAIRS, WEAK_PAIRS = 512, 4
"""Pairs of a step: in strong scaling of all NPUs, in weak scaling of each."""


def curve(name: str, kind_name: str, *, weak: bool) -> list[list[str]]:
    """Rows: NPUs, pairs of a step, the winner, its seconds, pairs a second of an NPU, efficiency, what binds."""
    kind = KINDS[kind_name]
    rows, first = [], 0.0
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(MODELS[name], encoding="utf-8")
        model = read_description(folder)
        for devices in DEVICES:
            pairs = WEAK_PAIRS * devices if weak else STRONG_PAIRS
            config = Config(
                **{"model_name_or_path": folder, "data_path": "-", "seq_length": SEQ},
                **{"global_batch_size": pairs, "device": kind.device},
            )
            lengths = assumed_lengths(*LENGTHS, SEQ, max(4096, pairs))
            windows = tuple(dict.fromkeys(layer.attention.window for layer in model.first_of_kind))
            simulator = Simulator(model, kind, RunLengths(lengths, windows, "assumed"))
            plan = search(Space(config, model, devices, kind.device), simulator, keep=1)
            if not plan.ranked:
                rows.append([str(devices), str(pairs), "none fits" if plan.refused else "none allowed", "", "", "", ""])
                continue
            best = plan.ranked[0]
            rate = best.time.pairs_per_second / devices
            first = first or rate
            lost = {part: value for part, value in best.time.parts.items() if part != "compute"}
            worst = max(lost, key=lambda part: lost[part])
            rows.append(
                [
                    *(str(devices), str(pairs), describe(best.candidate), f"{best.time.total:.3g}", f"{rate:.3g}"),
                    f"{rate / first:.0%}",
                    f"{NAMES[worst]} {lost[worst] / best.time.total:.0%}",
                ]
            )
    return rows


def tables(kind_name: str) -> str:
    """Markdown of all curves."""
    header = ["NPUs", "pairs a step", "fastest layout", "s a step", "pairs/s of an NPU", "of the first", "largest loss"]
    lines = []
    for weak in (False, True):
        for name in SHOWN:
            lines += [f"**{name}, {'weak' if weak else 'strong'} scaling**, {kind_name}, simulated", ""]
            cells = [header, ["---"] * len(header), *curve(name, kind_name, weak=weak)]
            lines += ["| " + " | ".join(row) + " |" for row in cells] + [""]
    return "\n".join(lines).rstrip()


def main() -> None:
    """Print the tables, or write them into the docs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device-kind", choices=[*KINDS], default="910B-64GB")
    parser.add_argument("--write-docs", action="store_true")
    arguments = parser.parse_args()
    text = tables(arguments.device_kind)
    if not arguments.write_docs:
        print(text)  # noqa: T201
        return
    page = DOCS.read_text(encoding="utf-8")
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    DOCS.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
