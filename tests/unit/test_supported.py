"""One list says what is claimed, and the configuration refuses the rest."""

import itertools
import math
from typing import get_args

import pytest
from pydantic import Field

from mindspeed_simpo.config import supported
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import AXES, Layout
from mindspeed_simpo.config.options import TrainingOptions, effect_of
from mindspeed_simpo.config.supported import Claim
from mindspeed_simpo.config.validation import make_layout
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
            assert make_layout(config(**options), ranks).data == data
    large = config(**EVERY_AXIS | {"tensor_model_parallel_size": 8}, global_batch_size=1024, micro_batch_size=1)
    assert make_layout(large, 2048).data == 64


def test_an_option_is_refused_with_an_axis_that_is_not_claimed(monkeypatch):
    others = tuple(claim for claim in supported.CLAIMS if claim.key != "pair_schedule")
    claim = Claim("pair_schedule", "two_pass", frozenset({"TP", "PP", "DP"}))
    monkeypatch.setattr(supported, "CLAIMS", (Claim("pair_schedule", "concat"), claim, *others))
    assert make_layout(config(pair_schedule="two_pass", pipeline_model_parallel_size=2), 4).data == 2
    with pytest.raises(ConfigError, match=r"pair_schedule: two_pass .* with context_parallel_size") as error:
        make_layout(config(pair_schedule="two_pass", context_parallel_size=2), 2)
    assert "docs/numerics.md" in str(error.value)
    with pytest.raises(ConfigError, match="pair_schedule: split is not claimed"):
        make_layout(config(pair_schedule="split"), 1)
    assert make_layout(config(context_parallel_size=2), 2).context == 2


def test_data_parallelism_is_an_axis_that_only_the_number_of_ranks_shows(monkeypatch):
    others = tuple(claim for claim in supported.CLAIMS if claim.key != "fused_logprob")
    claim = Claim("fused_logprob", False, frozenset(AXES) - {"DP"})
    monkeypatch.setattr(supported, "CLAIMS", (claim, *others))
    assert make_layout(config(context_parallel_size=2), 2).data == 1
    with pytest.raises(ConfigError, match="data parallelism"):
        make_layout(config(context_parallel_size=2), 4)


def test_every_option_that_changes_the_arithmetic_is_claimed_value_by_value():
    arithmetic = {name for name, field in Config.model_fields.items() if effect_of(field) == "arithmetic"}
    assert arithmetic == {claim.key for claim in supported.CLAIMS}
    for key in supported.PLAIN:
        field = Config.model_fields[key]
        accepted = {True, False} if field.annotation is bool else _literals(field.annotation)
        assert {claim.value for claim in supported.CLAIMS if claim.key == key} == accepted - {"auto"}, key


def _literals(annotation):
    values = set()
    for part in get_args(annotation):
        values |= _literals(part) or ({part} if isinstance(part, str) else {None} if part is type(None) else set())
    return values or ({annotation} if isinstance(annotation, str) else set())


def test_a_claim_that_is_gone_closes_every_value_of_its_option(monkeypatch):
    left = tuple(claim for claim in supported.CLAIMS if claim.key != "logprob_chunk_tokens")
    monkeypatch.setattr(supported, "CLAIMS", left)
    with pytest.raises(ConfigError, match="logprob_chunk_tokens: None is not claimed"):
        make_layout(config(batching="padded"), 1)


def test_an_option_that_does_not_declare_its_effect_is_refused_when_its_class_is_made():
    with pytest.raises(TypeError, match=r"NewOptions\.quantize: an option must declare its effect"):

        class NewOptions(TrainingOptions):
            quantize: bool = Field(False, description="Undeclared.")

    with pytest.raises(TypeError, match="found 'speed'"):

        class OtherOptions(TrainingOptions):
            quantize: bool = Field(False, json_schema_extra={"effect": "speed"})


def test_an_option_that_changes_the_arithmetic_and_is_not_claimed_is_refused():
    class NewConfig(Config):
        quantize: bool = Field(False, json_schema_extra={"effect": "arithmetic"})

    with pytest.raises(ConfigError, match="quantize: False is not claimed"):
        make_layout(NewConfig(model_name_or_path="model", data_path="pairs", batching="padded"), 1)


def test_options_that_do_not_go_together_are_refused():
    packed = config(batching="packed", tensor_model_parallel_size=2)
    assert make_layout(packed, 2).tensor == 2
    with pytest.raises(ConfigError, match=r"batching: packed .* with pair_schedule: split: .* remove batching"):
        make_layout(config(batching="packed", pair_schedule="split"), 1)


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, "prefix_shared"),
        ({"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}, "prefix_shared"),
        ({"pair_schedule": "two_pass"}, "packed"),
        ({"pair_schedule": "split"}, "padded"),
        ({"context_parallel_size": 2}, "prefix_shared"),
        ({"context_parallel_size": 2, "context_parallel_algo": "megatron_cp_algo"}, "padded"),
        ({"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1}, "prefix_shared"),
        ({"batching": "padded"}, "padded"),
    ],
)
def test_auto_is_the_form_with_the_fewest_tokens_that_the_layout_allows(options, form):
    chosen = config(**options)
    assert chosen.batching_in_use == form
    sizes = (chosen.tensor_model_parallel_size, chosen.pipeline_model_parallel_size, chosen.context_parallel_size)
    assert make_layout(chosen, math.prod(sizes)).data == 1
    if form == "padded":
        with pytest.raises(ValueError, match="max_tokens_per_micro_batch needs"):
            config(**options, max_tokens_per_micro_batch=100)


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (Layout(), "one rank"),
        (Layout(tensor=4, data=2, distributed_optimizer=True), "TP4 DP2 DO"),
        (Layout(2, 2, 2, 1, sequence_parallel=True, virtual_pipeline=True), "TP2 SP CP2 PP2 VPP"),
        (Layout(sequence_parallel=True), "one rank"),
    ],
)
def test_a_layout_is_named_by_its_axes(layout, name):
    assert str(layout) == name
