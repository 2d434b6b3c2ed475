"""One pair of 32,768 tokens: four context-parallel ranks have the gradient of one rank, and nothing is quadratic."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.launcher import run_ranks
from tests.ranks.parity import worst_error

pytestmark = pytest.mark.newest_core

TOKENS = 32_768
LONGEST = 128 * TOKENS
"""Elements of the scores of one block of queries; those of all queries are ``TOKENS`` squared."""


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator returned."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        # an expanded tensor has fewer elements in memory than in its shape
        found = (
            leaf.untyped_storage().nbytes() // 4 for leaf in tree_leaves(results) if isinstance(leaf, torch.Tensor)
        )
        self.elements = max(self.elements, *found, 0)
        return results


def _gradients(folder, pair, batching):
    import torch.distributed as dist

    from mindspeed_simpo.batch import TokenizedPair
    from mindspeed_simpo.data.batching import Batching
    from mindspeed_simpo.model.megatron.weights import gather_hf_tensors
    from mindspeed_simpo.training.session import build_schedule
    from tests.ranks.parity import build, make_config, start

    config = make_config(
        folder,
        context_parallel_size=dist.get_world_size(),
        seq_length=TOKENS,
        max_prompt_length=TOKENS - 1,
        micro_batch_size=1,
        global_batch_size=1,
        batching=batching,
        fused_logprob=True,
    )
    groups, device = start(config)
    backend, wrapped, _ = build(config, groups, device, 1)
    schedule = build_schedule(config, backend, groups, device, lambda: None, wrapped, None)
    micro_batches = Batching.of(config).micro_batches([TokenizedPair(*pair, source="")], [0])
    with LargestTensor() as largest:
        [scored] = schedule.forward_backward(micro_batches, 1)
    grads = gather_hf_tensors(wrapped, backend.description, groups, value=lambda parameter: parameter.main_grad)
    loss = scored.output.loss.item()
    return loss, {name: tensor.clone().numpy() for name, tensor in grads}, largest.elements


def test_four_context_ranks_have_the_gradient_of_one(tmp_path):
    shape = {"hidden": 16, "layers": 1, "heads": 1, "kv_heads": 1, "intermediate": 16, "vocab_size": 270}
    folder = make_checkpoint(tmp_path, "qwen2", **shape)
    [(_, chosen, rejected)] = make_token_pairs(1, 270, max_response=60)
    generator = torch.Generator().manual_seed(7)
    prompt = torch.randint(270, (TOKENS - len(chosen) - len(rejected),), generator=generator).tolist()
    arguments = str(folder), (prompt, chosen, rejected), "prefix_shared"
    [(loss, expected, elements)] = run_ranks(_gradients, 1, *arguments, timeout_s=300)
    assert elements <= LONGEST
    by_rank = run_ranks(_gradients, 4, *arguments, timeout_s=300)
    for own_loss, _, elements in by_rank:
        assert own_loss == pytest.approx(loss, rel=1e-6)
        assert elements <= LONGEST
    found, expected = (
        {name: torch.from_numpy(array) for name, array in grads.items()} for grads in (by_rank[0][1], expected)
    )
    error, name = worst_error(found, expected)
    assert error < 1e-5, name
