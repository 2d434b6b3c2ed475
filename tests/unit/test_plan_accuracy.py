"""What ``plan`` predicts now for the steps that ``scripts/validate_plan.py`` has measured."""

import json

import pytest

from scripts import validate_plan


def test_predictions_of_measured_steps() -> None:
    stored = json.loads((validate_plan.DOCS / "plan.json").read_text(encoding="utf-8"))
    now = validate_plan.predict_again(stored)
    for found, row in zip(now["rows"], stored["rows"], strict=True):
        assert found["predicted_seconds"] == pytest.approx(row["predicted_seconds"], rel=1e-6), row["layout"]
    assert len(now["rows"]) >= 20
    assert {row["model"] for row in now["rows"]} == {"qwen3", "qwen3_moe"}
    assert now["summary"]["rank_correlation"] >= validate_plan.GOALS["rank_correlation"]
    assert now["summary"]["median_error"] < validate_plan.GOALS["median_error"]
    assert now["summary"]["memory_error"] < validate_plan.GOALS["memory_error"]
    page = (validate_plan.DOCS.parent / "planning.md").read_text(encoding="utf-8")
    assert validate_plan.sentence(stored["summary"]) in page
