"""Tokenising in blocks: what processes and shares read, write, and find after a kill."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.data import json_source, preparation, workers
from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.dataset import dataset_of, preparations_of, prepare_pairs
from mindspeed_simpo.data.encoding import PairEncoder
from mindspeed_simpo.data.indexed import IndexedSource, write_indexed_pairs
from mindspeed_simpo.data.json_source import JsonLine, JsonSource
from mindspeed_simpo.data.paths import open_sources
from mindspeed_simpo.data.source import decoded, survey_share, take_surveys
from mindspeed_simpo.errors import DataError
from tests.hf import make_pairs, make_token_pairs
from tests.unit.data_helpers import BROKEN, PLAIN, config_for, prepare, texts, tokenizer, write_jsonl


def _source(tmp_path, kind):
    """A source of 40 examples."""
    rows = [{**PLAIN, "chosen": f"answer {number} " + "word " * (number % 7)} for number in range(40)]
    if kind == "jsonl":
        lines = [line for row in rows for line in (json.dumps(row), *[""] * (row["chosen"].count("word") // 3))]
        (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet", row_group_size=7)
    elif kind == "saved":
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "rows.saved")
    else:
        write_indexed_pairs(tmp_path / "rows.pairs", [TokenizedPair(*ids, "") for ids in make_token_pairs(40, 500)])
        return IndexedSource(tmp_path / "rows.pairs", "pairs")
    [path] = tmp_path.glob("rows.*")
    [source] = open_sources(str(path), "train", ExampleReader(None).column_names)
    return source


@pytest.mark.parametrize("piece", [1, 100, 333, 5000])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved", "indexed"])
def test_reading_may_begin_at_each_example(tmp_path, monkeypatch, kind, piece):
    monkeypatch.setattr(json_source, "PIECE_BYTES", piece)
    source = _source(tmp_path, kind)
    whole = [(number, decoded(value)) for number, value in source.raw_examples()]
    assert len(whole) == 40
    assert source.places >= whole[-1][0]
    for after in range(whole[-1][0]):
        part = [(number, decoded(value)) for number, value in source.raw_examples(after)]
        assert part == [example for example in whole if example[0] > after]


def _bytes_read():
    return int(Path("/proc/self/io").read_text().split()[1])


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="counts what the process reads in /proc")
def test_a_share_reads_little_beside_its_own_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(json_source, "PIECE_BYTES", 1 << 18)
    monkeypatch.setattr(preparation, "BLOCK_EXAMPLES", 256)
    row = json.dumps({**PLAIN, "chosen": "word " * 200})
    path = write_jsonl(tmp_path / "rows.jsonl", [row] * 8192)
    [work] = preparations_of(config_for(tmp_path, path), tokenizer(), "train", None)
    monkeypatch.setattr(preparation, "write_shards", lambda blocks, *_: [len(block.examples) for block in blocks])
    before = _bytes_read()
    work.tokenise_share(13, 16, num_workers=1, progress=False)
    assert _bytes_read() - before < path.stat().st_size / 16 + (1 << 18) + (1 << 17)


def test_shares_survey_their_own_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(json_source, "PIECE_BYTES", 1000)
    source = JsonSource(write_jsonl(tmp_path / "rows.jsonl", [PLAIN] * 100), "rows")
    assert source.pieces > 8
    own = [survey_share([source], index, 3) for index in range(3)]
    assert [len(surveys) for surveys in own] == [len(range(index, source.pieces, 3)) for index in range(3)]
    other = JsonSource(tmp_path / "rows.jsonl", "rows")
    take_surveys([other], own[0] | own[1] | own[2])
    monkeypatch.setattr(JsonSource, "survey", lambda *_: pytest.fail("read again"))
    assert other.digest
    assert other.places == 101


def test_nothing_is_left_behind_when_a_file_is_broken(tmp_path):
    good, bad = write_jsonl(tmp_path / "a.jsonl", [PLAIN]), tmp_path / "b.json"
    bad.write_text("[{")
    with pytest.raises(DataError, match=r"b.json:1: not valid JSON"):
        prepare(tmp_path, [bad, good])
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_processes_give_what_one_process_gives(tmp_path, monkeypatch, capsys):
    path = make_pairs(tmp_path / "pairs.jsonl", 200)
    write_jsonl(tmp_path / "broken.jsonl", BROKEN)
    config = config_for(tmp_path, [path, tmp_path / "broken.jsonl"], data_errors="drop", truncation="keep_end")
    serial = prepare_pairs(config, tokenizer(), "train", progress=False)
    monkeypatch.setattr(preparation, "BLOCK_EXAMPLES", 16)
    monkeypatch.setattr(workers, "PATIENCE_SECONDS", 0)
    several = config.model_copy(update={"num_workers": 2, "data_cache_dir": str(tmp_path / "other")})
    parallel = prepare_pairs(several, tokenizer(), "train", progress=True)
    assert [parallel[i] for i in range(len(parallel))] == [serial[i] for i in range(len(serial))]
    assert parallel.report.problems == serial.report.problems
    assert parallel.fingerprint == serial.fingerprint
    assert "100%" in capsys.readouterr().err


SLOW = """
import os, pathlib, sys, time
sys.path.insert(0, {root!r})
from mindspeed_simpo.data import dataset, preparation, workers
from mindspeed_simpo.data.encoding import PairEncoder
from tests.unit.data_helpers import config_for, prepare_pairs, tokenizer

