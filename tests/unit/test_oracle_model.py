"""The oracle's logits and gradients against transformers' own models in fp64, family by family."""

import json

import pytest
import torch

from tests import hf, oracle_model
from tests.tokenizers import FAMILIES, TOKENIZER_SIZE

WINDOW = 5
SCALINGS = ("llama3", "linear", "dynamic", "yarn", "longrope")
SHAPES = [
    *[(family, {}) for family in FAMILIES],
    ("qwen2", {"tied": True}),
    ("qwen3", {"head_dim": 32, "kv_heads": 1}),
    ("mistral", {"head_dim": 8, "layers": 1}),
    ("gemma2", {"tied": True, "head_dim": 8}),
    ("gemma3_text", {"tied": True, "head_dim": 32, "hidden": 48}),
    ("phi3", {"tied": True, "kv_heads": 4}),
    ("glm4", {"head_dim": 32, "kv_heads": 1}),
    # windows
    ("qwen2", {"window": WINDOW, "layers": 3}),
    ("qwen3", {"window": WINDOW, "layers": 3}),
    ("mistral", {"window": WINDOW}),
    ("phi3", {"window": WINDOW}),
    ("gemma2", {"window": WINDOW, "layers": 3, "hidden": 48}),
    ("gemma3_text", {"window": WINDOW, "layers": 3, "hidden": 48}),
    # rotations
    *[("llama", {"rope_scaling": scaling}) for scaling in SCALINGS],
    *[("gemma3_text", {"rope_scaling": scaling}) for scaling in ("linear", "yarn")],
    *[("glm4", {"rope_scaling": scaling}) for scaling in SCALINGS],
    ("glm4", {"partial": 0.75}),
    ("phi3", {"partial": 0.75}),
    ("phi3", {"rope_scaling": "longrope"}),
    ("phi3", {"rope_scaling": "longrope", "partial": 0.75, "window": WINDOW}),
    ("qwen2", {"rope_scaling": "yarn"}),
    ("qwen3", {"rope_scaling": "dynamic", "window": WINDOW}),
    ("mistral", {"rope_scaling": "linear", "window": WINDOW}),
    ("gemma2", {"rope_scaling": "yarn"}),
]
LENGTHS = {"longer than every context": 90, "shorter than every context": 12}


def rewritten(folder, change):
    """The same folder with ``change`` applied to its config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(change(config)), encoding="utf-8")
    return folder


def assert_equals_transformers(folder, model, length):
    """Logits, and the gradient of a sum of log-probabilities, within 1e-9."""
    tokens = torch.randint(TOKENIZER_SIZE, (length,))
    params, config = oracle_model.load(folder)
    expected = model(tokens[None]).logits[0]
    actual = oracle_model.logits(params, config, tokens)
    assert expected.dtype == torch.float64
    assert expected.std() > 0.3
    assert (actual - expected).norm() < 1e-9 * expected.norm()
    prompt, response = tokens[: length // 3].tolist(), tokens[length // 3 :].tolist()
    total, count = oracle_model.sequence_logprob(params, config, prompt, response)
    assert count == len(response)
    model.zero_grad()
    expected.log_softmax(-1)[len(prompt) - 1 : -1].gather(1, tokens[len(prompt) :, None]).sum().backward()
    grads = {name: param.grad for name, param in model.named_parameters()}
    assert params.keys() == grads.keys()
    for (name, param), grad in zip(params.items(), torch.autograd.grad(total, list(params.values())), strict=True):
        assert grads[name].shape == param.shape
        assert (grad - grads[name]).norm() < 1e-9 * grads[name].norm(), name


@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize(("family", "shape"), SHAPES, ids=lambda part: part if isinstance(part, str) else str(part))
def test_logits_and_gradients_equal_transformers(tmp_path, in_fp64, family, shape, length):
    folder = hf.make_checkpoint(tmp_path, family, **shape)
    assert_equals_transformers(folder, in_fp64(folder), length)
