"""Preparing the pairs of a run: reports, what fails and what is left out, the split, the cache."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mindspeed_simpo.data import preparation, workers
from mindspeed_simpo.data.dataset import dataset_of, has_eval_data, preparation_of, prepare_pairs
from mindspeed_simpo.data.encoding import PairEncoder
from mindspeed_simpo.data.json_source import JsonLine
from mindspeed_simpo.data.preparation import Preparation
from mindspeed_simpo.errors import ConfigError, DataError
from tests.hf import make_pairs
from tests.unit.data_helpers import PLAIN, config_for, prepare, texts, tokenizer, write_jsonl

REAL = Path(__file__).parents[3] / "shared" / "data"
BROKEN = [
    PLAIN,
    "{bad json",
    {**PLAIN, "chosen": ""},
    {**PLAIN, "rejected": PLAIN["chosen"]},
    {**PLAIN, "chosen": "x" * 400},
    {**PLAIN, "prompt": 5},
    PLAIN,
]


def test_pairs_are_read_back_as_they_are(tmp_path):
    dataset = prepare(tmp_path, [PLAIN, {**PLAIN, "chosen": "巴黎。", "system": "简短"}])
    assert len(dataset) == 2
    assert texts(dataset, 1) == (
        "<|im_start|>system\n简短<|im_end|>\n<|im_start|>user\nWhat is the capital of France?<|im_end|>\n"
        "<|im_start|>assistant\n",
        "巴黎。<|im_end|>",
        "I do not know.<|im_end|>",
    )
    assert dataset[1].source == f"{tmp_path / 'rows.jsonl'}:2"
    assert dataset.lengths.tolist() == [list(dataset[0].lengths), list(dataset[1].lengths)]
    for index in (-1, 2):
        with pytest.raises(IndexError):
            dataset[index]


def test_fail_lists_every_kind_of_problem_with_its_line(tmp_path):
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, BROKEN, seq_length=128)
    message = str(caught.value)
    path = tmp_path / "rows.jsonl"
    for line, words in (
        (2, "malformed: not valid JSON"),
        (3, "empty: chosen"),
        (4, "identical: chosen and rejected"),
        (6, "malformed: prompt: expected text, found the number 5"),
    ):
        assert f"{path}:{line}: {words}" in message
    assert "4 of 7 rows cannot be used" in message
    assert "set `data_errors: drop`" in message
    assert "1 of 7 pairs are longer than seq_length 128" in message
    assert f"{path}:5: too long" in message
    assert "set `truncation` to drop, keep_end or keep_start" in message


def test_each_option_lets_its_own_rows_pass(tmp_path, caplog):
    with pytest.raises(DataError, match="1 of 7 pairs are longer") as caught:
        prepare(tmp_path, BROKEN, seq_length=128, data_errors="drop")
    assert "cannot be used" not in str(caught.value)
    with pytest.raises(DataError, match="4 of 7 rows cannot be used") as caught:
        prepare(tmp_path, BROKEN, seq_length=128, truncation="drop")
    assert "are longer" not in str(caught.value)
    with caplog.at_level(logging.WARNING):
        dataset = prepare(tmp_path, BROKEN, seq_length=128, data_errors="drop", truncation="drop")
    report = dataset.report
    assert (report.rows, report.kept, len(dataset)) == (7, 2, 2)
    assert (report.malformed, report.empty, report.identical, report.not_prefix, report.too_long) == (2, 1, 1, 0, 1)
    assert "7 rows, 2 pairs kept; left out: 2 malformed, 1 empty, 1 identical, 1 too long" in caplog.text
    assert "rows.jsonl:3: empty" in caplog.text
    assert [problem.source.rpartition(":")[2] for problem in report.problems] == ["2", "3", "4", "5", "6"]
    assert [dataset[i].source.rpartition(":")[2] for i in range(2)] == ["1", "7"]


def test_many_problems_are_counted_and_the_first_are_listed(tmp_path):
    with pytest.raises(DataError) as caught:
        prepare(tmp_path, [PLAIN] + ["{"] * 30)
    assert "30 of 31 rows" in str(caught.value)
    assert str(caught.value).count("malformed") == 10
    assert "and 20 more" in str(caught.value)


def test_no_pair_left_is_an_error_even_when_dropping(tmp_path):
    with pytest.raises(DataError, match=r"no pair is left of 1 rows in .*rows.jsonl") as caught:
        prepare(tmp_path, ["{"], data_errors="drop")
    assert "rows.jsonl:1: malformed" in str(caught.value)


def test_control_characters_and_surrogates_in_data_never_break_a_message(tmp_path):
    rows = [PLAIN, r'{"a\nb\u001b[0m": 1}', r'{"\ud800": 1}', r'{"prompt": "q", "chosen": "\udfff", "rejected": "x"}']
    dataset = prepare(tmp_path, rows, data_errors="drop")
    messages = [str(problem) for problem in dataset.report.problems]
    assert len(messages) == dataset.report.malformed == 3
    assert all(message.isprintable() for message in messages)
    assert r"`a\nb\x1b[0m`" in messages[0]


def test_truncation_is_counted(tmp_path):
    rows = [PLAIN, {**PLAIN, "prompt": "word " * 200}, {**PLAIN, "chosen": "word " * 200}]
    report = prepare(tmp_path, rows, seq_length=160, max_prompt_length=120, truncation="keep_end").report
    assert (report.truncated_prompts, report.truncated_responses) == (1, 1)
    assert report.pair_tokens.longest == 160
    pairs = report.lengths[:, 0] + report.lengths[:, 1:].max(axis=1)
    assert report.pair_tokens.total == pairs.sum()
    assert np.array_equal(np.sort(pairs)[1:], [160, 160])


def test_the_split_is_by_rows_in_order(tmp_path):
    rows = [{**PLAIN, "chosen": f"answer {number}"} for number in range(20)]
    options = {"split": "75,20,5"}
    train, held_out = (prepare(tmp_path, rows, part=part, **options) for part in ("train", "eval"))
    assert [train[i].source.rpartition(":")[2] for i in (0, 14)] == ["1", "15"]
    assert [held_out[i].source.rpartition(":")[2] for i in range(len(held_out))] == ["16", "17", "18", "19"]
    assert train.fingerprint != held_out.fingerprint
    with pytest.raises(DataError, match="split 99,1 of 20 rows leaves no row for the eval part"):
        prepare(tmp_path, rows, part="eval", split="99,1")


def test_problems_belong_to_their_part(tmp_path):
    rows = [PLAIN, PLAIN, "{", PLAIN]
    assert len(prepare(tmp_path, rows, split="50,50")) == 2
    with pytest.raises(DataError, match="1 of 2 rows cannot be used"):
        prepare(tmp_path, rows, part="eval", split="50,50")


def test_evaluation_data(tmp_path):
    write_jsonl(tmp_path / "held_out.jsonl", [{**PLAIN, "chosen": "Paris, of course."}] * 3)
    config = config_for(tmp_path, tmp_path / "rows.jsonl")
    assert not has_eval_data(config)
    with pytest.raises(ConfigError, match="no evaluation data: set eval_data_path, or give split a second weight"):
        prepare(tmp_path, [PLAIN], part="eval")
    with_path = {"eval_data_path": str(tmp_path / "held_out.jsonl"), "split": "50,50"}
    assert len(prepare(tmp_path, [PLAIN] * 2, part="eval", **with_path)) == 3


def test_the_cache_is_used_and_keeps_the_report(tmp_path, monkeypatch):
    options = {"seq_length": 128, "data_errors": "drop", "truncation": "drop"}
    first = prepare(tmp_path, BROKEN, **options)
    monkeypatch.setattr(Preparation, "tokenise_share", lambda *_, **__: pytest.fail("tokenised again"))
    second = prepare(tmp_path, BROKEN, **options)
    assert second.fingerprint == first.fingerprint
    assert second.report.problems == first.report.problems
    assert second.report.summary() == first.report.summary()
    assert second[1] == first[1]
    moved = tmp_path / "elsewhere.jsonl"
    shutil.copy(tmp_path / "rows.jsonl", moved)
    third = prepare(tmp_path, moved, **options)
    assert third.fingerprint == first.fingerprint
    assert third[1].source == f"{moved}:7"


def cache_files(tmp_path):
    return len(list((tmp_path / "cache" / "tokenised").iterdir()))


@pytest.mark.parametrize(
    "options",
    [{"seq_length": 256}, {"truncation": "keep_end"}, {"max_prompt_length": 50}, {"map_keys": {"query": ""}}],
)
def test_the_cache_is_of_one_set_of_options(tmp_path, options):
    first, second = prepare(tmp_path, [PLAIN]), prepare(tmp_path, [PLAIN], **options)
    assert cache_files(tmp_path) == 2
    assert first.fingerprint == second.fingerprint  # of the same token ids


def test_the_fingerprint_is_that_of_the_token_ids(tmp_path):
    rows = [PLAIN, {**PLAIN, "prompt": "word " * 50}, {**PLAIN, "chosen": "Rome."}]
    fingerprints = [
        prepare(tmp_path, rows).fingerprint,
        prepare(tmp_path, rows, seq_length=100, truncation="keep_end").fingerprint,
        prepare(tmp_path, rows, seq_length=100, truncation="drop").fingerprint,
        prepare(tmp_path, rows[::-1]).fingerprint,
        prepare(tmp_path, [*rows, {"broken": 1}], data_errors="drop").fingerprint,
        prepare(tmp_path, rows[:1]).fingerprint,
        prepare(tmp_path, rows[:1], family="llama").fingerprint,
        prepare(tmp_path, rows, split="50,50").fingerprint,
    ]
    assert len(set(fingerprints)) == len(fingerprints)


def test_other_versions_of_the_libraries_may_go_on(tmp_path, monkeypatch):
    first = prepare(tmp_path, [PLAIN] * 3)
    monkeypatch.setattr("mindspeed_simpo.data.tokenizer.transformers.__version__", "99.0")
    second = prepare(tmp_path, [PLAIN] * 3)
    assert cache_files(tmp_path) == 2
    assert second.fingerprint == first.fingerprint


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "garbage"])
def test_a_damaged_cache_is_rebuilt(tmp_path, damage):
    first = prepare(tmp_path, [PLAIN] * 3)
    (file,) = (tmp_path / "cache" / "tokenised").iterdir()
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle] ^= 1
    damaged = {"truncate": bytes(data[:middle]), "flip": bytes(data), "empty": b"", "garbage": b"x" * 100}[damage]
    file.unlink()  # the first dataset has the file mapped
    file.write_bytes(damaged)
    second = prepare(tmp_path, [PLAIN] * 3)
    assert second[2] == first[2]
    assert file.read_bytes() != damaged


def test_a_cache_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/sub/tokenised.*: cannot write tokenised data: .*set data_cache_dir"):
        prepare(tmp_path, [PLAIN], data_cache_dir=str(tmp_path / "file" / "sub"))


def test_nothing_is_left_behind_when_a_file_is_broken(tmp_path):
    good, bad = write_jsonl(tmp_path / "a.jsonl", [PLAIN]), tmp_path / "b.json"
    bad.write_text("[{")
    with pytest.raises(DataError, match=r"b.json:1: not valid JSON"):
        prepare(tmp_path, [good, bad])
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
    works = [preparation_of(config, tokenizer(), "train", None) for _ in range(count)]
    for index in reversed(range(count)):
        if index == 0 and count > 1:
            with pytest.raises(DataError, match=r"0000000.arrow: this part of the tokenised data is missing"):
                works[0].merge()
        works[index].tokenise_share(index, count, num_workers=1, progress=False)
    assert len(list(works[0].folder.iterdir())) == size // 8 + 1
    table = works[0].merge()
    assert table.table.num_rows == size
    whole = prepare(tmp_path, path, data_errors="drop", data_cache_dir=str(tmp_path / "other"))
    assert dataset_of(config, "train", works[0], table).fingerprint == whole.fingerprint
    assert whole.report.malformed == 1


def test_a_share_decodes_only_its_own_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(preparation, "BLOCK_EXAMPLES", 8)
    path = write_jsonl(tmp_path / "rows.jsonl", [{**PLAIN, "chosen": f"answer {number}"} for number in range(64)])
    decoded = []
    original = JsonLine.decode
    monkeypatch.setattr(JsonLine, "decode", lambda self: decoded.append(self) or original(self))
    work = preparation_of(config_for(tmp_path, path), tokenizer(), "train", None)
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
    works = [preparation_of(config, tokenizer(), "train", None) for _ in range(2)]
    for index, work in enumerate(works):
        work.tokenise_share(index, 2, num_workers=1, progress=False)
    dataset = dataset_of(config, "train", works[0], works[0].merge())
    assert len(dataset) == 9
    assert texts(dataset, 8)[1:] == ("good<|im_end|>", "bad<|im_end|>")


def _wait_for(observe, at_least, seconds=60.0):
    end = time.monotonic() + seconds
    while len(seen := observe()) < at_least:
        assert time.monotonic() < end, seen
        time.sleep(0.1)
    return seen


@pytest.mark.skipif(not REAL.is_dir(), reason="the real preference data is not beside the repository")
@pytest.mark.parametrize("family", ["qwen2", "llama", "mistral"])
@pytest.mark.parametrize("language", ["en", "zh"])
def test_real_multi_turn_data(tmp_path, language, family):
    rows = json.loads((REAL / f"preference_{language}.json").read_text(encoding="utf-8"))[::8]
    dataset = prepare(tmp_path, rows, family=family, seq_length=512, truncation="keep_end")
    assert len(dataset) == len(rows) == 38
    tok = tokenizer(family)
    for index in range(len(dataset)):
        pair = dataset[index]
        assert pair.length <= 512
        assert tok.decode(pair.prompt_ids).endswith(("assistant\n", "<|end_header_id|>\n\n", " [/INST]"))
        assert pair.chosen_ids != pair.rejected_ids
