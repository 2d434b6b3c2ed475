"""The memory estimate: parameters are exact, the rest follows its formula."""

from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from mindspeed_simpo import claims
from mindspeed_simpo.config import Config, Layout
from mindspeed_simpo.memory import BatchShape, MemoryEstimate, count_parameters, estimate_memory
from mindspeed_simpo.model.hf_config import read_model_spec
from mindspeed_simpo.model.naming import pipeline_chunks

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart")
BATCH = BatchShape(pair=60, chosen=20, rejected=10)


def config(**values) -> Config:
    return Config(model_name_or_path=QUICKSTART, data_path="x", global_batch_size=8, **claims.PLAIN | values)


@pytest.fixture(scope="module")
def spec():
    return read_model_spec(QUICKSTART)


def test_parameters_are_those_of_the_model(spec):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(QUICKSTART))
    assert count_parameters(spec, pipeline_chunks(spec, 1)) == model.num_parameters()


def test_stages_and_tensor_ranks_hold_the_model_together(spec):
    whole = count_parameters(spec, pipeline_chunks(spec, 1))
    stages = pipeline_chunks(spec, 2)
    assert sum(count_parameters(spec, [stage]) for stage in stages) == whole
    half = count_parameters(spec, pipeline_chunks(spec, 1), tensor_ranks=2)
    norms = 4 * (2 * 128 + 2 * 32) + 128
    assert 2 * half == whole + norms


def test_fp32_needs_16_bytes_a_parameter_and_bf16_18(spec):
    for values, size in (({}, 16), ({"bf16": True}, 18)):
        [stage] = estimate_memory(spec, config(**values), Layout(num_microbatches=8), BATCH)
        assert stage.parameters + stage.gradients + stage.optimizer == size * 1_033_600


def test_distributed_optimizer_divides_its_state(spec):
    layout = Layout(data=4, num_microbatches=2)
    [alone] = estimate_memory(spec, config(), layout, BATCH)
    [shared] = estimate_memory(spec, config(use_distributed_optimizer=True), layout, BATCH)
    assert shared.optimizer == alone.optimizer // 4
    assert shared.parameters == alone.parameters


def test_first_stage_keeps_the_most_micro_batches_and_the_last_the_logits(spec):
    first, last = estimate_memory(spec, config(), Layout(pipeline=2, num_microbatches=8), BATCH)
    assert first.activations == 2 * last.activations
    assert first.logits == 0
    assert last.logits == (20 + 10) * 960 * (8 + 4)
    [once, _] = estimate_memory(spec, config(), Layout(pipeline=2, num_microbatches=1), BATCH)
    assert first.activations == 2 * once.activations


def test_virtual_stages_keep_more_in_flight(spec):
    layout = Layout(pipeline=2, num_microbatches=8)
    plain = estimate_memory(spec, config(pipeline_model_parallel_size=2), layout, BATCH)
    split = estimate_memory(
        spec, config(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1), layout, BATCH
    )
    assert [stage.parameters for stage in split] == [stage.parameters for stage in plain]
    assert split[0].activations > plain[0].activations


def test_context_and_sequence_ranks_divide_activations(spec):
    [alone] = estimate_memory(spec, config(), Layout(num_microbatches=8), BATCH)
    [context] = estimate_memory(spec, config(), Layout(context=2, num_microbatches=8), BATCH)
    assert 2 * context.activations == alone.activations
    assert 2 * context.logits == alone.logits
    tensor = Layout(tensor=2, num_microbatches=8)
    [whole] = estimate_memory(spec, config(), tensor, BATCH)
    [divided] = estimate_memory(spec, config(sequence_parallel=True), tensor, BATCH)
    assert divided.activations < whole.activations


def test_recompute_saves_activations(spec):
    def activations(**values) -> int:
        [stage] = estimate_memory(spec, config(**values), Layout(num_microbatches=8), BATCH)
        return stage.activations

    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    assert activations(**full, recompute_num_layers=1) < activations(**full, recompute_num_layers=2) < activations()
    block = {"recompute_granularity": "full", "recompute_method": "block"}
    assert activations(**block, recompute_num_layers=3) < activations(**block, recompute_num_layers=1) < activations()


def test_two_passes_keep_half_and_chunks_bound_the_logits(spec):
    layout = Layout(num_microbatches=8)
    [concat] = estimate_memory(spec, config(), layout, BATCH)
    [two_pass] = estimate_memory(spec, config(pair_schedule="two_pass"), layout, BATCH)
    assert 2 * two_pass.activations == concat.activations
    assert two_pass.logits == concat.logits * 20 // 30
    [fused] = estimate_memory(spec, config(fused_logprob=True, logprob_chunk_tokens=5), layout, BATCH)
    assert fused.logits == concat.logits * 5 // 30


def test_packed_rows_are_as_long_as_their_budget(spec):
    """Of pairs of at most 60 tokens a sequence, 20 and 10 of them of the responses."""
    layout = Layout(num_microbatches=8)

    def estimate(name: str, budget: int | None = None, layout: Layout = layout, **values) -> list[MemoryEstimate]:
        return estimate_memory(spec, config(batching=name, max_tokens_per_micro_batch=budget, **values), layout, BATCH)

    [packed] = estimate("packed", 240)
    [padded] = estimate("padded")
    # 4 heads of 32: what a token keeps more of in each of 4 layers
    assert packed.activations - 2 * padded.activations == 240 * 4 * 4 * (128 + 4 * 32)

    def tokens(*arguments, **values) -> float:
        return estimate(*arguments, **values)[0].activations * 240 / packed.activations

    assert tokens("prefix_shared", 300) == 300
    assert tokens("packed", 240, pair_schedule="two_pass") == 120
    # the largest pair has a micro-batch of its own, and eight of them are all that there is
    assert tokens("packed", 50) == 120
    assert tokens("prefix_shared", 50) == 70
    assert tokens("packed") == 8 * 120
    assert tokens("prefix_shared") == 8 * 70
    first, last = estimate("packed", 120, Layout(pipeline=2, num_microbatches=1))
    assert first.activations == 2 * last.activations
    assert last.logits == 120 * 960 * (8 + 4)
