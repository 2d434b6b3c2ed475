"""Order of the chunks of a sequence under context parallelism, there and back, with backwards that only copy."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_simpo.batch import Branch, Documents
from mindspeed_simpo.model.packed import packed_attention
from mindspeed_simpo.parallel.context import in_rank_order, in_sequence_order, positions_of


class Operators(TorchDispatchMode):
    """Names of the operators that run while it is entered."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def indexed(names):
    return {name for name in names if name.startswith(("index", "_index", "scatter", "gather"))}


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_slices_of_all_ranks_make_the_sequence(size):
    seq = 2 * size * 3
    sequence = torch.randn(seq, 2, 5)
    held = torch.cat([positions_of(rank, size, seq, torch.device("cpu")) for rank in range(size)])
    slices = sequence[held]
    assert torch.equal(in_sequence_order(slices, size), sequence)
    assert torch.equal(in_rank_order(sequence, size), slices)


@pytest.mark.parametrize(
    ("function", "inverse"), [(in_sequence_order, in_rank_order), (in_rank_order, in_sequence_order)]
)
def test_the_gradient_comes_back_in_the_other_order_by_copies(function, inverse):
    value = torch.randn(12, 3, requires_grad=True)
    upstream = torch.randn(12, 3)
    with Operators() as operators:
        (gradient,) = torch.autograd.grad(function(value, 2), value, upstream)
    assert torch.equal(gradient, inverse(upstream, 2))
    assert not indexed(operators.names), operators.names


def test_keys_of_branches_are_copied_without_an_index():
    documents = Documents((5, 6), (Branch(0, 3, 4), Branch(5, 2, 5)))
    query, key, value = (torch.randn(20, 1, heads, 8, requires_grad=True) for heads in (4, 2, 2))
    with Operators() as operators:
        packed_attention(query, key, value, documents, 0.3).sum().backward()
    assert not indexed(operators.names), operators.names
