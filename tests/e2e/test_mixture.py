"""A mixture as a user trains and evaluates it: the pairs of each step, every source apart, held-out prompts."""

import json

import pytest

from mindspeed_simpo.data.mixture import Mixture
from tests import oracle
from tests.e2e.cli import lines_of, wait_until
from tests.e2e.encode import encode_file
from tests.hf import make_pairs


@pytest.fixture
def program(program, tmp_path, train_pairs, eval_pairs):
    few = make_pairs(tmp_path / "few.jsonl", 8, seed=11)
    program.config |= {
        "data_path": [{"path": str(train_pairs), "weight": 1}, {"path": str(few), "weight": 1, "name": "rare"}],
        "eval_data_path": [str(eval_pairs), {"path": str(few), "name": "rare", "pairs": 5}],
        "lr_decay_style": "constant",
        "lr_warmup_fraction": 0.0,
        "train_iters": 6,
        "save_interval": 2,
    }
    return program


def test_a_killed_run_goes_on_with_the_pairs_of_the_mixture(program, tmp_path, model, train_pairs):
    mixture = Mixture((24, 8), (16, 16))
    pairs = encode_file(model, train_pairs) + encode_file(model, tmp_path / "few.jsonl")
    order = [pair for epoch in range(2) for pair in mixture.epoch_order(program.config["seed"], epoch).tolist()]
    batches = [[pairs[pair] for pair in order[start : start + 8]] for start in range(0, 48, 8)]
    history, _ = oracle.train(model, batches, [program.config["lr"]] * 6, oracle.Options())
    expected = [number for step in history for number in step]

    run = program.start("train", 2)
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and '"step": 3, "split": "train"' in metrics.read_text(), run)
    run.kill()
    done = program.run("train", 2, load="auto")
    assert done.code == 0, done.stderr
    assert "resumed from" in done.stderr
    lines = lines_of(tmp_path / "out")
    assert [line["step"] for line in lines] == [*range(1, 7)]
    found = [number for line in lines for number in (line["loss"], line["grad_norm"])]
    assert found == pytest.approx(expected, rel=1e-5)
    for line in lines_of(tmp_path / "out", "eval"):
        assert {name.split("/")[1] for name in line if name.startswith("source/")} == {"eval", "rare"}
        parts = [line[f"source/{name}/loss"] * number for name, number in (("eval", 7), ("rare", 5))]
        assert line["loss"] == pytest.approx(sum(parts) / 12, rel=1e-9)

    program.config["data_path"][1]["weight"] = 3
    done = program.run("train", load="auto", train_iters=8)
    done.fails(1, "another mixture of the same data", "16 of 24, 16 of 8", "(now 8 of 24, 24 of 8)", "weight and pairs")


def test_a_pair_that_is_drawn_again_has_the_reference_sums_of_its_first_draw(program, tmp_path):
    options = {"stage": "dpo", "train_iters": 4, "eval_iters": 0}
    program.config["data_path"][1] = program.config["data_path"][1] | {"pairs": 30}
    del program.config["data_path"][1]["weight"]
    program.config["data_path"][0] = {"path": program.config["data_path"][0]["path"], "pairs": 2}
    done = program.run("train", **options)
    assert done.code == 0, done.stderr
    assert lines_of(tmp_path / "out")[0]["rewards/margins"] == pytest.approx(0, abs=1e-10)
    program.config["data_path"][1]["pairs"] = 14
    done = program.run("train", output_dir=tmp_path / "other", **options | {"train_iters": 1})
    assert done.code == 0, done.stderr
    assert "reference log-probabilities" not in done.stderr  # all of them are known


def test_each_source_is_evaluated_as_it_is_alone(program, tmp_path, eval_pairs):
    few = tmp_path / "few.jsonl"
    program.config["eval_data_path"] = [str(eval_pairs), {"path": str(few), "name": "rare"}]
    both = program.run("evaluate", 2).metrics
    for name, path in (("eval", eval_pairs), ("rare", few)):
        alone = program.run("evaluate", eval_data_path=path).metrics
        assert not any(key.startswith("source/") for key in alone)
        assert {key: both[f"source/{name}/{key}"] for key in alone} == pytest.approx(alone, rel=1e-5, abs=1e-5)

    # all held-out pairs of `few` are training pairs, and some of the others have a training prompt
    rows = [line for line in eval_pairs.read_text().splitlines() if prompt_of(line) not in prompts_of(few)]
    left = tmp_path / "left.jsonl"
    left.write_text("\n".join(rows))
    assert 0 < len(rows) < 7
    program.config["data_path"] = str(few)
    done = program.run("evaluate", 2, eval_decontaminate=True)
    assert f"eval_decontaminate: {15 - len(rows)} of 15 held-out pairs are left out" in done.stderr
    metrics = {key: value for key, value in done.metrics.items() if not key.startswith("source/")}
    assert metrics == pytest.approx(program.run("evaluate", eval_data_path=left).metrics, rel=1e-5, abs=1e-5)


def prompt_of(line):
    return json.dumps(json.loads(line)["prompt"])


def prompts_of(path):
    return {prompt_of(line) for line in path.read_text().splitlines()}


def test_check_shows_the_mixture(program):
    done = program.run("check")
    assert done.code == 0, done.stdout + done.stderr
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in done.stdout.splitlines() if "│" in line]
    assert ["train", "24", "16", "0.667", "50.0"] in [row[:5] for row in cells]
    assert ["rare", "8", "16", "2", "50.0"] in [row[:5] for row in cells]
    assert ["rare", "8", "5"] in [row[:3] for row in cells]
    [in_training] = [row[2] for row in cells if row[0] == "prompt in training"]
    assert f"the prompts of {in_training} of 15 held-out pairs are training prompts too" in done.stdout
    assert "eval_decontaminate: true leaves these pairs out" in done.stdout
