"""Windows, soft caps and rotations that depend on the length, in every form of a batch, against transformers.

transformers computes each sequence by itself, so that its result does not depend on padding, packing, shared prompts
or shards.
"""

import copy
import functools

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.model.hf_config import read_description
from tests.hf import make_token_pairs
from tests.ranks.model_helpers import make_checkpoint
from tests.ranks.parity import engine_steps, worst_error

pytestmark = pytest.mark.newest_core

VOCAB = 131
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1000.0,
    "short_factor": [1.0 + 0.05 * index for index in range(8)],
    "long_factor": [1.0 + 0.5 * index for index in range(8)],
}
DYNAMIC = {"rope_type": "dynamic", "factor": 3.0, "rope_theta": 1000.0}
MODELS = {
    "gemma2": {"family": "gemma2", "final_logit_softcapping": None},
    "gemma3": {"family": "gemma3_text"},
    "mistral": {"family": "mistral", "sliding_window": 6},
    "dynamic": {"family": "llama", "max_position_embeddings": 16, "rope_parameters": DYNAMIC},
    "longrope": {"family": "phi3", "original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    "gpt_oss": {"family": "gpt_oss"},
    "heads": {"family": "llama", "num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 112},
}
TP, PP, CP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"
PACKED = {"batching": "packed", "max_tokens_per_micro_batch": 90}
SHARED = {"batching": "prefix_shared", "max_tokens_per_micro_batch": 90}
FORMS = {
    "padded": {},
    "packed": PACKED,
    "shared": SHARED,
    "packed, two_pass, selective": PACKED | {"pair_schedule": "two_pass", "recompute_granularity": "selective"},
    "cp2": {CP: 2},
    "cp2, split": {CP: 2, "pair_schedule": "split"},
    "tp2, packed, pp2": PACKED | {TP: 2, PP: 2, "sequence_parallel": True},
    "full recompute": SHARED
    | {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
}
CASES = [
    *(("gemma2", form) for form in FORMS),
    *((model, form) for model in ("gemma3", "mistral") for form in ("packed", "shared", "cp2", "tp2, packed, pp2")),
    *(
        (model, form)
        for model in ("dynamic", "longrope")
        for form in ("padded", "packed", "packed, two_pass, selective", "cp2, split")
    ),
    *(("gpt_oss", form) for form in ("shared", "cp2", "packed, two_pass, selective")),
    ("heads", "tp2, packed, pp2"),
]


@functools.cache
def pairs():
    return make_token_pairs(8, VOCAB, seed=3, max_prompt=20, max_response=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    @functools.cache
    def make(name):
        options = dict(MODELS[name])
        folder = make_checkpoint(tmp_path_factory.mktemp(name), options.pop("family"), **options)
        return folder, expected_gradients(folder)

    return make


def expected_gradients(folder):
    """Of SimPO's loss with its default settings, in fp64."""
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    whole = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **eager)
    rotary = copy.deepcopy(whole.model.rotary_emb)

    def mean_logprob(prompt, response):
        # a dynamic rotation keeps that of the longest sequence so far
        whole.model.rotary_emb = copy.deepcopy(rotary)
        tokens = torch.tensor([[*prompt, *response]])
        logprobs = whole(tokens).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logprobs.gather(1, torch.tensor(response)[:, None]).mean()

    for prompt, chosen, rejected in pairs():
        margin = mean_logprob(prompt, chosen) - mean_logprob(prompt, rejected) - 0.55
        (-torch.nn.functional.logsigmoid(2.5 * margin) / len(pairs())).backward()
    return {name: parameter.grad for name, parameter in whole.named_parameters()}


@pytest.mark.parametrize(("name", "form"), CASES)
def test_gradients(model, name, form):
    folder, expected = model(name)
    result = engine_steps(folder, [pairs()], lr=1e-3, simpo_beta=2.5, gamma_beta_ratio=0.55, **FORMS[form])
    error, worst = worst_error(result["grads"], expected)
    assert error < 1e-5, worst


def test_a_prompt_is_not_shared_where_each_sequence_rotates_its_own(model):
    folder, _ = model("dynamic")
    options = {"model_name_or_path": str(folder), "data_path": "unused", "output_dir": "unused", **SHARED}
    description = read_description(folder)
    with pytest.raises(ConfigError, match=r"depends on the length of each sequence.*set batching: packed"):
        make_layout(Config(**options, seq_length=17), 1, description)
    make_layout(Config(**options, seq_length=16), 1, description)


def test_every_sequence_is_longer_than_the_window_of_some_layer():
    lengths = np.array([[len(part) for part in pair] for pair in pairs()])
    assert (lengths[:, 0] + lengths[:, 1:].max(1)).max() > 16
