"""Files, folders and saved datasets: the places of examples, and every way in which a file can be broken."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mindspeed_simpo.data.conversations import ExampleReader
from mindspeed_simpo.data.json_array import Text
from mindspeed_simpo.data.paths import open_sources
from mindspeed_simpo.data.problems import ExampleError
from mindspeed_simpo.errors import DataError
from tests.unit.data_helpers import PLAIN, write_jsonl

COLUMNS = ExampleReader(None).column_names
LINE = json.dumps(PLAIN).encode()


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


def read(*paths, part="train"):
    """``(place, row)`` of every row; a row that cannot be read is its message."""
    sources = open_sources([str(path) for path in paths], part, COLUMNS)
    return [
        (source.where(line), row.message if isinstance(row, ExampleError) else row)
        for source in sources
        for line, row in source.examples()
    ]


def write(path, data):
    path.write_bytes(data)
    return path


def test_jsonl_rows_have_their_line_numbers(tmp_path):
    path = write(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + LINE + b"\r\n\n  \r\n" + LINE)
    assert read(path) == [(f"{path}:1", PLAIN), (f"{path}:4", PLAIN)]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"prompt": "q"', "not valid JSON: Expecting ',' delimiter"),
        (b"{'prompt': 'q'}", "not valid JSON"),
        (LINE + LINE, "more text after the object"),
        (b'{"prompt": NaN}', "NaN is no JSON value"),
        (b'{"a": 1, "score": -Infinity}', "-Infinity is no JSON value"),
        (b'{"chosen": "a", "chosen": "b"}', "the key `chosen` appears twice"),
        (b'{"x": {"role": 1, "role": 2}}', "the key `role` appears twice"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at byte 13"),
        (b'{"prompt": "a\x00b"}', "Invalid control character"),
        (b"\x00\x00\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON: nested too deeply"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not valid JSON"),
    ],
)
def test_a_broken_line_is_one_bad_row(tmp_path, line, words):
    path = write(tmp_path / "a.jsonl", LINE + b"\n" + line + b"\n" + LINE + b"\n")
    first, broken, last = read(path)
    assert first == (f"{path}:1", PLAIN)
    assert last == (f"{path}:3", PLAIN)
    assert broken[0] == f"{path}:2"
    assert words in broken[1]


def test_json_array_elements_have_their_line_numbers(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([PLAIN, 5, PLAIN], indent=2), encoding="utf-8")
    assert read(path) == [(f"{path}:2", PLAIN), (f"{path}:7", 5), (f"{path}:8", PLAIN)]


def test_a_json_file_of_lines_is_read_as_lines(tmp_path):
    path = write(tmp_path / "a.json", LINE + b"\n{bad\n" + LINE + b"\n")
    places = read(path)
    assert [place for place, _ in places] == [f"{path}:1", f"{path}:2", f"{path}:3"]
    assert "not valid JSON" in places[1][1]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: the file is empty"),
        ("a.jsonl", b"\xff\xfe{\x00}\x00", "the file is UTF-16; save it as UTF-8"),
        ("a.jsonl", "{}".encode("utf-32"), "the file is UTF-32; save it as UTF-8"),
        ("a.jsonl", gzip.compress(LINE), "the file is compressed by gzip: decompress it"),
        ("a.json", gzip.compress(LINE), "the file is compressed by gzip: decompress it"),
        ("a.parquet", gzip.compress(LINE), "the file is compressed by gzip: decompress it"),
        ("a.jsonl", POINTER, "is a pointer of Git LFS, not the data: fetch the data (git lfs pull)"),
        ("a.parquet", POINTER, "is a pointer of Git LFS, not the data: fetch the data (git lfs pull)"),
        ("a.jsonl", b"PAR1", "the file is a Parquet table: name it .parquet"),
        ("a.jsonl", b"[\n" + LINE + b"\n]", "a.jsonl:1: a JSON array in a .jsonl file: name the file .json"),
        ("a.json", b"", "a.json: the file is empty"),
        ("a.json", b"[]", "a.json: the array of rows is empty"),
        ("a.json", b"[" + LINE + b",\n" + LINE + b"\n", "a.json:3: not valid JSON: the file ends inside the array"),
        ("a.json", b"[" + LINE + b",\n]", "a.json:2: not valid JSON: Expecting value"),
        ("a.json", b"[" + LINE + b"\n" + LINE + b"]", "a.json:2: not valid JSON: expected , or ] between rows"),
        ("a.json", b"[" + LINE + b"]\nx", "a.json:2: not valid JSON: more text after the array"),
        ("a.json", b'[{"a": \n tru}]', "a.json:2: not valid JSON"),
        ("a.json", b'[\n{"a": "\xe4"}]', "a.json:2: not UTF-8: byte 0xe4"),
        ("a.json", b"[" * 100_000, "nested too deeply"),
        ("a.json", b'{\n"train": []\n}', "expected a JSON array of rows, found an object with the keys `train`"),
        ("a.json", b'{\n"data": [' + LINE + b"]\n}", "keys `data`; write the list of `data` alone into the file"),
        ("a.json", b"5", "expected a JSON array of rows, found the number 5"),
        ("a.json", b"hello", "expected a JSON array of rows, found text that is not JSON"),
        ("a.parquet", b"", "a.parquet: the file is empty"),
        ("a.parquet", b"PAR1 not a table PAR1", "a.parquet: not a readable Parquet file"),
        ("a.csv", b"a,b", "a.csv: unknown kind of file; expected .jsonl, .json, .parquet or a folder"),
        ("a", b"{}", "a: unknown kind of file"),
    ],
)
def test_a_broken_file_is_named(tmp_path, name, data, words):
    path = write(tmp_path / name, data)
    with pytest.raises(DataError) as caught:
        read(path)
    assert words in str(caught.value)


@pytest.mark.parametrize("block", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_an_array_is_the_same_in_blocks_of_any_size(tmp_path, monkeypatch, block, indent):
    monkeypatch.setattr("mindspeed_simpo.data.json_array.BLOCK", block)
    monkeypatch.setattr(Text.read_more, "__defaults__", (block,))
    rows = [PLAIN, 12345, -1.5e-7, '巴黎 \\ " é😀', True, None, [], {}, {"a": [{"b": "\n"}]}, [1, [2, "]"]], 7]
    path = tmp_path / "a.json"
    path.write_text("\n " + json.dumps(rows, indent=indent, ensure_ascii=False) + " \n", encoding="utf-8")
    assert [row for _, row in read(path)] == rows
    text = path.read_text(encoding="utf-8")
    lines = [int(place.rpartition(":")[2]) for place, _ in read(path)]
    assert lines == sorted(lines)
    assert lines[-1] == (len(text.splitlines()) - 1 if indent else 2)
    for broken, words in ((text.rstrip()[:-1], "ends inside"), (text.replace("12345", "12e"), "not valid JSON")):
        path.write_text(broken, encoding="utf-8")
        with pytest.raises(DataError, match=words):
            read(path)


def test_an_array_takes_the_memory_of_its_rows_not_of_the_file(tmp_path):
    path = tmp_path / "a.json"
    row = json.dumps({**PLAIN, "chosen": "word " * 400})
    path.write_text("[" + ",\n".join([row] * 20_000) + "]")
    assert path.stat().st_size > 39 << 20
    (source,) = open_sources(str(path), "train", COLUMNS)
    tracemalloc.start()
    try:
        assert sum(1 for _ in source.examples()) == 20_000
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


def test_a_broken_row_does_not_read_the_rest_of_the_file(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" + json.dumps(PLAIN) + ', {"a": nope},' + "1,\n" * 3_000_000 + "]")
    (source,) = open_sources(str(path), "train", COLUMNS)
    examples = source.examples()
    assert next(examples) == (1, PLAIN)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"a.json:1: not valid JSON: Expecting value; the rest"):
            next(examples)
        assert tracemalloc.get_traced_memory()[1] < 2 << 20
    finally:
        tracemalloc.stop()


def test_parquet_rows_have_their_numbers(tmp_path):
    path = tmp_path / "a.parquet"
    messages = [{"role": "user", "content": "q"}]
    rows = [PLAIN, {**PLAIN, "chosen": None}]
    table = pa.Table.from_pylist(rows).append_column("messages", pa.array([messages, messages]))
    pq.write_table(table.append_column("when", pa.array([1, 2], pa.timestamp("ns"))), path)
    (first_place, first), (second_place, second) = read(path)
    assert (first_place, second_place) == (f"{path}:row 1", f"{path}:row 2")
    assert first == {**PLAIN, "messages": messages}
    assert second["chosen"] is None


def test_bad_utf8_in_parquet_is_one_bad_row(tmp_path):
    path = tmp_path / "a.parquet"
    bad = pa.array([b"fine", b"\xff"], pa.binary()).cast(pa.string(), safe=False)
    pq.write_table(pa.table({"prompt": bad, "chosen": ["a", "b"], "rejected": ["c", "d"]}), path)
    (_, first), (place, message) = read(path)
    assert first["prompt"] == "fine"
    assert place.endswith("row 2")
    assert message.startswith("prompt: cannot be read")


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (pa.table({"text": ["x"]}), "no column of a preference row; the table has `text`"),
        (pa.table([["a"], ["b"]], names=["chosen", "chosen"]), "the column `chosen` appears twice"),
        (pa.table({"prompt": pa.array([], pa.string())}), "the table has no rows"),
    ],
)
def test_a_useless_parquet_table_is_named(tmp_path, table, words):
    path = tmp_path / "a.parquet"
    pq.write_table(table, path)
    with pytest.raises(DataError, match=words):
        read(path)


def test_a_damaged_parquet_body_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist([{**PLAIN, "prompt": os.urandom(9).hex()} for _ in range(500)]), path)
    data = bytearray(path.read_bytes())
    data[4:1000] = bytes(996)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a.parquet: the Parquet file is damaged"):
        read(path)


def test_a_folder_is_its_files_by_name(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", [PLAIN])
    write_jsonl(tmp_path / "A.JSONL", [PLAIN, PLAIN])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / ".hidden.jsonl").write_text("x")
    assert [place for place, _ in read(tmp_path)] == [
        f"{tmp_path / 'A.JSONL'}:1",
        f"{tmp_path / 'A.JSONL'}:2",
        f"{tmp_path / 'b.jsonl'}:1",
    ]


def test_a_list_is_read_in_its_order(tmp_path):
    second, first = write_jsonl(tmp_path / "z.jsonl", [PLAIN]), write_jsonl(tmp_path / "a.jsonl", [PLAIN])
    assert [place for place, _ in read(second, first)] == [f"{second}:1", f"{first}:1"]


def test_a_folder_without_data_lists_what_is_there(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no .jsonl, .json, .parquet file.*`notes.txt`, `train/`"):
        read(tmp_path)
    with pytest.raises(DataError, match="it holds nothing"):
        read(tmp_path / "train")


@pytest.mark.parametrize("name", ["prefs.jsonl", "no/such/folder/x", "./owner/name", "prefs", "a\0b/c", "x" * 5000])
def test_a_mistyped_path_says_what_was_looked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no such file or folder \(looked for"):
        read(name)


def test_a_mistyped_folder_below_a_real_one_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    with pytest.raises(DataError, match=r"data/trian: no such file or folder .*; a hub id would be"):
        read("data/trian")


def test_an_unknown_hub_id_says_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"no-owner/no-name: no such file .*, and no dataset of the Hugging Face hub"):
        read("no-owner/no-name")


def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        read(tmp_path / "pipe.jsonl")


def test_saved_datasets(tmp_path):
    data = datasets.Dataset.from_list([PLAIN, {**PLAIN, "chosen": "Rome."}])
    data.select([1, 0]).save_to_disk(tmp_path / "one")
    rows = read(tmp_path / "one")
    assert [place for place, _ in rows] == [f"{tmp_path / 'one'}:row 1", f"{tmp_path / 'one'}:row 2"]
    assert [row["chosen"] for _, row in rows] == ["Rome.", "Paris."]
    datasets.DatasetDict(train=data, test=data.select([1])).save_to_disk(tmp_path / "two")
    assert len(read(tmp_path / "two")) == 2
    assert [place for place, _ in read(tmp_path / "two", part="eval")] == [f"{tmp_path / 'two'}[test]:row 1"]
    assert len(read(tmp_path / "two" / "train", part="eval")) == 2
    datasets.DatasetDict(train_prefs=data, train_sft=data).save_to_disk(tmp_path / "three")
    with pytest.raises(DataError, match=r"splits `train_prefs`, `train_sft`: name the folder of one split"):
        read(tmp_path / "three")


def test_a_damaged_saved_dataset_is_named(tmp_path):
    datasets.Dataset.from_list([PLAIN]).save_to_disk(tmp_path / "one")
    (tmp_path / "one" / "state.json").write_text("{")
    with pytest.raises(DataError, match="one: not a readable dataset folder"):
        read(tmp_path / "one")


def test_the_digest_is_the_content_wherever_it_lies(tmp_path):
    def digest(path):
        return open_sources(str(path), "train", COLUMNS)[0].digest

    (tmp_path / "moved").mkdir()
    for name in ("a.jsonl", "moved/b.jsonl"):
        write_jsonl(tmp_path / name, [PLAIN])
    assert digest(tmp_path / "a.jsonl") == digest(tmp_path / "moved/b.jsonl")
    other = write_jsonl(tmp_path / "c.jsonl", [{**PLAIN, "chosen": "Paris!"}])
    assert digest(other) != digest(tmp_path / "a.jsonl")
    data = datasets.Dataset.from_list([PLAIN] * 3)
    data.save_to_disk(tmp_path / "one")
    data.save_to_disk(tmp_path / "moved/two")
    assert digest(tmp_path / "one") == digest(tmp_path / "moved/two")
    pq.write_table(data.data.table, tmp_path / "d.parquet")
    pq.write_table(data.data.table.slice(1), tmp_path / "e.parquet")
    assert digest(tmp_path / "d.parquet") != digest(tmp_path / "e.parquet")
