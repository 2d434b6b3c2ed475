"""The rows of the parity matrix that cover every pair of axes; ``scripts/parity.py`` runs all rows."""

import itertools
from pathlib import Path

import pytest

from mindspeed_simpo.config.layout import AXES, Layout
from mindspeed_simpo.config.supported import ANY, CLAIMS, PLAIN
from mindspeed_simpo.objectives import OBJECTIVES as DECLARED
from tests.objectives import OBJECTIVES, stage_of
from tests.ranks.claimed import COVERING, EXPERT_MATRIX, HELD_ELSEWHERE, MATRIX, OPTIONS
from tests.ranks.matrix import VOCABULARY, boundary_ids, global_batch
from tests.ranks.matrix_rows import EXPERT_FAMILIES, all_rows, quick_objectives, quick_rows

ROOT = Path(__file__).parents[2]
EXPERT_AXES = {"EP", "ETP"}
"""Axes of models with experts alone; every objective reaches the model through the same sums of each pair."""


@pytest.mark.parametrize("row", quick_rows(), ids=str)
def test_the_step_equals_the_oracle(matrix, row):
    objectives = quick_objectives(row)
    cells = matrix.cells(row, objectives)
    assert [cell.objective for cell in cells] == list(objectives)
    assert not [cell for cell in cells if not cell.holds]


@pytest.mark.newest_core
def test_every_objective_meets_every_axis_and_every_batching():
    rows = [row for row in quick_rows() if quick_objectives(row) == tuple(OBJECTIVES)]
    assert frozenset().union(*(row.layout.axes for row in rows)) == set(AXES) - EXPERT_AXES
    batchings = {option.value for row in rows for option in row.options if option.key == "batching"}
    assert batchings == {"packed", "prefix_shared"}
    assert any(not row.options for row in rows)
    assert any(option.value == "two_pass" for row in rows for option in row.options)
    assert {stage_of(form) for form in OBJECTIVES} == set(DECLARED)


def test_these_rows_have_every_pair_of_axes():
    covered = {pair for row in quick_rows() for pair in itertools.combinations(sorted(row.layout.axes), 2)}
    assert covered == set(itertools.combinations(sorted(AXES), 2))


def test_every_claim_is_a_row_of_the_matrix():
    rows = all_rows()
    assert {row.layout for row in rows if not row.options} >= {*MATRIX, *COVERING}
    with_experts = {row.layout for row in rows if row.family in EXPERT_FAMILIES and not (row.options or row.adapters)}
    assert with_experts == {*EXPERT_MATRIX}
    for option in OPTIONS:
        alone = {row.layout for row in rows if row.options == (option,) and not row.adapters}
        assert alone == {*option.rows, *option.expert_rows}


def test_every_combination_of_axes_is_a_row():
    needs = {"SP": "TP", "VPP": "PP"}
    # the ranks of experts are among those of TP, CP and DP; with the default of expert TP, TP alone has none for EP
    groups = {"EP": {"CP", "DP", "ETP"}, "ETP": {"TP", "CP", "DP"}}
    for used in itertools.chain.from_iterable(itertools.combinations(AXES, size) for size in range(len(AXES) + 1)):
        possible = all(groups[axis] & set(used) for axis in groups if axis in used)
        if possible and all(needs[axis] in used for axis in needs if axis in used):
            assert any(row.axes == set(used) for row in [Layout(), *MATRIX, *EXPERT_MATRIX]), used


def test_every_claimed_value_has_rows_with_the_axes_that_are_claimed():
    for claim in CLAIMS:
        if claim.value is ANY or claim.value == PLAIN[claim.key] or (claim.key, claim.value) in HELD_ELSEWHERE:
            continue
        [option] = [option for option in OPTIONS if (option.key, option.value) == (claim.key, claim.value)]
        assert option.axes == claim.axes, claim


def test_claims_without_rows_have_tests_that_name_their_value():
    assert HELD_ELSEWHERE.keys() <= {(claim.key, claim.value) for claim in CLAIMS}
    for (_, value), path in HELD_ELSEWHERE.items():
        assert str(value) in (ROOT / path).read_text(encoding="utf-8"), path


def test_no_row_stands_twice():
    assert len(set(MATRIX)) == len(MATRIX)
    assert len({str(row) for row in MATRIX}) == len(MATRIX)
    assert len({str(row) for row in all_rows()}) == len(all_rows())


def test_a_batch_has_the_labels_that_break_shards():
    edges = boundary_ids(VOCABULARY)
    assert {0, VOCABULARY - 1} < set(edges)
    for size in (2, 3, 4):
        shard = -(-VOCABULARY // size)
        assert {start - side for start in range(shard, VOCABULARY, shard) for side in (0, 1)} <= set(edges)
    *pairs, filler = global_batch(8)
    assert filler is None
    assert set(edges) <= set(pairs[0][1])
    assert {len(pair[1]) for pair in pairs} >= {1}
    assert {len(pair[2]) for pair in pairs} >= {1}
