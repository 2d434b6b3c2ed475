"""The curves of docs/scaling.md and the published figures of docs/planning.md: what the scripts compute and write."""

from pathlib import Path
from xml.etree import ElementTree

from mindspeed_simpo.studies.plan.devices import KINDS
from scripts import compare_published, curve_tables, plan_curves

DOCS = Path(__file__).parents[2] / "docs"


def test_a_point_of_a_curve_and_its_tables():
    kind = KINDS["910B-64GB"]
    small = {"scaling": "128", **plan_curves.point("Llama-3.1-8B", kind, 1, 8)}
    found = {"scaling": "128", **plan_curves.point("Llama-3.1-8B", kind, 8, 8)}
    assert small["needed_gib"] > 64
    assert "rate" not in small
    assert abs(sum(found["parts"].values()) - 1) < 1e-9
    assert found["script"] > 1
    assert found["default_budget"] == "does not fit" or found["default_budget"] >= 1
    curve = [{**each, "scaling": scaling} for scaling in curve_tables.TITLES for each in (small, found)]
    table = curve_tables.efficiencies(curve)
    assert "does not fit" in table
    assert "100%" in table
    assert found["layout"] in curve_tables.full_tables(curve)
    assert "prefix_shared" in curve_tables.findings(curve)
    ElementTree.fromstring(curve_tables.picture(curve))


def test_every_published_setup_is_a_layout_of_the_engine_and_stands_in_the_docs():
    page = (DOCS / "planning.md").read_text(encoding="utf-8")
    for setup in compare_published.SETUPS:
        assert compare_published.simulated_seconds(setup) > 0
        assert f"| {setup.setup} |" in page
        assert setup.assumed in page
