"""The memory estimate: parameters are exact, the rest follows its formula."""

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig, AutoModelForCausalLM

from mindspeed_simpo.config import supported
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import load_config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.config.resolution import resolve
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.largest import largest_pass
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.model.naming import pipeline_chunks
from mindspeed_simpo.training import memory
from mindspeed_simpo.training.memory import MemoryEstimate, count_parameters

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart")
LENGTHS = np.tile([40, 20, 10], (8, 1))
"""Tokens of prompt, chosen and rejected response of eight equal pairs."""


def config(**values) -> Config:
    return Config(
        **{"model_name_or_path": QUICKSTART, "data_path": "x", "global_batch_size": 8} | supported.PLAIN | values
    )


def estimate_memory(spec, config: Config, layout: Layout, device="cpu") -> list[MemoryEstimate]:
    largest = largest_pass(LENGTHS, config, Batching.of(config), layout)
    return memory.estimate_memory(spec, config, layout, largest, device)


@pytest.fixture(scope="module")
def spec():
    return read_description(QUICKSTART)


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
        [stage] = estimate_memory(spec, config(**values), Layout())
        assert stage.parameters + stage.gradients + stage.optimizer == size * 1_033_600


def test_distributed_optimizer_divides_its_state(spec):
    layout = Layout(data=4)
    [alone] = estimate_memory(spec, config(), layout)
    [shared] = estimate_memory(spec, config(use_distributed_optimizer=True), layout)
    assert shared.optimizer == alone.optimizer // 4
    assert shared.parameters == alone.parameters


def test_first_stage_keeps_the_most_micro_batches_and_the_last_the_logits(spec):
    first, last = estimate_memory(spec, config(), Layout(pipeline=2))
    assert first.activations == 2 * last.activations
    assert first.head == 0
    assert last.head == (20 + 10) * (960 * 8 + 2 * 4 * 128)
    [once, _] = estimate_memory(spec, config(global_batch_size=1), Layout(pipeline=2))
    assert first.activations == 2 * once.activations


def test_virtual_stages_keep_more_in_flight(spec):
    layout = Layout(pipeline=2)
    plain = estimate_memory(spec, config(pipeline_model_parallel_size=2), layout)
    split = estimate_memory(
        spec, config(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1), layout
    )
    assert [stage.parameters for stage in split] == [stage.parameters for stage in plain]
    assert split[0].activations > plain[0].activations


def test_context_and_sequence_ranks_divide_activations(spec):
    [alone] = estimate_memory(spec, config(), Layout())
    [context] = estimate_memory(spec, config(), Layout(context=2))
    # gathered keys and values do not shrink
    assert alone.activations < 2 * context.activations < 1.5 * alone.activations
    assert 2 * context.head == alone.head
    tensor = Layout(tensor=2)
    [whole] = estimate_memory(spec, config(), tensor)
    [divided] = estimate_memory(spec, config(sequence_parallel=True), tensor)
    assert divided.activations < whole.activations


def test_recompute_saves_activations(spec):
    def activations(**values) -> int:
        [stage] = estimate_memory(spec, config(**values), Layout())
        return stage.activations

    full = {"recompute_granularity": "full", "recompute_method": "uniform"}
    assert activations(**full, recompute_num_layers=1) < activations(**full, recompute_num_layers=2) < activations()
    block = {"recompute_granularity": "full", "recompute_method": "block"}
    assert activations(**block, recompute_num_layers=3) < activations(**block, recompute_num_layers=1) < activations()


def test_two_passes_keep_half_and_chunks_bound_the_logits(spec):
    layout = Layout()
    [concat] = estimate_memory(spec, config(), layout)
    [two_pass] = estimate_memory(spec, config(pair_schedule="two_pass"), layout)
    assert two_pass.activations == pytest.approx(concat.activations / 2, rel=0.01)
    assert two_pass.head == concat.head * 20 // 30
    [fused] = estimate_memory(spec, config(fused_logprob=True, logprob_chunk_tokens=5), layout)
    assert fused.head == 30 * 2 * 4 * 128 + 5 * 960 * 4


def test_head_and_backward_are_not_there_at_the_same_time(spec):
    [stage] = estimate_memory(spec, config(), Layout())
    lasting = stage.parameters + stage.gradients + stage.optimizer + stage.activations
    assert stage.total == lasting + max(stage.head, stage.backward) < lasting + stage.head + stage.backward


def test_devices_keep_different_things(spec):
    """Heads share groups: only CPUs copy keys and values, and keep the projection too; NPUs keep 16 numbers a head."""
    [cpu], [cuda], [npu] = (estimate_memory(spec, config(), Layout(), name) for name in ("cpu", "cuda", "npu"))
    attention = spec.layers[0].attention
    tokens, layers, heads = 2 * 60, 4, attention.heads
    queries, keys = heads * attention.head_dim, attention.kv_heads * attention.head_dim
    assert cpu.activations - cuda.activations == layers * tokens * 4 * (2 * queries - keys)
    assert npu.activations - cuda.activations == layers * tokens * 4 * 15 * heads


@pytest.mark.parametrize("batching", ["padded", "packed", "prefix_shared"])
@pytest.mark.parametrize("device", ["cpu", "cuda", "npu"])
def test_nothing_of_a_long_pair_grows_with_the_square_of_its_tokens(spec, device, batching):
    def activations(tokens: int) -> int:
        run = config(batching=batching, context_parallel_size=4, seq_length=tokens, global_batch_size=1)
        lengths, layout = np.array([[tokens - 2048, 2048, 1024]]), Layout(context=4)
        largest = largest_pass(lengths, run, Batching.of(run), layout)
        [estimate] = memory.estimate_memory(spec, run, layout, largest, device)
        return estimate.activations

    assert 1.9 < activations(131_072) / activations(65_536) < 2.05


