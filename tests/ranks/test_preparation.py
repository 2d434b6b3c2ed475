"""Tokenising by several ranks: shares of a common cache folder, and hosts with folders of their own."""

from __future__ import annotations

import json
import os

import pytest

from tests.ranks.launcher import run_ranks
from tests.unit.data_helpers import PLAIN, write_jsonl

pytestmark = pytest.mark.newest_core

HOSTS = {"one host": (4, True), "two hosts, one folder": (2, True), "two hosts, two folders": (2, False)}


def _prepare(folder, data, ranks_of_host, shared):
    import torch.distributed as dist

    from mindspeed_simpo.data import json_source, preparation
    from mindspeed_simpo.data.encoding import PairEncoder
    from mindspeed_simpo.data.json_source import JsonSource
    from mindspeed_simpo.data.together import prepare_together
    from tests.unit.data_helpers import config_for, tokenizer

    rank = dist.get_rank()
    os.environ |= {"LOCAL_RANK": str(rank % ranks_of_host), "LOCAL_WORLD_SIZE": str(ranks_of_host)}
    host = "shared" if shared else f"host{rank // ranks_of_host}"
    preparation.BLOCK_EXAMPLES, json_source.PIECE_BYTES = 8, 500
    encoded, original = [], PairEncoder.encode
    surveyed, survey = [], JsonSource.survey

    def counted(self, pair):
        encoded.append(pair)
        return original(self, pair)

    def counted_survey(self, piece):
        surveyed.append(piece)
        return survey(self, piece)

    PairEncoder.encode, JsonSource.survey = counted, counted_survey
    config = config_for(folder, data, data_cache_dir=f"{folder}/{host}")
    counts = []
    try:
        for again in range(2):
            if again and not shared and rank == 0:
                (file,) = (folder / "host0" / "tokenised").iterdir()
                damaged = file.read_bytes()[:-1]
                file.unlink()  # the first data set has the file mapped
                file.write_bytes(damaged)
            dist.barrier()
            encoded.clear()
            dataset = prepare_together(config, tokenizer(), "train", dist.group.WORLD, vocab_size=100_000)
            counts.append(len(encoded))
        left = sorted(path.name.split(".")[-1] for path in (folder / host / "tokenised").iterdir())
    finally:
        PairEncoder.encode, JsonSource.survey = original, survey
    return counts, len(dataset), dataset.fingerprint, left, surveyed


@pytest.mark.parametrize("hosts", HOSTS)
def test_ranks_divide_the_work(tmp_path, hosts):
    data = write_jsonl(tmp_path / "rows.jsonl", [{**PLAIN, "chosen": f"answer {number}"} for number in range(64)])
    ranks_of_host, shared = HOSTS[hosts]
    results = run_ranks(_prepare, 4, tmp_path, data, ranks_of_host, shared)
    first = [counts[0] for counts, *_ in results]
    assert first == ([16] * 4 if shared else [32] * 4)
    # the second time all is there, but for what was damaged on the first host
    assert [counts[1] for counts, *_ in results] == ([0] * 4 if shared else [32, 32, 0, 0])
    assert {size for _, size, *_ in results} == {64}
    assert len({fingerprint for _, _, fingerprint, *_ in results}) == 1
    assert all(left == ["arrow"] for *_, left, _ in results)
    # each host reads the data for their digest once a run, of which there were two
    pieces = list(range(-(-data.stat().st_size // 500)))
    for first_rank in range(0, 4, ranks_of_host):
        of_host = [piece for *_, surveyed in results[first_rank : first_rank + ranks_of_host] for piece in surveyed]
        assert sorted(of_host) == sorted(2 * pieces)


def _fail(folder, data):
    import torch.distributed as dist

    from mindspeed_simpo.data.together import prepare_together
    from mindspeed_simpo.errors import DataError
    from tests.unit.data_helpers import config_for, tokenizer

    with pytest.raises(DataError) as caught:
        prepare_together(config_for(folder, data), tokenizer(), "train", dist.group.WORLD, vocab_size=100_000)
    return str(caught.value), caught.value.everywhere


def test_every_rank_refuses_what_one_refuses(tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", [PLAIN, "{broken"])
    for message, everywhere in run_ranks(_fail, 2, tmp_path, data):
        assert "1 of 2 rows cannot be used" in message
        assert everywhere
    (tmp_path / "rows.json").write_text("[" + json.dumps(PLAIN) + ", {broken")
    for message, _ in run_ranks(_fail, 2, tmp_path, tmp_path / "rows.json"):
        assert "rows.json:1: not valid JSON" in message
