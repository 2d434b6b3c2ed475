"""The cache of reference log-probabilities: complete shards, or none; each rank digests its share of the files."""

import logging

import numpy as np
import pytest

from mindspeed_simpo.data.loader import PairStream
from mindspeed_simpo.data.mixture import Mixture
from mindspeed_simpo.errors import DataError
from mindspeed_simpo.loss import reference
from mindspeed_simpo.loss.reference import ReferenceCache, file_digests, model_fingerprint


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(reference, "SHARD_PAIRS", 4)


def cache_in(folder, num_pairs=10, **key):
    facts = {"dataset": "data", "model": "model", "bf16": False} | key
    return ReferenceCache(folder, facts["dataset"], facts["model"], bf16=facts["bf16"], num_pairs=num_pairs)


def test_shards_hold_what_is_known(tmp_path):
    cache = cache_in(tmp_path)
    sums = cache.read()
    assert sums.shape == (10, 2)
    assert np.isnan(sums).all()
    pairs = np.array([1, 2, 9])
    sums[pairs] = [[1.5, -2.0], [0.1, 0.2], [3.0, 4.0]]
    cache.write(sums, pairs)
    assert [path.name for path in sorted(cache.folder.iterdir())] == ["0000000000.npy", "0000000008.npy"]
    np.testing.assert_array_equal(cache_in(tmp_path).read(), sums)
    for key in ({"dataset": "other"}, {"model": "other"}, {"bf16": True}):
        assert np.isnan(cache_in(tmp_path, **key).read()).all()


@pytest.mark.parametrize("harm", [lambda c: c[:-1], lambda c: bytes([c[0] ^ 1]) + c[1:], lambda _: b""])
def test_a_damaged_shard_is_computed_again(tmp_path, caplog, harm):
    cache = cache_in(tmp_path)
    cache.write(np.ones((10, 2)), np.arange(10))
    shard = cache.folder / "0000000004.npy"
    shard.write_bytes(harm(shard.read_bytes()))
    with caplog.at_level(logging.WARNING):
        sums = cache.read()
    assert f"{shard}: damaged" in caplog.text
    assert np.flatnonzero(np.isnan(sums[:, 0])).tolist() == [4, 5, 6, 7]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "reference").write_text("a file")
    with pytest.raises(DataError, match="data_cache_dir"):
        cache_in(tmp_path).write(np.ones((10, 2)), np.arange(2))


def test_ranks_digest_shares_of_the_files(tmp_path):
    for number in range(5):
        (tmp_path / f"model-{number}.safetensors").write_bytes(bytes([number]) * 1000)
    (tmp_path / "config.json").write_text("{}")
    whole = file_digests(tmp_path, weights=True, rank=0, size=1)
    parts = [file_digests(tmp_path, weights=True, rank=rank, size=4) for rank in range(4)]
    assert sorted(map(len, parts)) == [1, 1, 2, 2]
    together = {name: digest for part in parts for name, digest in part.items()}
    assert model_fingerprint(together, None) == model_fingerprint(whole, None)
    (tmp_path / "model-3.safetensors").write_bytes(b"other")
    changed = file_digests(tmp_path, weights=True, rank=0, size=1)
    assert model_fingerprint(changed, None) != model_fingerprint(whole, None)
    random = file_digests(tmp_path, weights=False, rank=0, size=1)
    assert random.keys() == {"config.json"}
    assert model_fingerprint(random, 1) != model_fingerprint(random, 2)


@pytest.mark.parametrize("seed", [None, 3])
def test_the_pairs_between_two_places_of_the_stream(seed):
    stream = PairStream(Mixture.of_all(10), seed)
    places = [pair for step in range(6) for pair in stream.take(stream.consumed_pairs(step, 4), 4)]
    for first in range(0, 20, 3):
        for last in range(first, 20, 2):
            assert stream.between(first, last).tolist() == sorted(set(places[first:last]))