def test_the_largest_passes_are_those_of_the_run():
    lengths = np.array([[10, 5, 3], [4, 1, 9], [2, 2, 2], [7, 6, 1]])

    def largest(pipeline: int = 1, data: int = 1, **values):
        options = {"global_batch_size": 4, "seed": 1, "seq_length": 32, **values}
        run = config(**options)
        return largest_pass(lengths, run, Batching.of(run), Layout(pipeline=pipeline, data=data))

    padded = largest(pipeline=3)
    assert (padded.shape.tokens, padded.shape.rows, padded.shape.scored, padded.passes) == (30, 2, 10, 4)
    assert max(padded.in_flight) == padded.in_flight[2] <= 30 + 26 + 26
    assert largest(pair_schedule="two_pass").shape[:3] == (15, 1, 9)
    assert largest(pair_schedule="two_pass").passes == 8
    packed = largest(batching="packed", max_tokens_per_micro_batch=75)
    assert (packed.shape.tokens, packed.shape.rows, packed.passes) == (2 * 23 + 29, 1, 1)
    shared = largest(batching="prefix_shared", max_tokens_per_micro_batch=52)
    assert shared.shape == (23 + 29, 1, 29, 23, 15, 13)
    assert largest(batching="prefix_shared", max_tokens_per_micro_batch=20).passes == 3
    assert largest(batching="prefix_shared", max_tokens_per_micro_batch=52, data=2).shape.tokens < 52
    assert largest(train_iters=1, global_batch_size=1).shape.tokens in (30, 26, 8)


def test_the_buffers_of_hccl_are_counted_on_npus_alone(spec, monkeypatch):
    for name in ("HCCL_BUFFSIZE", "P2P_HCCL_BUFFSIZE"):
        monkeypatch.delenv(name, raising=False)
    size = 2 * 2**20
    # the groups of the world, the data ranks, the gradient norm and the pipeline; on the last rank that of tensor ranks
    piped = config(pipeline_model_parallel_size=2)
    whole, halves = Layout(), Layout(pipeline=2)
    assert [each.communication for each in estimate_memory(spec, config(), whole)] == [0]
    [npu] = estimate_memory(spec, config(), whole, "npu")
    assert npu.communication == 4 * 200 * size
    assert npu.total == npu.communication + npu.parameters + npu.gradients + npu.optimizer + npu.activations + max(
        npu.head, npu.backward
    )
    tied = spec.tied
    found = [each.communication for each in estimate_memory(spec, piped, halves, "npu")]
    assert found == [(4 + tied) * 200 * size, (5 + tied) * 200 * size]
    virtual = config(pipeline_model_parallel_size=2, num_layers_per_virtual_pipeline_stage=1)
    found = [each.communication for each in estimate_memory(spec, virtual, halves, "npu")]
    assert found == [((3 + tied) * 200 + 2 * 20) * size, ((4 + tied) * 200 + 2 * 20) * size]
    monkeypatch.setenv("HCCL_BUFFSIZE", "50")
    monkeypatch.setenv("P2P_HCCL_BUFFSIZE", "0")
    found = [each.communication for each in estimate_memory(spec, virtual, halves, "npu")]
    assert found == [(4 + tied) * 50 * size, (5 + tied) * 50 * size], "messages in the group of the pipeline"


@pytest.mark.parametrize(
    ("name", "value"), [("HCCL_BUFFSIZE", "0"), ("HCCL_BUFFSIZE", "a"), ("P2P_HCCL_BUFFSIZE", "-1")]
)
def test_a_size_of_buffers_that_hccl_does_not_take(spec, name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"{name}={value} in the environment: expected a whole number of MiB"):
        estimate_memory(spec, config(), Layout(), "npu")


LARGE_MODELS = {
    "llama3_8b_instruct_simpo": {"model_type": "llama", "intermediate_size": 14336, "num_hidden_layers": 32}
    | {"vocab_size": 128256, "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5},
    **dict.fromkeys(
        ("qwen3_8b_simpo", "qwen3_8b_dpo"),
        {"model_type": "qwen3", "intermediate_size": 12288, "num_hidden_layers": 36}
        | {"vocab_size": 151936, "architectures": ["Qwen3ForCausalLM"], "rms_norm_eps": 1e-6},
    ),
}
"""The shapes that the models' publishers give, in the terms of config.json."""
COMMON = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
COMMON |= {"hidden_act": "silu", "tie_word_embeddings": False, "max_position_embeddings": 8192, "rope_theta": 5e5}


def test_the_memory_that_the_large_configurations_name_is_what_check_expects(tmp_path):
    paths = [path for path in sorted(Path(QUICKSTART).parent.glob("*_8b_*.yaml")) if "fsdp" not in path.stem]
    assert {path.stem for path in paths} == LARGE_MODELS.keys()
    for path in paths:
        (tmp_path / "config.json").write_text(json.dumps(COMMON | LARGE_MODELS[path.stem]))
        model = read_description(str(tmp_path))
        run = resolve(load_config(path, {}), model, "npu")
        half = run.seq_length // 2
        layout = make_layout(run, 8, model, "npu")
        assert layout.sequence_parallel
        longest = largest_pass(np.full((run.global_batch_size, 3), half), run, Batching.of(run), layout)
        [estimate] = memory.estimate_memory(model, run, layout, longest, "npu")
        assert f"`check` expects {estimate.total / 2**30:.3g} GiB per rank" in path.read_text(), path
