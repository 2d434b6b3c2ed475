"""Preparing the pairs of a run: reports, what fails and what is left out, the split, the cache."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from mindspeed_simpo.data.dataset import has_eval_data
from mindspeed_simpo.errors import ConfigError, DataError
from tests.unit.data_helpers import BROKEN, PLAIN, config_for, prepare, texts, tokenizer, write_jsonl

REAL = Path(__file__).parents[3] / "shared" / "data"


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
    monkeypatch.setattr("mindspeed_simpo.data.dataset.tokenise_shares", lambda *_, **__: pytest.fail("tokenised again"))
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
