"""Experts on one rank: grouped products, the order of the rows, refused configurations, and equal micro-batches."""

import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mindspeed_simpo.batch import FILLER_PAIR, TokenizedPair
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.loader import PairLoader
from mindspeed_simpo.device import npu
from mindspeed_simpo.device.grouped import grouped_bias, grouped_linear
from mindspeed_simpo.errors import ConfigError, ModelError
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.model.naming import pipeline_chunks
from mindspeed_simpo.model.routes import routes_of
from mindspeed_simpo.model.weight_source import SafetensorsFolder
from mindspeed_simpo.training.memory import count_parameters
from tests import hf, oracle_model
from tests.hf import Pairs
from tests.ranks.model_helpers import gradients_as_stored

FAMILIES = ("qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3", "gpt_oss")


@pytest.fixture(params=["own", "npu"])
def device(request, monkeypatch):
    if request.param == "npu":
        request.getfixturevalue("torch_npu")
        monkeypatch.setattr(npu, "is_on_npu", lambda _: True)


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 0, 8], [0, 0, 0, 0], [5]])
def test_grouped_products(counts):
    rows = torch.randn(sum(counts), 6, requires_grad=True)
    weights = torch.randn(len(counts), 5, 6, requires_grad=True)
    found = grouped_linear(rows, weights, torch.tensor(counts))
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    expected = torch.einsum("ri,roi->ro", rows, weights[expert])
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(found, [rows, weights], upstream)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, [rows, weights], upstream), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("counts", [[3, 0, 4, 1], [0, 0, 0, 0], [5]])
def test_grouped_biases(counts):
    rows = torch.randn(sum(counts), 6, requires_grad=True)
    biases = torch.randn(len(counts), 6, requires_grad=True)
    found = grouped_bias(rows, biases, torch.tensor(counts))
    expected = rows + biases[torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))]
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    grads = torch.autograd.grad(found, [rows, biases], upstream)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, [rows, biases], upstream), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("held", "tensor_ranks"), [(4, 1), (2, 1), (2, 2), (1, 3)])
def test_rows_go_to_each_rank_of_their_expert(held, tensor_ranks):
    chosen = torch.tensor([[0, 3], [2, 0], [1, 2], [3, 0], [0, 1]])
    routes = routes_of(chosen, 4, held, tensor_ranks)
    assert routes.counts.tolist() == [4, 2, 2, 2]
    sent = []
    for first in range(0, 4, held):
        own = [
            (expert, token)
            for expert in range(first, first + held)
            for token, experts in enumerate(chosen.tolist())
            if expert in experts
        ]
        sent += own * tensor_ranks
    assert routes.token.tolist() == [token for _, token in sent]
    for token, places in enumerate(routes.place.view(5, 2, tensor_ranks).tolist()):
        for expert, copies in zip(chosen[token].tolist(), places, strict=True):
            assert {sent[place] for place in copies} == {(expert, token)}
            assert len(set(copies)) == tensor_ranks
    assert routes.place.flatten()[routes.copy].tolist() == list(range(len(sent)))


SHAPES = [*((family, {"head_dim": 16}) for family in FAMILIES), ("qwen3_moe", {"experts": 8, "layers": 3})]


@pytest.mark.parametrize(("family", "shape"), SHAPES)
def test_the_oracle_routes_as_transformers(tmp_path, family, shape):
    """transformers rounds scores to fp32."""
    folder = hf.make_checkpoint(tmp_path, family, **shape)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, experts_implementation="eager")
    tokens = torch.randint(512, (60,), generator=torch.Generator().manual_seed(1))
    params, config = oracle_model.load(folder)
    expected = model(tokens[None]).logits[0]
    assert (oracle_model.logits(params, config, tokens) - expected).norm() < 1e-6 * expected.norm()
    total, _ = oracle_model.sequence_logprob(params, config, tokens[:20].tolist(), tokens[20:].tolist())
    expected.log_softmax(-1)[19:-1].gather(1, tokens[20:, None]).sum().backward()
    grads = gradients_as_stored(model)
    trained = {name: param for name, param in params.items() if param.requires_grad}
    assert trained.keys() == grads.keys()
    ours = torch.autograd.grad(total, list(trained.values()), materialize_grads=True)
    for name, grad in zip(trained, ours, strict=True):
        assert (grad - torch.from_numpy(grads[name])).norm() <= 1e-5 * grad.norm(), name


