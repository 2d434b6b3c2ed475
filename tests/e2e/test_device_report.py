"""``scripts/device_report.sh`` on the CPU, as a user types it; a defect, a crash and a section that hangs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mindspeed_simpo.studies.plan.devices import read_kind
from scripts.device_report.__main__ import main
from scripts.device_report.kernels import LEVERS as STEPS
from scripts.device_report.kernels import SMALL
from scripts.device_report.models import FORMS
from scripts.device_report.ranks import LAYOUTS
from scripts.device_report.sections import Section
from scripts.device_report.speed import LEVERS, REBUILT

REPOSITORY = Path(__file__).parents[2]
OPERATORS = {
    "rms_norm", "rms_norm, weight less one", "rms_norm, rounded last", "swiglu", "swiglu with a bias", "geglu",
    "clamped swiglu", "rotate, half", "rotate, interleaved", "rotate, half, a part", "grouped_linear", "grouped_bias",
    "attention, heads of 192 and values of 128, 4 of 2", "attention, more keys than queries", "attention, window",
    "attention, soft cap", "attention, sinks", "attention of packed documents", "attention of branches, window",
    "attention of context-parallel parts", "attention of context-parallel parts of branches", "head, chunks",
    "head, whole logits, soft cap", "log-probability of logits", "masks of dropout", "Adam",
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What the command wrote and said."""
    folder = tmp_path_factory.mktemp("report")
    command = ["bash", str(REPOSITORY / "scripts" / "device_report.sh"), "--device", "cpu", "--output", "here"]
    environment = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "here", done, json.loads((folder / "here" / "report.json").read_text())


def rows(report, section):
    assert report["sections"][section]["status"] == "done", report["sections"][section]["error"]
    found = report["sections"][section]["rows"]
    assert not [row for row in found if "crashed" in row or "left_out" in row]
    return found


def test_numerics(made):
    _, done, report = made
    assert done.stderr == ""
    assert report["verdict"]["numerics"] == "held"
    found = rows(report, "operators")
    for dtype in ("float32", "bfloat16"):
        named = {row["case"] for row in found if row["dtype"] == dtype}
        assert named >= OPERATORS - {"masks of dropout", "Adam"}
        # bf16 is compared, not fp32 under another name
        errors = [row["error"] for row in found if row["dtype"] == dtype and row["case"].startswith("attention")]
        assert (min(errors) > 1e-4) == (dtype == "bfloat16")
    assert {row["case"] for row in found} >= OPERATORS
    assert {row["of"] for row in found if row["case"] == "attention, sinks"} == {
        "value", "gradient of query", "gradient of key", "gradient of value", "gradient of sinks"
    }  # fmt: skip
    assert {row["case"] for row in rows(report, "models")} == {form.name for form in FORMS}
    ranks = rows(report, "ranks_2")
    assert {row["case"] for row in ranks if "case" in row} == {f"{name}, 2 ranks" for name in LAYOUTS[2]}
    assert all(row["pairs_per_second"] > 0 for row in ranks if "layout" in row)
    assert {row["collective"] for row in ranks if "collective" in row} == {
        "reduce", "gather", "scatter", "exchange", "send"
    }  # fmt: skip


def test_speed_and_memory(made):
    _, _, report = made
    for section in ("speed_1b", "speed_8b"):
        found = rows(report, section)
        assert [row["lever"] for row in found] == [*LEVERS, *REBUILT]
        for row in found:
            assert row["pairs_per_second"] > 0
            assert row["tokens_per_second"] > 0
            assert row["mfu_of_matmul"] > 0
            assert row["mfu"] is None, "no data sheet of a CPU is known"
            assert row["expected_over_peak"] == pytest.approx(1, abs=0.2), row["lever"]
        by_lever = {row["lever"]: row for row in found}
        assert by_lever["packed, fused head, two_pass"]["peak_bytes"] < by_lever["packed, fused head"]["peak_bytes"]
        # shared prompts are computed once: fewer operations, the same pairs
        shared, packed = by_lever["prefix_shared, fused head"], by_lever["packed, fused head"]
        assert shared["model_flops"] < packed["model_flops"]
    bare, *heads = rows(report, "head")
    assert bare["times_bare"] is None
    assert [row["head"] for row in heads] == ["fused", "whole logits"]
    assert all(row["times_bare"] > 0 for row in heads)


def test_kernels_and_waits(made):
    _, _, report = made
    found = [row for row in rows(report, "kernels") if "lever" in row]
    assert [(row["dtype"], row["lever"]) for row in found] == [
        (dtype, lever) for dtype, levers in SMALL.items() for lever in levers
    ]
    for row in found:
        assert row["as_expected"], row
        assert row["attention"]
        assert row["kernels"][0]["seconds"] > 0
    waits = rows(report, "waits")
    assert all("does not apply on the CPU" in row["method"] for row in waits)
    assert {row["lever"]: row["waits"] for row in waits if "experts" not in row["lever"]} == dict.fromkeys(
        [*STEPS, "prefix_shared, full recompute", "prefix_shared, adapters"], 0
    )


def test_files(made):
    folder, _, report = made
    kind = read_kind(folder / "device_kind.json")
    assert kind.device == "cpu"
    assert set(kind.inside.slower) == {"reduce", "gather", "scatter", "exchange", "send"}, "links are measured"
    assert "megatron_core" in "\n".join(rows(report, "conditions")[0]["environment"]), "env_report.sh is in it"
    page = (folder / "report.html").read_text()
    assert re.search(r"<h1 class='held'>Numerics held</h1><p>cpu: ", page)
    assert not re.search(r"<script|<img|href=|src=|url\(", page), "the page stands alone"
    assert page.count("<section id=") == len(report["sections"])
    assert "prefers-color-scheme: dark" in page


def test_what_goes_wrong_is_said_and_leaves_the_rest(tmp_path, capsys):
    planted = [
        Section(name, name, "", seconds, "tests.e2e.planted_report", numerics=judged, options={"kind": kind})
        for name, kind, judged, seconds in (
            ("waits", "hang", False, 1),
            ("models", "crash", True, 30),
            ("operators", "defect", True, 30),
        )
    ]
    names = [section.name for section in planted]
    assert main(["--device", "cpu", "--output", str(tmp_path), "--only", *names], planted) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    found = {name: report["sections"][name] for name in names}
    assert [section["status"] for section in found.values()] == ["timed out", "failed", "done"]
    assert "killed by SIGKILL" in found["models"]["error"]
    assert [len(found[name]["rows"]) for name in ("waits", "models")] == [1, 1], "rows before the end are kept"
    assert report["verdict"]["numerics"] == "did not hold"
    failures = report["verdict"]["failures"]
    assert [line.split(" is off")[0] for line in failures] == [
        "operators: swiglu, float32: gradient of gate_up",
        "operators: swiglu with a bias, float32: gradient of gate_up",
        "operators: swiglu with a bias, float32: gradient of bias",
    ]
    assert report["verdict"]["missing"] == ["models: failed"]
    assert "Numerics did not hold" in (tmp_path / "report.html").read_text()
    assert "did not hold" in capsys.readouterr().out


def test_a_python_without_the_packages(tmp_path):
    command = ["bash", str(REPOSITORY / "scripts" / "device_report.sh")]
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -I "$@"\n')
    python.chmod(0o755)
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PYTHON": str(python)}
    )
    assert done.returncode == 2
    assert re.match(r"error: \S+ has no torch, megatron-core, .*: run the script with the python of", done.stderr)
