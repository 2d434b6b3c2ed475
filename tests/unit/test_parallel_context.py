"""Order of the chunks of a sequence under context parallelism, there and back, with backwards that only copy."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_simpo.batch import Branch, Documents
from mindspeed_simpo.model import packed
from mindspeed_simpo.model.packed import packed_attention
from mindspeed_simpo.parallel.context import in_rank_order, in_sequence_order, positions_of, segments_of


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
    held = torch.cat([positions_of(rank, size, (seq,), torch.device("cpu")) for rank in range(size)])
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


ROWS = {
    "one document": Documents((24,)),
    "shorter than the chunks are many": Documents((7, 3, 1, 9, 4)),
    "suffixes, and padding": Documents((5, 6), (Branch(0, 3, 4), Branch(5, 2, 5), Branch(0, 0, 4))),
}


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", ROWS)
def test_every_rank_holds_as_many_tokens_of_a_packed_row(name, size):
    documents = ROWS[name].with_padding(-sum(ROWS[name].lengths) % (2 * size))
    held = [positions_of(rank, size, documents.lengths, torch.device("cpu")).tolist() for rank in range(size)]
    assert len({len(each) for each in held}) == 1
    assert sorted(position for each in held for position in each) == list(range(sum(documents.lengths)))


@pytest.mark.parametrize("size", [2, 3, 8])
def test_the_ranks_attend_to_equally_many_keys_of_a_document(size):
    lengths = (4001, 517, 1306 + -(4001 + 517 + 1306) % (2 * size))
    work = [
        sum((stop - start) * (start + stop + 1) // 2 for _, start, stop in segments_of(lengths, rank, size))
        for rank in range(size)
    ]
    assert max(work) / min(work) < 1.01


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("name", ROWS)
def test_attention_of_the_segments_is_that_of_the_row(name, size, window):
    documents = ROWS[name].with_padding(-sum(ROWS[name].lengths) % (2 * size))
    seq = sum(documents.lengths)
    row = [torch.randn(seq, 1, heads, 8, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    upstream = torch.randn(seq, 1, 32, dtype=torch.float64)
    expected = packed_attention(*row, documents, 0.3, window)
    held = [positions_of(rank, size, documents.lengths, torch.device("cpu")) for rank in range(size)]
    order = torch.cat(held)
    query, key, value = row
    parts = [
        packed.segmented_attention(query[own], key[order], value[order], documents, rank, size, 0.3, window)
        for rank, own in enumerate(held)
    ]
    torch.testing.assert_close(torch.cat(parts), expected[order])
    grads = torch.autograd.grad(torch.cat(parts), row, upstream[order]), torch.autograd.grad(expected, row, upstream)
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert torch.equal(packed.in_row_order(query[order], documents, size), query)
    assert torch.equal(packed.in_rank_order(query, documents, size), query[order])
    lengths = packed.document_lengths(documents, 0, 1, torch.device("cpu"))
    own = [packed.document_lengths(documents, rank, size, torch.device("cpu")) for rank in range(size)]
    assert torch.equal(torch.cat(own), lengths[order])
