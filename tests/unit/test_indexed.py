"""MindSpeed-LLM's tokenised pairs, against megatron-core's own reader and writer of the format."""

import warnings

import pytest
import torch

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.dataset import prepare_pairs
from mindspeed_simpo.data.indexed import KEYS, IndexedPairs, is_prefix, write_indexed_pairs
from mindspeed_simpo.errors import DataError
from tests.tokenizers import make_tokenizer

with warnings.catch_warnings():
    # torch's own submodules call what torch deprecates, when megatron-core imports them
    warnings.simplefilter("ignore")
    from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

PAIRS = [
    TokenizedPair([1, 0, 70000], [5, 0, 2], [6, 2], "a"),
    TokenizedPair([3], [2], [7, 8, 9, 2], "b"),
    TokenizedPair([], [4, 2], [2], "c"),
]


def sequences(pair):
    prompt, chosen, rejected = pair.prompt_ids, pair.chosen_ids, pair.rejected_ids
    masked = [-100] * len(prompt)
    return dict(zip(KEYS, (prompt + chosen, masked + chosen, prompt + rejected, masked + rejected), strict=True))


def file(prefix, key, suffix):
    return prefix.with_name(f"{prefix.name}_packed_{key}_document{suffix}")


@pytest.mark.parametrize("count", [0, 1, 3])
def test_written_files_are_those_of_megatrons_builder(tmp_path, count):
    ours, theirs = tmp_path / "ours" / "pairs", tmp_path / "theirs"
    assert write_indexed_pairs(ours, iter(PAIRS[:count])) == count
    theirs.mkdir()
    for key in KEYS:
        builder = IndexedDatasetBuilder(str(theirs / f"{key}.bin"))
        for pair in PAIRS[:count]:
            builder.add_item(torch.IntTensor(sequences(pair)[key]))
            builder.end_document()
        builder.finalize(str(theirs / f"{key}.idx"))
        for suffix in (".bin", ".idx"):
            assert file(ours, key, suffix).read_bytes() == (theirs / f"{key}{suffix}").read_bytes(), (key, suffix)
    assert sorted(path.name for path in ours.parent.iterdir()) == sorted(
        file(ours, key, suffix).name for key in KEYS for suffix in (".bin", ".idx")
    )


def test_megatron_reads_what_is_written(tmp_path):
    write_indexed_pairs(tmp_path / "p", PAIRS)
    for key in KEYS:
        dataset = IndexedDataset(str(file(tmp_path / "p", key, "")))
        assert [dataset.get(i).tolist() for i in range(len(dataset))] == [sequences(pair)[key] for pair in PAIRS]


def test_read_back(tmp_path):
    assert not is_prefix(tmp_path / "p")
    write_indexed_pairs(tmp_path / "p", PAIRS)
    assert is_prefix(tmp_path / "p")
    read = IndexedPairs(tmp_path / "p")
    found = [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in read]
    assert found == [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in PAIRS]
    assert read[1].source == f"{tmp_path}/p:pair 2"
    with pytest.raises(IndexError, match="pair 3 of 3"):
        read[3]
    with pytest.raises(IndexError):
        read[-1]


def damage_short_bin(prefix):
    path = file(prefix, KEYS[2], ".bin")
    path.write_bytes(path.read_bytes()[:-4])


def damage_short_idx(prefix):
    path = file(prefix, KEYS[1], ".idx")
    path.write_bytes(path.read_bytes()[:-1])


def damage_magic(prefix):
    file(prefix, KEYS[0], ".idx").write_bytes(b"PK" + bytes(60))


def damage_dtype(prefix):
    path = file(prefix, KEYS[0], ".idx")
    content = bytearray(path.read_bytes())
    content[17] = 8
    path.write_bytes(content)


def damage_offsets(prefix):
    path = file(prefix, KEYS[3], ".idx")
    content = bytearray(path.read_bytes())
    content[34 + 4 * 3 + 8] = 200
    path.write_bytes(content)


def damage_absent(prefix):
    file(prefix, KEYS[3], ".bin").unlink()


def damage_count(prefix):
    other = prefix.with_name("other")
    write_indexed_pairs(other, PAIRS[:2])
    for suffix in (".bin", ".idx"):
        file(other, KEYS[1], suffix).rename(file(prefix, KEYS[1], suffix))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_short_bin, "rejected_input_ids_document.bin: expected .* bytes, found"),
        (damage_short_idx, "chosen_labels_document.idx: expected .* bytes"),
        (damage_magic, "not an index"),
        (damage_dtype, "found version 1, code 8"),
        (damage_offsets, "rejected_labels_document.idx: offsets point outside"),
        (damage_absent, "rejected_labels_document.bin: cannot read"),
        (damage_count, "do not hold the same number"),
    ],
)
def test_damaged_files_are_named(tmp_path, damage, message):
    write_indexed_pairs(tmp_path / "p", PAIRS)
    damage(tmp_path / "p")
    with pytest.raises(DataError, match=message):
        IndexedPairs(tmp_path / "p")


