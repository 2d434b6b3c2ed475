"""Defects that have shipped elsewhere, reintroduced: the parity matrix must detect each."""

import dataclasses

import pytest
import torch

from mindspeed_simpo.config.layout import Layout
from tests.ranks.defects import (
    balance_of_own_tokens,
    bias_of_each_part_of_an_expert,
    copied_factors_counted_in_the_norm,
    dropped_token,
    expert_gradients_of_the_wrong_group,
    experts_counted_twice_in_the_norm,
    features_counted_by_rank,
    label_zero_means_nothing,
    loss_divided_by_context_ranks,
    own_rows_of_b_alone,
    reference_with_adapters,
    replicated_factor_not_summed,
    shift_after_slicing,
    sink_of_each_context_rank,
    sinks_as_replicated,
    supervised_term_divided_twice,
    undifferentiated_tensor_reduction,
)
from tests.ranks.matrix import GRADIENT, LOSS, Cell
from tests.ranks.matrix_rows import BALANCED, Row
from tests.ranks.parity import worst_error

pytestmark = pytest.mark.newest_core

OBJECTIVE = "sigmoid + ftx"


TENSOR, CONTEXT = Row(Layout(tensor=2)), Row(Layout(context=2))


@pytest.mark.parametrize(
    ("defect", "row", "loss_shows_it"),
    [
        (undifferentiated_tensor_reduction, TENSOR, False),
        (label_zero_means_nothing, TENSOR, True),
        (shift_after_slicing, CONTEXT, True),
        (supervised_term_divided_twice, TENSOR, True),
        (loss_divided_by_context_ranks, CONTEXT, False),
    ],
)
def test_the_matrix_catches(matrix, defect, row, loss_shows_it):
    [cell] = matrix.cells(row, [OBJECTIVE], prepare=defect)
    assert not cell.holds
    assert cell.gradient > 1000 * GRADIENT
    # a check of the forward alone would have passed where the loss is right
    assert (cell.loss > LOSS) == loss_shows_it


EXPERTS = Row(Layout(data=4, expert=2), family="qwen3_moe")
SPLIT_EXPERTS = Row(Layout(context=2, expert=2), family="qwen3_moe")


@pytest.mark.parametrize("defect", [expert_gradients_of_the_wrong_group, dropped_token])
def test_the_matrix_catches_a_defect_of_routing(matrix, defect):
    [cell] = matrix.cells(EXPERTS, [OBJECTIVE], prepare=defect)
    assert not cell.holds
    assert cell.gradient > 1000 * GRADIENT


def test_the_matrix_catches_a_balance_of_parts_of_sequences(matrix):
    [objective, _] = BALANCED
    [sound] = matrix.cells(SPLIT_EXPERTS, [objective])
    [cell] = matrix.cells(SPLIT_EXPERTS, [objective], prepare=balance_of_own_tokens)
    assert sound.holds
    assert cell.gradient > 100 * GRADIENT
    assert cell.loss < LOSS


def test_the_matrix_catches_a_double_count_in_the_norm(matrix):
    [cell] = matrix.cells(EXPERTS, [OBJECTIVE], prepare=experts_counted_twice_in_the_norm)
    assert not cell.holds
    assert cell.gradient < GRADIENT
    assert cell.grad_norm > 1000 * GRADIENT


SINKS = {
    name: Row(layout, family="gpt_oss")
    for name, layout in {
        "TP": Layout(tensor=2, sequence_parallel=True),
        "CP": Layout(context=2),
        "ETP": Layout(data=2, expert_tensor=2),
    }.items()
}


@pytest.mark.parametrize(
    ("defect", "row", "loss_shows_it"),
    [
        (sink_of_each_context_rank, SINKS["CP"], True),
        (sinks_as_replicated, SINKS["TP"], False),
        (bias_of_each_part_of_an_expert, SINKS["ETP"], True),
    ],
)
def test_the_matrix_catches_defects_of_sinks_and_biases(matrix, defect, row, loss_shows_it):
    [sound] = matrix.cells(row, [OBJECTIVE])
    [cell] = matrix.cells(row, [OBJECTIVE], prepare=defect)
    assert sound.holds
    assert cell.gradient > 1000 * GRADIENT
    assert (cell.loss > LOSS) == loss_shows_it


ADAPTED = Row(Layout(tensor=2), adapters=("q_proj", "down_proj"))
ADAPTED_EXPERTS = Row(Layout(data=2, expert_tensor=2), family="mixtral", adapters=("q_proj", "w2"))
DROPPED = dataclasses.replace(ADAPTED, dropout=0.25)
ADAPTED_SEQUENCE = dataclasses.replace(ADAPTED, layout=Layout(tensor=2, sequence_parallel=True))

ADAPTED_LATENT = Row(
    Layout(tensor=2, sequence_parallel=True, expert_tensor=1),
    family="deepseek_v3",
    adapters=("kv_a_proj_with_mqa", "q_a_proj"),
)


@pytest.mark.parametrize(
    ("defect", "row", "objective", "loss_shows_it"),
    [
        (replicated_factor_not_summed, ADAPTED_SEQUENCE, OBJECTIVE, False),
        (replicated_factor_not_summed, ADAPTED_LATENT, OBJECTIVE, False),
        (own_rows_of_b_alone, ADAPTED, OBJECTIVE, False),
        (own_rows_of_b_alone, ADAPTED_EXPERTS, OBJECTIVE, False),
        (reference_with_adapters, ADAPTED, "dpo", True),
        (features_counted_by_rank, DROPPED, OBJECTIVE, True),
    ],
)
def test_the_matrix_catches_defects_of_adapters(matrix, defect, row, objective, loss_shows_it):
    [sound] = matrix.cells(row, [objective])
    [cell] = matrix.cells(row, [objective], prepare=defect)
    assert sound.holds
    assert cell.gradient > 1000 * GRADIENT
    assert (cell.loss > LOSS) == loss_shows_it


def test_the_matrix_catches_copies_of_factors_in_the_norm(matrix):
    [cell] = matrix.cells(ADAPTED_EXPERTS, [OBJECTIVE], prepare=copied_factors_counted_in_the_norm)
    assert not cell.holds
    assert cell.gradient < GRADIENT
    assert cell.grad_norm > 1000 * GRADIENT


@pytest.mark.parametrize("row", [TENSOR, CONTEXT, EXPERTS], ids=str)
def test_the_same_cells_hold_without_a_defect(matrix, row):
    [cell] = matrix.cells(row, [OBJECTIVE])
    assert cell.holds


@pytest.mark.parametrize("measure", ["loss", "grad_norm", "gradient", "parameter"])
@pytest.mark.parametrize("value", [1e-4, float("nan"), float("inf")])
def test_one_measure_out_of_the_contract_is_enough(measure, value):
    sound = Cell(TENSOR, OBJECTIVE, 0.0, 0.0, 0.0, "weight", 0.0, "weight")
    assert sound.holds
    assert not dataclasses.replace(sound, **{measure: value}).holds


def test_a_gradient_that_is_not_a_number_is_the_worst():
    expected = {name: torch.ones(2, dtype=torch.float64) for name in "abc"}
    error, name = worst_error({"a": torch.ones(2), "b": torch.full((2,), float("nan")), "c": torch.zeros(2)}, expected)
    assert name == "b"
    assert not error <= GRADIENT
