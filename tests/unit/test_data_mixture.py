"""Mixtures: exact counts in one seeded order, the entries of data_path, and held-out prompts that are in training."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import datasets
import numpy as np
import pyarrow as pa
import pytest

from mindspeed_simpo.config.file import validate
from mindspeed_simpo.config.options import DataSource
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.cache import SCHEMA
from mindspeed_simpo.data.dataset import has_eval_data, preparations_of, prepare_pairs, shared_prompts
from mindspeed_simpo.data.loader import PairLoader, PairStream
from mindspeed_simpo.data.mixture import Mixture
from mindspeed_simpo.data.preparation import tokenise_shares
from mindspeed_simpo.data.prompt_digests import prompt_digests
from mindspeed_simpo.errors import ConfigError, DataError
from tests.unit.data_helpers import PLAIN, config_for, tokenizer, write_jsonl
from tests.unit.test_data_loader import Numbers, global_batch

MIXTURE = Mixture((5, 20, 7), (12, 6, 7))


def sources(*numbers):
    return [DataSource(path=f"{index}", name=f"s{index}", **each) for index, each in enumerate(numbers)]


@pytest.mark.parametrize(
    ("numbers", "found", "used"),
    [
        ([{}, {}], (3, 4), (3, 4)),
        ([{"pairs": 9}, {}], (3, 4), (9, 4)),
        ([{"weight": 1}, {"weight": 1}], (24, 8), (16, 16)),
        ([{"weight": 24}, {"weight": 8}], (24, 8), (24, 8)),
        ([{"weight": 1}, {"weight": 1}, {"weight": 1}], (4, 4, 2), (4, 3, 3)),  # equal remainders: the first
        ([{"weight": 0.1}, {"weight": 0.2}, {"weight": 0.7}], (1, 1, 8), (1, 2, 7)),
        ([{"weight": 2}, {"pairs": 50}, {"weight": 1}], (6, 10, 6), (8, 50, 4)),
        ([{"weight": 0.3}], (7,), (7,)),
    ],
)
def test_the_counts_of_an_epoch(numbers, found, used):
    assert Mixture.of(sources(*numbers), found).used == used


def test_largest_remainders_are_within_one_of_the_exact_share():
    draw = np.random.RandomState(0)
    for _ in range(50):
        weights, found = draw.randint(1, 50, 6).tolist(), draw.randint(60, 999, 6).tolist()
        used = Mixture.of(sources(*({"weight": weight} for weight in weights)), found).used
        assert sum(used) == sum(found)
        for number, weight in zip(used, weights, strict=True):
            assert abs(number - Fraction(sum(found) * weight, sum(weights))) < 1


@pytest.mark.parametrize(
    ("numbers", "found", "words"),
    [
        ([{}, {"pairs": 3}], (3, 0), r"data_path\[1\]: no pair of s1 \(1\) is left"),
        ([{"weight": 1}, {"weight": 1e-6}], (9, 9), r"data_path\[1\].weight: 1e-06 gives s1 no pair of an epoch of 18"),
    ],
)
def test_a_source_that_cannot_give_what_is_asked(numbers, found, words):
    with pytest.raises(DataError, match=words):
        Mixture.of(sources(*numbers), found)


def sources_in(order, mixture=MIXTURE):
    return tuple(np.bincount(np.searchsorted(mixture.starts[1:], order, side="right"), minlength=3).tolist())


@pytest.mark.parametrize("seed", [None, 1, 7])
def test_every_epoch_has_the_exact_counts_and_no_pair_is_two_draws_ahead(seed):
    drawn = Counter(dict.fromkeys(range(32), 0))
    orders = []
    for epoch in range(6):
        order = MIXTURE.epoch_order(seed, epoch)
        assert sources_in(order) == MIXTURE.used
        orders.append(order.tolist())
        for pair in orders[-1]:
            drawn[pair] += 1
            start, end = next(bounds for bounds in ((0, 5), (5, 25), (25, 32)) if pair < bounds[1])
            counts = [drawn[other] for other in range(start, end)]
            assert max(counts) - min(counts) <= 1
    assert orders == [MIXTURE.epoch_order(seed, epoch).tolist() for epoch in range(6)]
    assert (len({*map(tuple, orders)}) > 1) or seed is None


def test_the_sources_lie_mixed_in_an_epoch():
    order = Mixture((400, 400), (300, 900)).epoch_order(3, 0)
    quarters = [np.count_nonzero(part < 400) for part in np.split(order, 4)]
    assert min(quarters) > 50


def test_all_pairs_once_are_a_shuffle_as_of_one_source():
    assert Mixture.of_all(3, 4).epoch_order(5, 2).tolist() == Mixture.of_all(7).epoch_order(5, 2).tolist()


def test_a_stream_goes_on_at_every_place():
    stream = PairStream(MIXTURE, 3)
    places = [pair for epoch in range(8) for pair in MIXTURE.epoch_order(3, epoch).tolist()]
    for first in range(0, 90, 7):
        assert PairStream(MIXTURE, 3).take(first, 5) == places[first : first + stream.left(first, 5)]
        for last in range(first, 200, 11):
            assert stream.between(first, last).tolist() == sorted(set(places[first:last]))


@pytest.mark.parametrize("ranks", [2, 4])
def test_global_batches_of_a_mixture_do_not_depend_on_the_ranks(ranks):
    batching = Batching("padded", 1, max_tokens=0)
    shared = {"seed": 7, "global_batch_size": 8, "batching": batching, "mixture": MIXTURE}
    whole = PairLoader(Numbers(32), data_parallel_rank=0, data_parallel_size=1, **shared)
    parts = [
        PairLoader(Numbers(32), data_parallel_rank=rank, data_parallel_size=ranks, **shared) for rank in range(ranks)
    ]
    assert whole.steps_per_epoch == 4
    epoch = []
    for step in range(4):
        consumed = whole.consumed_pairs(step)
        batch = global_batch([part.train_step(consumed) for part in parts])
        assert batch == global_batch([whole.train_step(consumed)])
        epoch += [pair for pair in batch if pair >= 0]
    assert sources_in(epoch) == MIXTURE.used


def test_limited_evaluations_see_every_source():
    batching = Batching("padded", 1, max_tokens=0)
    held_out = Mixture((5, 20, 7), (5, 6, 7))
    shared = {"seed": 7, "global_batch_size": 3, "batching": batching, "data_parallel_rank": 0, "data_parallel_size": 1}
    loader = PairLoader(Numbers(32), mixture=held_out, **shared)
    assert sources_in(loader.eval_pairs()) == (5, 6, 7)
    assert sources_in(loader.eval_pairs(2)) == (2, 2, 2)
    assert PairLoader(Numbers(32), **shared).eval_pairs(2).tolist() == list(range(6))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["a", {"path": "b", "weigth": 3}], "data_path[1].weigth: unknown key; did you mean `weight`?"),
        (["a", {"path": "b", "colour": 3}], "data_path[1].colour: unknown key; an entry has path, split, weight"),
        ({"path": "b", "weight": -1}, "data_path.weight: input should be greater than 0, found -1"),
        ([{"path": "b", "weight": "x"}], "data_path[0].weight: input should be a valid number"),
        ([{"path": "b", "pairs": 0}], "data_path[0].pairs: input should be greater than or equal to 1, found 0"),
        ([{"path": "b", "pairs": True}], "data_path[0].pairs: expected a value, not true or false"),
        ([{"path": "b", "pairs": 1, "weight": 1}], "data_path[0]: weight and pairs exclude each other"),
        ([{"path": "b", "weight": 1}, "a"], "data_path[1]: neither weight nor pairs, while [0] has a weight"),
        ([{"weight": 1}], "data_path[0].path: required"),
        ([{"path": "b", "split": "95,-5"}], "data_path[0].split: expected two or three weights of at least 0"),
        ([{"path": "b", "split": "95,x"}], "data_path[0].split: expected two or three comma-separated weights"),
        ([{"path": "b", "name": "a/b"}], "data_path[0].name: expected a name without /"),
        ([{"path": "b", "name": "x"}, {"path": "c", "name": "x"}], "data_path[1].name: `x` is the name of 2 sources"),
        (["a", 5], "data_path[1]: expected a path or a mapping with `path`, found 5"),
        (['{"path": "a"'], "data_path[0]: not valid JSON of a mapping"),
    ],
)
def test_a_wrong_entry_is_named_by_its_number(value, expected):
    with pytest.raises(ConfigError) as caught:
        validate({"model_name_or_path": "m", "data_path": value}, "run.yaml")
    assert f"run.yaml: {expected}" in str(caught.value)


def test_numbers_that_evaluation_does_not_know():
    entries = [{"path": "a", "weight": 1}, {"path": "b", "split": "95,5"}, {"path": "c", "split": "test"}]
    with pytest.raises(ConfigError) as caught:
        validate({"model_name_or_path": "m", "data_path": "t", "eval_data_path": entries}, "run.yaml")
    lines = str(caught.value).splitlines()
    assert [line.partition(": ")[2].partition(":")[0] for line in lines] == [
        "eval_data_path[0].weight",
        "eval_data_path[1].split",
    ]
    for key, words in (("eval_data_path", "compares .* set data_path"), ("data_path", "no pairs are held out")):
        with pytest.raises(ConfigError, match=f"eval_decontaminate.* {words}"):
            validate({"model_name_or_path": "m", key: "t", "eval_decontaminate": True}, "run.yaml")


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["pairs.v2.jsonl", "folder/", "owner/name:split"], ["pairs.v2", "folder", "name"]),
        (["x/train.jsonl", "y/train.json", "z.jsonl"], ["x.train", "y.train", "z"]),
        (["a.jsonl", "a.parquet", "a"], ["a", "a-2", "a-3"]),
        ([{"path": "b", "name": "a"}, "a"], ["a", "a-2"]),
        (["/", "my pairs.jsonl"], ["/", "my_pairs"]),
    ],
)
def test_names(paths, names):
    config = validate({"model_name_or_path": "m", "data_path": paths}, "run.yaml")
    assert [source.name for source in config.sources] == [name.replace("/", "_") for name in names]
    assert validate(config.model_dump(), "run.yaml") == config
    assert type(config).model_validate_json(config.model_dump_json()) == config


def rows_of(name, number, **columns):
    return [{**PLAIN, "prompt": f"{name} {index}?", **columns} for index in range(number)]


@pytest.fixture
def files(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", rows_of("a", 6))
    write_jsonl(tmp_path / "b.jsonl", [{"ask": f"b {i}?", "chosen": "x", "rejected": "y"} for i in range(10)])
    return tmp_path


def data_of(folder, entries, part="train", **options):
    paths = [entry if isinstance(entry, str) else entry | {"path": str(folder / entry["path"])} for entry in entries]
    paths = [str(folder / entry) if isinstance(entry, str) else entry for entry in paths]
    config = config_for(folder, "unused", **({"data_path": paths} | options))
    return prepare_pairs(config, tokenizer(), part, progress=False)


B = {"path": "b.jsonl", "map_keys": {"prompt": "ask"}, "name": "questions"}


def test_each_pair_knows_its_source_and_each_source_its_columns(files):
    data = data_of(files, ["a.jsonl", B])
    assert data.sources == ("a", "questions")
    assert [data.source_of(index) for index in (0, 5, 6, 15)] == [0, 0, 1, 1]
    assert [data[index].source for index in (5, 6)] == [f"{files / 'a.jsonl'}:6", f"{files / 'b.jsonl'}:1"]
    with pytest.raises(IndexError):
        data.source_of(16)
    with pytest.raises(ConfigError, match=r"data_path\[1\].map_keys: unknown name `promt`"):
        data_of(files, ["a.jsonl", B | {"map_keys": {"promt": "ask"}}])
    with pytest.raises(DataError, match=r"10 of 16 rows cannot be used:\n.*b.jsonl:1"):
        data_of(files, ["a.jsonl", "b.jsonl"])


def test_numbers_and_names_do_not_tokenise_again(files, monkeypatch):
    first = data_of(files, ["a.jsonl", B])
    monkeypatch.setattr("mindspeed_simpo.data.dataset.tokenise_shares", lambda *_, **__: pytest.fail("tokenised again"))
    second = data_of(files, [{"path": "a.jsonl", "weight": 3, "name": "other"}, B | {"weight": 1}])
    assert data_of(files, [B]).fingerprint != first.fingerprint
    assert data_of(files, [{"path": "a.jsonl", "split": "50,50"}, B], "eval").sources == ("a",)
    assert (first.mixture.used, second.mixture.used) == ((6, 10), (12, 4))
    assert first.fingerprint == second.fingerprint == first.order_fingerprint != second.order_fingerprint


def test_a_file_may_be_two_sources(files):
    data = data_of(files, ["a.jsonl", {"path": "a.jsonl", "name": "again", "split": "50,50"}])
    assert (data.sources, data.mixture.found) == (("a", "again"), (6, 3))
    assert len(list((files / "cache" / "tokenised").iterdir())) == 1


def test_small_sources_fall_to_different_shares(files):
    paths = [str(write_jsonl(files / f"{number}.jsonl", rows_of(f"{number}", 3))) for number in range(4)]
    works = preparations_of(config_for(files, paths), tokenizer(), "train", None)
    for index in range(2):
        tokenise_shares(works, index, 2, num_workers=1, progress=False)
        assert len([work for work in works if work.folder.is_dir()]) == 2 * (index + 1)


def test_splits_of_sources(files):
    entries = [{"path": "a.jsonl", "split": "50,50"}, B]
    train, held_out = (data_of(files, entries, part, split="80,20") for part in ("train", "eval"))
    assert (train.mixture.found, held_out.mixture.found) == ((3, 8), (3, 2))
    assert held_out.sources == ("a", "questions")
    assert [held_out[index].source.rpartition(":")[2] for index in (0, 3)] == ["4", "9"]
    one = data_of(files, [{"path": "a.jsonl", "split": "50,50"}, B], "eval")
    assert (one.sources, len(one)) == (("a",), 3)
    assert not has_eval_data(config_for(files, "x"))
    with pytest.raises(DataError, match=r"a \(.*a.jsonl\): split 99,1 of 6 rows leaves no row for the eval part"):
        data_of(files, [{"path": "a.jsonl", "split": "99,1"}, B], "eval")
    assert data_of(files, ["a.jsonl", B], "eval", split="94,6").sources == ("questions",)  # 0 and 1 rows
    with pytest.raises(DataError, match="split 99,1 leaves no row of any source for the eval part"):
        data_of(files, ["a.jsonl", B], "eval", split="99,1")
    # plain paths are one sequence of rows
    write_jsonl(files / "c.jsonl", rows_of("c", 4))
    whole = [data_of(files, ["a.jsonl", "c.jsonl"], part, split="80,20") for part in ("train", "eval")]
    assert [(data.sources, data.mixture.found) for data in whole] == [(("a", "c"), (6, 2)), (("c",), (2,))]


def test_the_split_of_a_saved_data_set(files):
    splits = {name: datasets.Dataset.from_list(rows_of(name, number)) for name, number in (("x", 2), ("y", 3))}
    datasets.DatasetDict(splits).save_to_disk(files / "saved")
    assert len(data_of(files, [{"path": "saved", "split": "y"}])) == 3
    with pytest.raises(DataError, match=r"saved: split 'z', but the dataset has the splits"):
        data_of(files, [{"path": "saved", "split": "z"}])
    with pytest.raises(DataError, match=r"a.jsonl: split 'train' names a split .* relative sizes .* such as 95,5"):
        data_of(files, [{"path": "a.jsonl", "split": "train"}])


def test_held_out_sources_may_be_limited(files):
    limited = {"data_path": "unused", "eval_data_path": [{"path": str(files / "a.jsonl"), "pairs": 2}]}
    assert data_of(files, [], "eval", **limited).mixture.used == (2,)
    limited["eval_data_path"][0]["pairs"] = 7
    with pytest.raises(DataError, match=r"eval_data_path\[0\].pairs: 7, but a \(.*\) has 6"):
        data_of(files, [], "eval", **limited)


def test_held_out_prompts_of_training_are_left_out(files, caplog):
    rows = [*rows_of("new", 2), *rows_of("a", 2, chosen="Another answer.", rejected="No."), *rows_of("old", 3)]
    write_jsonl(files / "held.jsonl", rows)
    write_jsonl(files / "same.jsonl", rows_of("a", 3))
    training = data_of(files, ["a.jsonl", B])
    names = [str(files / name) for name in ("held.jsonl", "same.jsonl")]
    held_out = data_of(files, ["a.jsonl"], "eval", eval_data_path=names)
    parts = [shared_prompts(held_out, training, index, 3) for index in range(3)]
    shared = np.unique(np.concatenate(parts))
    assert shared.tolist() == shared_prompts(held_out, training).tolist()
    with caplog.at_level("INFO"):
        left = held_out.without_prompts(shared)
    assert "eval_decontaminate: 5 of 10 held-out pairs are left out" in caplog.text
    assert f"first {names[0]}:3" in caplog.text
    assert [left[index].source.rpartition(":")[2] for index in range(len(left))] == ["1", "2", "5", "6", "7"]
    assert (left.report.kept, left.report.contaminated, left.lengths.shape) == (5, 5, (5, 3))
    assert (left.sources, left.mixture.found) == (("held", "same"), (5, 0))
    assert left.fingerprint != held_out.fingerprint
    assert left.without_prompts(shared) is left
    with pytest.raises(DataError, match=r"3 of 3 held-out pairs .* no pair is left to evaluate"):
        data_of(files, ["a.jsonl"], "eval", eval_data_path=names[1]).without_prompts(shared)


def test_prompts_differ_by_their_images():
    def row(prompt, *digests):
        images = [{"path": "", "data": b"", "digest": digest * 32} for digest in digests] or None
        empty = {key: [] for key in ("chosen_ids", "rejected_ids", "chosen_unscored", "rejected_unscored")}
        return {"prompt_ids": prompt, "images": images, **empty}

    rows = [row([1, 2]), row([1, 2], b"a"), row([1, 2], b"b"), row([1, 2], b"a"), row([1]), row([2])]
    table = pa.concat_tables(
        [pa.Table.from_pylist(rows[:4], schema=SCHEMA), pa.Table.from_pylist(rows[3:], schema=SCHEMA).slice(1)]
    )
    digests = prompt_digests(table, np.arange(6)).tolist()
    assert len({*digests}) == 5
    assert digests[1] == digests[3]
    assert prompt_digests(table, np.array([1, 4])).tolist() == [digests[1], digests[4]]
