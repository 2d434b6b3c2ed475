"""The table of layouts in the docs is what its script gives."""

import pytest

from scripts import layouts


@pytest.mark.parametrize(("model", "training", "gib"), [("Qwen3-8B", "LoRA", 32), ("Mixtral-8x7B", "LoRA", 64)])
def test_the_documented_layouts_are_those_of_the_script(model, training, gib):
    found = [layouts.choose(model, training, count, gib, 4096) for count in (8, 16, 64)]
    cells = " | ".join("-" if choice is None else str(choice) for choice in found)
    assert f"| {model} | {training} | {gib} | {cells} |" in layouts.DOCS.read_text(encoding="utf-8").splitlines()


def test_a_smaller_npu_needs_no_fewer_ranks():
    small, large = (layouts.choose("Llama-3.1-8B", "all weights", 8, gib, 4096) for gib in (32, 64))
    assert small.memory < 0.9 * 32 < large.memory < 0.9 * 64
    assert small.layout.data < large.layout.data
