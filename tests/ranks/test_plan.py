"""What ``plan`` counts for a step is what a step does: bytes between process groups, operations of matrix products."""

from collections import Counter

import numpy as np
import pytest

from tests.ranks.launcher import run_ranks

SHAPE = {"layers": 4, "hidden": 64, "heads": 4, "kv_heads": 2}
KINDS = {
    "allreduce": "reduce",
    "allgather_base": "gather",
    "reduce_scatter_base": "scatter",
    "alltoall_base": "exchange",
    "send": "send",
}


def _step(folder, options):
    """One micro-batch forward and backward: bytes by kind and axis, operations by operator, and the rank's place."""
    import torch.distributed as dist
    from torch.utils.flop_counter import FlopCounterMode

    from mindspeed_simpo.batch import TokenizedPair
    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.config.validation import make_layout
    from mindspeed_simpo.data.collate import COLLATE
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.parallel import initialize
    from scripts.engine import build_engine
    from tests.hf import make_token_pairs
    from tests.ranks.traffic import Traffic

    device = open_device("cpu")
    from megatron.core import tensor_parallel

    config = Config(model_name_or_path=folder, data_path="unused", seq_length=64, **options)
    layout = make_layout(config, dist.get_world_size())
    groups = initialize(layout, device)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    _, schedule = build_engine(config, device, groups)
    pairs = [TokenizedPair(*pair, source="test") for pair in make_token_pairs(2, seed=3)]
    batch = COLLATE[config.batching_in_use](pairs, [0, 1], multiple_of=config.sequence_multiple)
    axes = {"tensor": groups.tensor, "context": groups.context, "pipeline": groups.pipeline}
    axes = {name: group for name, group in axes.items() if group.size() > 1}
    if layout.expert > 1:
        axes["expert"] = groups.shards(experts=True).group
    with Traffic(**axes) as traffic, FlopCounterMode(display=False) as counter:
        schedule.forward_backward([batch], 2)
    sent = Counter()
    for (operator, axis), size in traffic.bytes.items():
        if axis != "other" or operator == "send":
            sent[KINDS.get(operator, operator), "pipeline" if operator == "send" else axis] += size
    operations = {str(name): number for name, number in counter.get_flop_counts()["Global"].items()}
    lengths = [pair.lengths for pair in pairs]
    return dict(sent), operations, lengths, groups.pipeline.rank()


def _passes(config, lengths, model):
    from mindspeed_simpo.data.batching import Batching
    from mindspeed_simpo.data.largest import steps_of_run
    from mindspeed_simpo.studies.plan.passes import Passes

    in_order = config.model_copy(update={"seed": None, "global_batch_size": 2})
    [step] = steps_of_run(np.array(lengths), in_order, Batching.of(config), 1, 2)
    windows = {layer.attention.window for layer in model.layers}
    return Passes.of(step.passes_of(0), list(windows), padded=config.batching_in_use == "padded")


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"tensor_model_parallel_size": 2, "batching": "padded"}),
        ("llama", {"tensor_model_parallel_size": 2, "sequence_parallel": True, "batching": "packed"}),
        ("llama", {"tensor_model_parallel_size": 2, "sequence_parallel": True, "pipeline_model_parallel_size": 2}),
        ("llama", {"context_parallel_size": 2, "batching": "padded"}),
        ("qwen3_moe", {"expert_model_parallel_size": 2, "batching": "packed"}),
    ],
    ids=["TP", "TP-SP-packed", "TP-SP-PP-shared", "CP", "EP"],
)
def test_the_messages_of_a_plan_are_those_of_a_step(tmp_path, family, options):
    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.model.hf_config import read_description
    from mindspeed_simpo.model.naming import pipeline_chunks
    from mindspeed_simpo.studies.plan.collectives import Traffic
    from tests.hf import make_checkpoint

    folder = str(make_checkpoint(tmp_path, family, **SHAPE))
    options = {"global_batch_size": 4, "micro_batch_size": 2, "fused_logprob": False, **options}
    config = Config(model_name_or_path=folder, data_path="unused", seq_length=64, **options)
    model = read_description(folder)
    data = options.get("expert_model_parallel_size", 1)
    layout = config.layout_with(data=data)
    counted, expected = Counter(), Counter()
    for sent, _, lengths, rank in run_ranks(_step, layout.ranks, folder, options):
        counted.update(sent)
        traffic = Traffic(model, config, layout, _passes(config, lengths, model))
        [chunk] = [each for each in pipeline_chunks(model, layout.pipeline) if each.pipeline_rank == rank]
        first, last = chunk.has_embedding, chunk.has_head
        messages = [each for layer in chunk.layers(model) for each in traffic.forward(layer) + traffic.backward(layer)]
        for backward in (False, True):
            messages += traffic.ends(first=first, last=last, backward=backward)
        for kind, axis, size, _ in messages:
            expected[kind, axis] += int(size.sum())
        if layout.pipeline > 1:
            expected["send", "pipeline"] += int(traffic.between_stages().sum()) * ((not last) + (not first))
        if config.sequence_parallel:  # gradients of norms, once a step
            expected["reduce", "tensor"] += 4 * model.hidden_size * (2 * chunk.num_layers + last)
    # numbers of rows, which ranks of experts tell each other, are not counted as bytes
    counted.pop(("gather", "expert"), None), counted.pop(("allgather", "expert"), None)
    assert {key: size for key, size in counted.items() if size} == {key: size for key, size in expected.items() if size}


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3"])
def test_the_matrix_products_of_a_plan_are_those_of_a_step(tmp_path, family):
    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.model.hf_config import read_description
    from mindspeed_simpo.studies.plan.devices import KINDS as DEVICES
    from mindspeed_simpo.studies.plan.work import Costs, products_of
    from tests.hf import make_checkpoint

    folder = str(make_checkpoint(tmp_path, family, **SHAPE))
    options = {"global_batch_size": 2, "micro_batch_size": 2, "batching": "packed", "fused_logprob": False}
    config = Config(model_name_or_path=folder, data_path="unused", seq_length=64, **options)
    model = read_description(folder)
    [(_, counted, lengths, _)] = run_ranks(_step, 1, folder, options)
    layout = config.layout_with(data=1)
    costs = Costs(model, config, layout, DEVICES["H100"], _passes(config, lengths, model))
    tokens, scored = costs.passes.tokens.sum(), costs.passes.scored.sum()
    operations = 3 * 2 * scored * model.vocab_size * model.hidden_size
    for layer in model.layers:
        found = products_of(model, layer, (1, 1, 1))
        operations += 3 * 2 * tokens * sum(outputs * inputs for outputs, inputs in (*found.sharded, *found.whole))
        for _, outputs, inputs in found.experts:
            operations += 3 * 2 * costs.expert_rows(layer).sum() * outputs * inputs
    products = sum(number for name, number in counted.items() if name.split(".")[-1] in ("mm", "addmm"))
    assert products == operations