folder = pathlib.Path({folder!r})


class Slow(PairEncoder):
    def encode(self, pair):
        (folder / f"pid{{os.getpid()}}").touch()
        time.sleep(0.02)
        return super().encode(pair)


if __name__ == "__main__":
    dataset.PairEncoder, preparation.BLOCK_EXAMPLES, workers.PATIENCE_SECONDS = Slow, 16, 0
    prepare_pairs(config_for(folder, {data!r}, num_workers=2), tokenizer(), "train", progress=False)
"""


@pytest.fixture
def slow_run(tmp_path):
    """A process that tokenises 400 pairs, in shards of 16 with two worker processes; it has written two shards."""
    data = make_pairs(tmp_path / "pairs.jsonl", 400)
    script = tmp_path / "run.py"
    script.write_text(SLOW.format(root=str(Path(__file__).parents[2]), folder=str(tmp_path), data=str(data)))
    process = subprocess.Popen([sys.executable, str(script)], stderr=subprocess.PIPE, text=True)
    try:
        _wait_for(lambda: list((tmp_path / "cache" / "tokenised").glob("*.shards/0*.arrow")), at_least=2)
        yield process, data
    finally:
        process.kill()
        process.communicate()


def test_a_killed_run_leaves_no_process_and_goes_on_with_its_shards(tmp_path, slow_run, monkeypatch):
    process, data = slow_run
    process.kill()
    process.wait()
    pids = [int(path.name[3:]) for path in tmp_path.glob("pid*")]
    assert len(pids) == 2
    assert process.pid not in pids
    _wait_for(lambda: [pid for pid in pids if not Path(f"/proc/{pid}").exists()], at_least=len(pids))
    assert not list((tmp_path / "cache" / "tokenised").glob("*.arrow"))
    (folder,) = (tmp_path / "cache" / "tokenised").glob("*.shards")
    shards = sorted(folder.glob("0*.arrow"))
    damaged = shards[0].read_bytes()[:-1]
    shards[0].unlink()
    shards[0].write_bytes(damaged)

    encoded = []
    monkeypatch.setattr(preparation, "BLOCK_EXAMPLES", 16)
    original = PairEncoder.encode
    monkeypatch.setattr(PairEncoder, "encode", lambda self, pair: encoded.append(pair) or original(self, pair))
    config = config_for(tmp_path, data)
    dataset = prepare_pairs(config, tokenizer(), "train", progress=False)
    assert len(dataset) == 400
    assert len(encoded) == 400 - 16 * (len(shards) - 1)
    assert not folder.exists()
    fresh = config.model_copy(update={"data_cache_dir": str(tmp_path / "other")})
    assert prepare_pairs(fresh, tokenizer(), "train", progress=False).fingerprint == dataset.fingerprint


def test_a_stopped_run_ends_without_a_traceback(tmp_path):
    data = make_pairs(tmp_path / "pairs.jsonl", 4000)
    root = Path(__file__).parents[2]
    flags = {
        "--data-path": data,
        "--data-cache-dir": tmp_path / "cache",
        "--model-name-or-path": root / "configs" / "quickstart",
        "--seq-length": 1024,
    }
    command = [sys.executable, "-m", "mindspeed_simpo", "check", str(root / "configs" / "quickstart.yaml")]
    process = subprocess.Popen(
        [*command, *(str(word) for flag in flags.items() for word in flag)],
        env={**os.environ, "PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    _wait_for(lambda: list((tmp_path / "cache" / "tokenised").glob("*.shards/*")), at_least=1)
    process.terminate()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "Traceback" not in stderr


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [31, 32, 33])
def test_shares_make_what_one_process_makes(tmp_path, monkeypatch, count, size):
    monkeypatch.setattr(preparation, "BLOCK_EXAMPLES", 8)
    rows = [{**PLAIN, "chosen": f"answer {number}"} for number in range(size - 1)] + ["{broken"]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = config_for(tmp_path, path, data_errors="drop")
    works = [preparations_of(config, tokenizer(), "train", None)[0] for _ in range(count)]
    for index in reversed(range(count)):
        if index == 0 and 1 < count < 5:
            with pytest.raises(DataError, match=r"0000_0000000.arrow: this part of the tokenised data is missing"):
                works[0].merge()
        works[index].tokenise_share(index, count, num_workers=1, progress=False)
    assert len(list(works[0].folder.iterdir())) == size // 8 + 1
    table = works[0].merge()
    assert table.table.num_rows == size
    whole = prepare(tmp_path, path, data_errors="drop", data_cache_dir=str(tmp_path / "other"))
    assert dataset_of(config, "train", works[:1], [table]).fingerprint == whole.fingerprint
    assert whole.report.malformed == 1


def test_a_share_decodes_only_its_own_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "BLOCK_EXAMPLES", 8)
    path = write_jsonl(tmp_path / "rows.jsonl", [{**PLAIN, "chosen": f"answer {number}"} for number in range(64)])
    decoded = []
    original = JsonLine.decode
    monkeypatch.setattr(JsonLine, "decode", lambda self: decoded.append(self) or original(self))
    [work] = preparations_of(config_for(tmp_path, path), tokenizer(), "train", None)
    work.tokenise_share(1, 4, num_workers=1, progress=False)
    assert len(decoded) == 16 + 1  # the first line tells the layout


def test_single_answers_are_grouped_whatever_the_shares(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "BLOCK_EXAMPLES", 2)
    rows = [
        {"prompt": f"q{number}", "response": text, "score": score}
        for number in range(9)
        for text, score in (("bad", 1), ("good", 2))
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = config_for(tmp_path, path)
    works = [preparations_of(config, tokenizer(), "train", None)[0] for _ in range(2)]
    for index, work in enumerate(works):
        work.tokenise_share(index, 2, num_workers=1, progress=False)
    dataset = dataset_of(config, "train", works[:1], [works[0].merge()])
    assert len(dataset) == 9
    assert texts(dataset, 8)[1:] == ("good<|im_end|>", "bad<|im_end|>")


def _wait_for(observe, at_least, seconds=60.0):
    end = time.monotonic() + seconds
    while len(seen := observe()) < at_least:
        assert time.monotonic() < end, seen
        time.sleep(0.1)
    return seen
