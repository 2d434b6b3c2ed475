"""No step adds to hidden states or to keys one by one: they are taken by chunks, or by an index whose backward gathers.

The backward of an index adds each element to its place by atomic operations, which NPUs do slowly and in any order.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks import parity
from tests.ranks.launcher import run_ranks

pytestmark = pytest.mark.newest_core

HIDDEN, VOCABULARY = 64, 514


class Indices(TorchDispatchMode):
    """Records the operators that take or put elements of floating-point tensors by an index, and the tensors' shapes.

    An operator that may add several elements to one place is called ``accumulates``.
    """

    TAKE = ("index", "index_select", "gather", "take", "take_along_dim")
    PUT = ("index_put", "index_put_", "_index_put_impl_", "index_copy", "index_copy_", "scatter", "scatter_")

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, tensor = func.overloadpacket.__name__, args[0] if args else None
        # megatron-core's embedding puts zeros where a mask is true, which is a masked fill
        fills = name.startswith("index_put") and any(
            index.dtype == torch.bool for index in args[1] if index is not None
        )
        if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not fills:
            # one element of a row has a place of its own
            alone = name in ("scatter_add", "scatter_add_") and args[2].shape[1:] == (1,)
            adds = name.startswith(("index_add", "index_reduce", "scatter_")) and name not in self.PUT and not alone
            # the fourth argument of a scatter is the tensor that it puts
            if adds or any(each is True for each in args[3:4]):
                name = "accumulates"
            if name in (*self.TAKE, *self.PUT, "accumulates"):
                self.seen.add((name, tuple(tensor.shape)))
        return func(*args, **(kwargs or {}))


def _indices_of_steps(folder, pairs, layout, forms):
    from mindspeed_simpo.training.session import build_schedule

    groups, found = None, {}
    for form in forms:
        common = {"global_batch_size": len(pairs), "micro_batch_size": 2, "fused_logprob": True}
        config = parity.make_config(folder, **{**common, **layout, **form})
        if groups is None:
            groups, device = parity.start(config)
        backend, models, _ = parity.build(config, groups, device, 1)
        schedule = build_schedule(config, backend, groups, device, lambda: None, models, None)
        micro_batches = parity._micro_batches(pairs, 0, config, groups)
        with Indices() as indices:
            schedule.forward_backward(micro_batches, len(pairs), 0)
        found[form["batching"]] = sorted(indices.seen)
    return found


FORMS = [
    {"batching": "padded"},
    {"batching": "packed", "max_tokens_per_micro_batch": 128},
    {"batching": "prefix_shared", "max_tokens_per_micro_batch": 128},
]


@pytest.mark.parametrize(
    "layout", [{"context_parallel_size": 2}, {"tensor_model_parallel_size": 2, "sequence_parallel": True}]
)
def test_a_step_adds_nothing_by_an_index(tmp_path, layout):
    folder = make_checkpoint(tmp_path, "qwen2", hidden=HIDDEN, vocab_size=VOCABULARY)
    for found in run_ranks(_indices_of_steps, 2, str(folder), make_token_pairs(8, VOCABULARY), layout, FORMS):
        assert found.keys() == {form["batching"] for form in FORMS}
        for form, seen in found.items():
            assert not [each for each in seen if each[0] == "accumulates"], form
            # neither keys nor values, which have four axes, nor hidden states [seq, row, hidden]
            assert not [each for each in seen if len(each[1]) >= 3], form
            # the head: states of tokens in the forward, gradients of states in the backward
            assert {name for name, shape in seen if shape[-1] == HIDDEN} == {"index_select"}, form


def test_what_adds_is_seen():
    values = torch.randn(4, HIDDEN, requires_grad=True)
    order = torch.tensor([1, 1, 3])
    with Indices() as indices:
        values[order].sum().backward()
        values.index_select(0, order).sum().backward()
        values.new_zeros(4, 2).scatter_add_(0, torch.zeros(3, 2, dtype=torch.int64), torch.ones(3, 2))
    assert {name for name, _ in indices.seen} == {"index", "index_select", "accumulates"}
    assert {shape for name, shape in indices.seen if name == "accumulates"} == {(4, HIDDEN), (4, 2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["padded", "packed", "prefix_shared", "no tokens"])
def test_the_backward_is_that_of_an_index(form, dtype):
    from mindspeed_simpo.batch import IGNORE_INDEX, Documents, Packing, ScoredTokens
    from mindspeed_simpo.loss.head import predicting_states

    draw = torch.Generator().manual_seed(2)
    targets = torch.randint(0, 9, (2, 7), generator=draw)
    targets[torch.rand(2, 7, generator=draw) < 0.4] = IGNORE_INDEX
    packing = None
    if form == "no tokens":
        targets.fill_(IGNORE_INDEX)
    elif form != "padded":
        targets[1, :4], targets[0, 4:] = IGNORE_INDEX, IGNORE_INDEX
        if form == "prefix_shared":
            targets[:, 2] = 5  # the state that predicts the first token of both
        packing = Packing(Documents((7,)), torch.arange(7), torch.zeros(7, dtype=torch.int64), 1)
    scored = ScoredTokens.of(targets, packing)
    assert len(scored.token) == (2 if form == "prefix_shared" else 1)
    hidden = torch.randn(7, 1 if packing else 2, 5, generator=draw).to(dtype)
    grad = torch.randn(len(scored.state), 5, generator=draw).to(dtype)
    results = []
    for take in (predicting_states, lambda values, some: values.flatten(0, 1).index_select(0, some.state)):
        values = hidden.clone().requires_grad_()
        states = take(values, scored)
        states.backward(grad)
        results += [states.detach(), values.grad]
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])