def test_the_oracle_refuses_a_choice_within_rounding(tmp_path):
    folder = hf.make_checkpoint(tmp_path, "mixtral", layers=1)
    params, config = oracle_model.load(folder)
    with torch.no_grad():
        params["model.layers.0.block_sparse_moe.gate.weight"][1:] = 0.0
    with pytest.raises(oracle_model.CloseChoiceError, match=r"layers\.0"):
        oracle_model.logits(params, config, [1, 2, 3])


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted(tmp_path, family):
    folder = hf.make_checkpoint(tmp_path, family, head_dim=16)
    description, sizes = read_description(str(folder)), load_file(folder / "model.safetensors")
    whole = {name: tensor.numel() for name, tensor in sizes.items()}
    of_experts = sum(size for name, size in whole.items() if ".experts." in name)
    for expert_tensor in (1, 2):
        chunks = pipeline_chunks(description, 1, 1, expert_tensor)
        count = partial(count_parameters, description, chunks)
        assert count(expert_tensor, experts=True) == of_experts // expert_tensor
        assert count(2 * expert_tensor, experts=True) == of_experts // expert_tensor // 2
        assert count(1, experts=False) == sum(whole.values()) - of_experts


def _config(folder, **options):
    return Config(model_name_or_path=str(folder), data_path="unused", global_batch_size=8, **options)


@pytest.mark.parametrize(
    ("ranks", "options", "message"),
    [
        (3, {"expert_model_parallel_size": 3, "global_batch_size": 9}, "expert_model_parallel_size 3 does not divide"),
        (2, {"expert_model_parallel_size": 4}, "2 ranks cannot hold expert_model_parallel_size 4"),
        (4, {"expert_model_parallel_size": 2, "expert_tensor_parallel_size": 4}, "start a multiple of that many ranks"),
        (5, {"expert_tensor_parallel_size": 5, "global_batch_size": 10}, "expert_tensor_parallel_size 5"),
    ],
)
def test_refused_layouts(tmp_path, ranks, options, message):
    folder = hf.make_checkpoint(tmp_path, "qwen3_moe")
    options = {"micro_batch_size": 1, "batching": "padded"} | options
    config = Config(**{"model_name_or_path": str(folder), "data_path": "unused", "global_batch_size": 8} | options)
    with pytest.raises(ConfigError, match=message):
        make_layout(config, ranks, read_description(str(folder)))


def test_expert_parallelism_needs_experts(tmp_path):
    folder = hf.make_checkpoint(tmp_path, "qwen3")
    config = _config(folder, expert_model_parallel_size=2)
    with pytest.raises(ConfigError, match=r"expert_model_parallel_size: .* has no experts"):
        make_layout(config, 2, read_description(str(folder)))


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("mixtral", "router_jitter_noise", 0.1, "router_jitter_noise is not supported"),
        ("mixtral", "num_experts_per_tok", 5, "num_experts_per_tok 5 is more than num_local_experts 4"),
        ("glm4_moe", "n_group", 3, "n_group 3 does not divide n_routed_experts 4 into groups of at least two"),
        ("deepseek_v3", "topk_group", 5, "topk_group 5 of n_group 4"),
        ("deepseek_v3", "num_key_value_heads", 2, "num_key_value_heads 2 is not num_attention_heads 4"),
        ("deepseek_v3", "v_head_dim", 0, "v_head_dim is 0"),
        ("qwen3_moe", "hidden_act", "gelu", "hidden_act 'gelu' is not supported"),
        ("qwen3_moe", "moe_intermediate_size", 0, "moe_intermediate_size is 0"),
    ],
)
def test_refused_models(tmp_path, family, key, value, message):
    path = hf.make_checkpoint(tmp_path, family, head_dim=16) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ModelError, match=message):
        read_description(str(tmp_path))


def test_layers_of_multi_token_prediction_are_not_read(tmp_path):
    folder = hf.make_checkpoint(tmp_path, "glm4_moe", head_dim=16)
    description = read_description(str(folder))
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.ones(2)}, folder / "model.safetensors")
    assert "model.layers.2.eh_proj.weight" not in SafetensorsFolder(folder, description).dtypes
    save_file(tensors | {"model.layers.1.eh_proj.weight": torch.ones(2)}, folder / "model.safetensors")
    with pytest.raises(ModelError, match="eh_proj"):
        SafetensorsFolder(folder, description)


@pytest.mark.parametrize("equal", [False, True])
def test_data_ranks_that_share_experts_get_equally_many_micro_batches(equal):
    lengths = [(5, 20, 20)] * 5 + [(1, 3, 3)] * 3
    pairs = Pairs(TokenizedPair(*([1] * length for length in each), "") for each in lengths)
    batching = Batching("packed", 1, 60, equal_micro_batches=equal)
    by_rank = [
        PairLoader(
            pairs, seed=1, global_batch_size=8, batching=batching, data_parallel_rank=rank, data_parallel_size=4
        ).train_step(0)
        for rank in range(4)
    ]
    numbers = {len(micro_batches) for micro_batches in by_rank}
    assert len(numbers) == 1 if equal else len(numbers) > 1
    ids = [number for found in by_rank for batch in found for number in batch.pair_ids.tolist()]
    assert sorted(number for number in ids if number != FILLER_PAIR) == list(range(8))
    assert (FILLER_PAIR in ids) == equal