@pytest.mark.parametrize(
    ("key", "ids", "message"),
    [
        ("chosen_labels", [-100] * 6, "pair 1: chosen has no response token"),
        ("chosen_labels", [-100, -100, -100, 5, 1, 2], "pair 1: chosen: expected labels that repeat the ids"),
        ("rejected_input_ids", [1, 9, 70000, 6, 2], "pair 1: chosen and rejected do not have the same prompt"),
    ],
)
def test_pairs_that_cannot_be_used(tmp_path, key, ids, message):
    write_indexed_pairs(tmp_path / "p", PAIRS[:1])
    builder = IndexedDatasetBuilder(str(file(tmp_path / "p", key, ".bin")))
    builder.add_item(torch.IntTensor(ids))
    builder.end_document()
    builder.finalize(str(file(tmp_path / "p", key, ".idx")))
    with pytest.raises(DataError, match=message):
        IndexedPairs(tmp_path / "p")[0]


def test_files_of_an_earlier_run_stay_where_pairs_fail(tmp_path):
    write_indexed_pairs(tmp_path / "p", PAIRS)

    def failing():
        yield PAIRS[0]
        raise DataError("row 2")

    with pytest.raises(DataError, match="row 2"):
        write_indexed_pairs(tmp_path / "p", failing())
    assert len(IndexedPairs(tmp_path / "p")) == 3


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot write the tokenised pairs"):
        write_indexed_pairs(tmp_path / "file" / "p", PAIRS)


# -- as the data of a run -------------------------------------------------------------------------------------------


@pytest.fixture
def run_config(tmp_path):
    def make(**options):
        values = {
            "model_name_or_path": "m",
            "data_path": str(tmp_path / "p"),
            "data_cache_dir": str(tmp_path / "cache"),
        }
        return Config(**values | {"seq_length": 16} | options)

    return make


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer("llama")


def test_the_engine_trains_on_them(tmp_path, run_config, tokenizer):
    pairs = [TokenizedPair([1, 0, 300], [5, 0, 2], [6, 2], "a"), TokenizedPair([3], [2], [7, 8, 9, 2], "b")]
    write_indexed_pairs(tmp_path / "p", pairs)
    data = prepare_pairs(run_config(), tokenizer, "train", progress=False)
    assert [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in data] == [
        (p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in pairs
    ]
    assert data[1].source == f"{tmp_path}/p:pair 2"


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (TokenizedPair([1], [2, 3], [2, 3], ""), "pair 2: identical: chosen and rejected are the same tokens"),
        (TokenizedPair([1], [512], [2], ""), "pair 2: malformed: id 512 is not one of the tokenizer's 512"),
        (TokenizedPair(list(range(1, 15)), [1, 2, 3], [4], ""), "pair 2: too long: 17 tokens"),
    ],
)
def test_pairs_that_a_run_cannot_use(tmp_path, run_config, tokenizer, pair, message):
    write_indexed_pairs(tmp_path / "p", [TokenizedPair([3], [2], [7, 2], ""), pair])
    with pytest.raises(DataError, match=message):
        prepare_pairs(run_config(), tokenizer, "train", progress=False)


def test_a_long_prompt_keeps_its_bos_and_its_end(tmp_path, run_config, tokenizer):
    bos = tokenizer.bos_token_id
    write_indexed_pairs(tmp_path / "p", [TokenizedPair([bos, *range(100, 120)], [1, 2], [3], "")])
    data = prepare_pairs(run_config(truncation="keep_end"), tokenizer, "train", progress=False)
    assert data[0].prompt_ids == [bos, *range(107, 120)]
    assert data[0].chosen_ids == [1, 2]


def test_a_damaged_pair_can_be_left_out(tmp_path, run_config, tokenizer):
    write_indexed_pairs(tmp_path / "p", [TokenizedPair([3], [2], [7, 2], ""), TokenizedPair([4], [2], [8, 2], "")])
    path = file(tmp_path / "p", "chosen_labels", ".bin")
    path.write_bytes(torch.tensor([-100, -100, -100, 2], dtype=torch.int32).numpy().tobytes())
    data = prepare_pairs(run_config(data_errors="drop"), tokenizer, "train", progress=False)
    assert [p.prompt_ids for p in data] == [[4]]
    with pytest.raises(DataError, match="pair 1: malformed: chosen has no response token"):
        prepare_pairs(run_config(), tokenizer, "train", progress=False)
