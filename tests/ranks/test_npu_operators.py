"""The engine with the NPU's operators in place of every device's, computed by a stand-in, against the oracle.

The stand-in refuses what the operators refuse, and the groups refuse what HCCL refuses.
"""

import pytest

from tests import oracle
from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.parity import engine_steps, worst_error

pytestmark = pytest.mark.newest_core

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"


def take_operators():
    """Only what goes through the operators and HCCL works; sums are as narrow as MindSpeed makes them."""
    import importlib
    import sys
    import types
    from pathlib import Path

    from mindspeed_simpo.config.validation import make_layout
    from mindspeed_simpo.device import npu, operators
    from mindspeed_simpo.model import causal
    from mindspeed_simpo.training.backends import megatron

    megatron.make_layout = lambda config, ranks, model, _: make_layout(config, ranks, model, "npu")
    sys.path.insert(0, str(Path(__file__).parent.parent / "fakes"))
    npu.is_on_npu = lambda _: True
    operators._RMSNorm = operators._SwiGLU = operators._Rotation = causal.scaled_dot_product_attention = None
    sys.modules["mindspeed"] = types.ModuleType("mindspeed")
    importlib.import_module("torch_npu.hccl").make_groups()


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("qwen2", {}),
        ("glm4", {}),
        ("gemma3_text", {"batching": "packed"}),
        ("mistral", {"batching": "prefix_shared", "max_tokens_per_micro_batch": 128}),
        ("llama", {TP: 2, "sequence_parallel": True}),
        ("qwen3_moe", {"data_parallel_size": 2, "expert_model_parallel_size": 2}),
        ("gpt_oss", {"batching": "prefix_shared", "max_tokens_per_micro_batch": 128, TP: 2}),
        ("gpt_oss", {}),
        ("qwen3", {PP: 2, "recompute_granularity": "full"}),
    ],
)
def test_gradients(tmp_path, family, layout):
    if "recompute_granularity" in layout:
        layout = {**layout, "recompute_method": "uniform", "recompute_num_layers": 1}
    folder = make_checkpoint(tmp_path, family=family, vocab_size=514, std=0.15)
    pairs = make_token_pairs(8, 514)
    result = engine_steps(folder, [pairs], prepare=take_operators, lr=1e-3, **layout)
    error, name = worst_error(result["grads"], oracle.gradients(folder, pairs, oracle.Options()))
    assert error < 1e-5, name
