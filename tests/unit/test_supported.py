"""One list says what is claimed: the configuration refuses the rest, and the parity matrix is made of it."""

import itertools
import math
from typing import get_args

import pytest

from mindspeed_simpo.config import supported
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.supported import Option, Topology
from mindspeed_simpo.errors import ConfigError


def config(**options):
    return Config(model_name_or_path="model", data_path="pairs", **{"fused_logprob": False} | options)


EVERY_AXIS = {
    "tensor_model_parallel_size": 2,
    "sequence_parallel": True,
    "context_parallel_size": 2,
    "pipeline_model_parallel_size": 2,
    "num_layers_per_virtual_pipeline_stage": 1,
    "use_distributed_optimizer": True,
}


def test_every_product_of_the_axes_is_claimed_whatever_its_size():
    for used in itertools.product((False, True), repeat=len(EVERY_AXIS)):
        options = {key: value for (key, value), on in zip(EVERY_AXIS.items(), used, strict=True) if on}
        if "num_layers_per_virtual_pipeline_stage" in options and "pipeline_model_parallel_size" not in options:
            continue
        for data in (1, 2):
            sizes = (options.get(key, 1) for key in list(EVERY_AXIS)[:4] if key.endswith("size"))
            ranks = data
            for size in sizes:
                ranks *= size
            assert config(**options).layout(ranks).data == data
    large = config(**EVERY_AXIS | {"tensor_model_parallel_size": 8}, global_batch_size=1024, micro_batch_size=1)
    assert large.layout(2048).data == 64


def test_a_combination_that_is_in_no_row_is_refused(monkeypatch):
    rows = tuple(row for row in supported.MATRIX if not {"CP", "DO"} <= row.axes)
    monkeypatch.setattr(supported, "MATRIX", rows)
    with pytest.raises(ConfigError, match="context_parallel_size and use_distributed_optimizer together") as error:
        config(context_parallel_size=2, use_distributed_optimizer=True).layout(2)
    assert "docs/numerics.md" in str(error.value)
    assert config(context_parallel_size=2).layout(4).context == 2
    assert config(use_distributed_optimizer=True).layout(4).data == 4


def test_data_parallelism_is_an_axis_that_only_the_number_of_ranks_shows(monkeypatch):
    monkeypatch.setattr(supported, "MATRIX", tuple(row for row in supported.MATRIX if not {"CP", "DP"} <= row.axes))
    cp2 = config(context_parallel_size=2)
    assert cp2.layout(2).data == 1
    with pytest.raises(ConfigError, match="data parallelism"):
        cp2.layout(4)


def test_an_option_is_refused_with_an_axis_that_its_rows_lack(monkeypatch):
    rows = (Topology(tensor=2), Topology(pipeline=2, data=2))
    monkeypatch.setattr(supported, "OPTIONS", (Option("pair_schedule", "two_pass", rows),))
    assert config(pair_schedule="two_pass", pipeline_model_parallel_size=2).layout(4).data == 2
    with pytest.raises(ConfigError, match=r"pair_schedule: two_pass .* with context_parallel_size"):
        config(pair_schedule="two_pass", context_parallel_size=2).layout(2)
    with pytest.raises(ConfigError, match="pair_schedule: split is not claimed"):
        config(pair_schedule="split").layout(1)
    assert config(pair_schedule="concat", context_parallel_size=2).layout(2).context == 2


def test_every_value_of_a_listed_option_is_plain_or_has_rows():
    assert {option.key for option in supported.OPTIONS} == supported.PLAIN.keys()
    for key, plain in supported.PLAIN.items():
        field = Config.model_fields[key]
        accepted = {True, False} if field.annotation is bool else _literals(field.annotation)
        listed = {option.value for option in supported.OPTIONS if option.key == key}
        assert listed == accepted - {plain, "auto"}, key


def _literals(annotation):
    values = set()
    for part in get_args(annotation):
        values |= _literals(part) or ({part} if isinstance(part, str) else {None} if part is type(None) else set())
    return values


def test_options_are_claimed_with_every_axis_but_packed_rows():
    for option in supported.OPTIONS:
        missing = {"CP", "VPP"} if option.key == "batching" else set()
        assert option.axes == set(supported.AXES) - missing, option


def test_options_that_do_not_go_together_are_refused(monkeypatch):
    rows = (Topology(tensor=2),)
    refused = Option("batching", "packed", rows, excludes=(("pair_schedule", "two_pass"),))
    monkeypatch.setattr(supported, "OPTIONS", (Option("pair_schedule", "two_pass", rows), refused))
    assert config(batching="packed", tensor_model_parallel_size=2).layout(2).tensor == 2
    with pytest.raises(ConfigError, match=r"batching: packed .* with pair_schedule: two_pass: .* remove batching"):
        config(batching="packed", pair_schedule="two_pass").layout(1)


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, "prefix_shared"),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, "prefix_shared"),
        ({"pair_schedule": "two_pass"}, "packed"),
        ({"pair_schedule": "split"}, "padded"),
        ({"context_parallel_size": 2}, "padded"),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}, "padded"),
        ({"batching": "padded"}, "padded"),
    ],
)
def test_auto_is_the_form_with_the_fewest_tokens_that_the_layout_allows(options, form):
    chosen = config(**options)
    assert chosen.batching_in_use == form
    sizes = (chosen.tensor_model_parallel_size, chosen.pipeline_model_parallel_size, chosen.context_parallel_size)
    assert chosen.layout(math.prod(sizes)).data == 1
    if form == "padded":
        with pytest.raises(ValueError, match="max_tokens_per_micro_batch needs"):
            config(**options, max_tokens_per_micro_batch=100)


@pytest.mark.parametrize(
    ("topology", "name"),
    [
        (Topology(), "one rank"),
        (Topology(tensor=4, data=2, distributed_optimizer=True), "TP4 DP2 DO"),
        (Topology(2, 2, 2, 1, sequence_parallel=True, virtual_stages=True), "TP2 SP CP2 PP2 VPP"),
        (Topology(sequence_parallel=True), "one rank"),
    ],
)
def test_a_topology_is_named_by_its_axes(topology, name):
    assert str(topology) == name


def test_no_row_stands_twice():
    assert len(set(supported.MATRIX)) == len(supported.MATRIX)
    assert len({str(row) for row in supported.MATRIX}) == len(supported.MATRIX)
