"""The pieces of a flat range of a parameter cover its stored elements exactly once, at their places."""

import itertools
import math

import pytest
import torch

from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.model.naming import hf_tensors, pipeline_chunks
from mindspeed_simpo.model.pieces import blocks, pieces_of
from tests.hf import make_checkpoint


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1, 4), (4, 1), (2, 3, 4)])
def test_blocks_partition_every_range(shape):
    size = math.prod(shape)
    numbers = torch.arange(size).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(size + 1), 2):
        found = []
        for first, bounds in blocks(start, stop, shape):
            block = numbers[tuple(slice(*each) for each in bounds)].flatten()
            assert block[0] == first
            found += block.tolist()
        assert found == list(range(start, stop))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("shares", [1, 3])
@pytest.mark.parametrize("family", ["qwen3", "phi3"])
def test_pieces_of_all_ranks_are_the_tensors(tmp_path, family, size, shares):
    description = read_description(str(make_checkpoint(tmp_path, family, heads=8, kv_heads=2)))
    wholes = {tensor.name: torch.zeros(tensor.shape) for tensor in hf_tensors(description)}
    expected = {name: torch.randn(whole.shape) for name, whole in wholes.items()}
    (chunk,) = pipeline_chunks(description, 1)
    for slot, rank in itertools.product(chunk.slots(description), range(size)):
        if slot.axis is None and rank:
            continue
        flat = torch.full((math.prod(slot.shape(rank, size)),), torch.nan)
        for span, part in _parts(slot, rank, size, flat):
            if span.tensor is not None:
                part.copy_(expected[span.tensor.name].narrow(slot.axis or 0, span.start, span.length))
        for share in range(shares):
            start, stop = flat.numel() * share // shares, flat.numel() * (share + 1) // shares
            for piece in pieces_of(slot, rank, size, start, stop):
                place = tuple(slice(at, at + length) for at, length in zip(piece.offsets, piece.shape, strict=True))
                wholes[piece.tensor.name][place] += piece.view(flat[start:stop], start)
    for name, whole in wholes.items():
        torch.testing.assert_close(whole, expected[name], rtol=0, atol=0)


def _parts(slot, rank, size, flat):
    spans = slot.spans(rank, size)
    values = flat.view(slot.shape(rank, size))
    return zip(spans, torch.split(values, [span.length for span in spans], slot.axis or 0), strict=True)
