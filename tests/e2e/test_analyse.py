"""``analyse`` as a user types it: a SimPO run against a DPO run of the same data, on two ranks, and what is refused."""

import json

import pytest

from tests.browser import open_browser, open_page
from tests.e2e.cli import Program, lines_of
from tests.e2e.encode import encode_file
from tests.hf import make_pairs

pytest.importorskip("plotly", reason="plotly is not installed")
TP = "tensor_model_parallel_size"
DRAWN = "document.querySelectorAll('.figure[data-drawn]').length == document.querySelectorAll('.figure').length"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held_out")
    return [make_pairs(folder / f"{name}.jsonl", 8, seed=seed) for seed, name in enumerate(("maths", "poems"), 3)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model, train_pairs, files):
    """The program, after a run of SimPO and one of DPO."""
    folder = tmp_path_factory.mktemp("runs")
    program = Program(
        folder / "program",
        model_name_or_path=str(model),
        data_path=str(train_pairs),
        eval_data_path=[{"path": str(file), "name": file.stem} for file in files],
        output_dir=str(folder / "simpo"),
        seq_length=1024,
        micro_batch_size=2,
        global_batch_size=8,
        train_iters=3,
        lr=1e-3,
        seed=7,
    )
    program.output = folder / "simpo"
    program.other = folder / "dpo"
    for options in ({}, {"stage": "dpo", "output_dir": program.other, "dpo_beta": 0.3, "seed": 5}):
        done = program.run("train", **options)
        assert done.code == 0, done.stderr
    return program


def numbers_of(done, folder):
    assert done.code == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "index.html")
    return json.loads((folder / "analysis.json").read_text(encoding="utf-8"))


def test_simpo_against_dpo(runs, model, files):
    done = runs.run("analyse", 2, load=runs.output, against=runs.other, shown_pairs=3, **{TP: 2})
    folder = runs.output / "analysis"
    numbers = numbers_of(done, folder)
    assert numbers["pairs"] == 16
    assert numbers["sources"] == ["maths", "poems"]
    # each by its own objective: the last evaluation of each run
    for name, output in (("run", runs.output), ("against", runs.other)):
        before, after = lines_of(output, "eval")
        model_numbers = numbers[name]
        assert model_numbers["step"] == 3
        expected = {key: after[key] for key in model_numbers["means"]}
        assert model_numbers["means"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert model_numbers["accuracy"]["all"]["accuracy"] == after["rewards/accuracies"]
        assert sum(group["pairs"] for group in model_numbers["accuracy"]["by_source"]) == 16
        moved = model_numbers["displacement"]["eval"]
        assert moved["step"] == [0, 3]
        assert moved["chosen_change"] == [0, after["logps/chosen"] - before["logps/chosen"]]
    assert (numbers["run"]["stage"], numbers["against"]["stage"]) == ("simpo", "dpo")
    assert numbers["against"]["keys"]["dpo_beta"] == 0.3
    # the reward of SimPO is its likelihood
    assert numbers["run"]["contingency"]["disagreement"] == 0

    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    pairs = [pair for file in files for pair in encode_file(model, file)]
    assert [row["run"]["chosen_tokens"] for row in rows] == [len(chosen) for _, chosen, _ in pairs]
    assert [row["source"] for row in rows] == ["maths"] * 8 + ["poems"] * 8
    assert rows[9]["place"] == f"{files[1]}:2"
    margins = [row["run"]["chosen_reward"] - row["run"]["rejected_reward"] for row in rows]
    assert numbers["hardest"] == sorted(range(16), key=margins.__getitem__)[:3]
    assert numbers["most_confident"] == sorted(range(16), key=margins.__getitem__, reverse=True)[:3]

    with open_browser() as browser, open_page(browser, (folder / "index.html").as_uri(), width=375) as page:
        page.wait_for_function(DRAWN)
        assert page.locator(".figure").count() == 13
        assert page.evaluate("document.documentElement.scrollWidth") <= 375
        shown = page.locator("details.pair").first
        shown.locator("summary").click()
        # chosen and rejected by the run, then by the other model
        answers = shown.locator(".tokens").all()
        assert len(answers) == 4
        row = rows[numbers["hardest"][0]]
        models = [row["run"]] * 2 + [row["against"]] * 2
        for answer, scores, side in zip(answers, models, ["chosen", "rejected"] * 2, strict=True):
            assert answer.is_visible()
            titles = [token.get_attribute("title") for token in answer.locator("i").all()]
            values = [float(value) for title in titles for value in title.split()]
            assert len(values) == scores[f"{side}_tokens"]
            assert sum(values) == pytest.approx(scores[f"{side}_logprob"], abs=0.0051 * len(values))
        # the text of all shown pairs, closed ones too, is that of the data
        given = [json.loads(line) for file in files for line in file.read_text(encoding="utf-8").splitlines()]
        texts = page.eval_on_selector_all(".tokens", "all => all.map(each => each.textContent)")
        wanted = [given[index] for name in ("hardest", "most_confident") for index in numbers[name]]
        sides = [pair[side][0]["content"] for pair in wanted for side in ("chosen", "rejected") * 2]
        assert texts == [f"{text}<|im_end|>" for text in sides]


def test_starting_weights_and_other_forms(runs, model, tmp_path):
    # a checkpoint of DPO against the weights that it started from, which are its reference
    load = runs.other / "checkpoints" / "iter_0000003"
    options = {"stage": "dpo", "load": load, "output": tmp_path / "one", "max_pairs": 4, "shown_pairs": 0}
    numbers = numbers_of(runs.run("analyse", against="base", **options), tmp_path / "one")
    assert numbers["pairs"] == 4
    assert [json.loads(line)["index"] for line in (tmp_path / "one" / "pairs.jsonl").read_text().splitlines()] == [
        0,
        4,
        8,
        12,
    ]
    assert numbers["hardest"] == []
    assert numbers["run"]["means"]["rewards/margins"] != 0
    assert numbers["against"]["means"]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert numbers["against"]["label"] == "DPO (starting weights)"
    assert numbers["against"]["displacement"] == {}
    # the same weights as a folder have the same reference
    options["output"] = tmp_path / "two"
    other = numbers_of(runs.run("analyse", against=model, **options), tmp_path / "two")
    assert other["against"]["means"] == pytest.approx(numbers["against"]["means"], rel=1e-6, abs=1e-6)
    # the weights alone, on the pairs of training
    alone = numbers_of(runs.run("analyse", part="train", output=tmp_path / "three"), tmp_path / "three")
    assert (alone["pairs"], alone["run"]["step"], "against" in alone) == (24, None, False)


def test_what_is_refused(runs, tmp_path):
    runs.run("analyse", part="test").fails(2, "--part", "train or eval", "test")
    runs.run("analyse", max_pairs=0).fails(2, "--max-pairs", "at least 1")
    (tmp_path / "empty").mkdir()
    for against in (tmp_path / "empty", "/no/such/folder"):
        done = runs.run("analyse", load=runs.output, against=against)
        done.fails(2, "--against", "expected the output folder or a checkpoint", against)
    (tmp_path / "file").touch()
    runs.run("analyse", load=runs.output, output=tmp_path / "file").fails(2, "cannot write", "--output")
