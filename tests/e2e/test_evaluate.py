"""``evaluate`` against the oracle, on pairs that transformers alone has rendered and tokenised."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from mindspeed_simpo.objectives import OBJECTIVES as DECLARED
from tests import oracle
from tests.e2e.cli import lines_of
from tests.e2e.encode import encode_file, encode_rows
from tests.hf import make_checkpoint
from tests.objectives import OBJECTIVES

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
EXACT = 1e-5
FORMS = OBJECTIVES | {
    "hinge, other beta": {"simpo_loss_type": "hinge", "simpo_beta": 1.5},
    "smoothing": {"simpo_label_smoothing": 0.3, "gamma_beta_ratio": 0.0},
    "dpo hinge": {"stage": "dpo", "dpo_loss_type": "hinge"},
    "dpo ipo": {"stage": "dpo", "dpo_loss_type": "ipo", "dpo_beta": 0.5},
    "dpo smoothing": {"stage": "dpo", "dpo_label_smoothing": 0.2, "pref_ftx": 0.1},
}
WITH_REFERENCE = [stage for stage, objective in DECLARED.items() if objective.needs_reference]
WITHOUT_REFERENCE = [stage for stage in DECLARED if stage not in WITH_REFERENCE]
SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture(scope="session")
def reference(folder):
    return make_checkpoint(
        folder / "reference", "qwen2", tied=True, vocab_size=515, hidden=32, std=0.2, seed=5, dtype="bfloat16"
    )


@pytest.fixture
def program(program, eval_pairs):
    program.config["eval_data_path"] = str(eval_pairs)
    return program


def assert_equal(metrics, expected):
    assert metrics.keys() == expected.keys()
    assert metrics == pytest.approx(expected, rel=EXACT, abs=EXACT)


def test_the_last_line_of_stdout_is_the_metrics(program, model, eval_pairs):
    del program.config["data_path"]  # training data are not needed
    done = program.type("evaluate")
    assert len(done.stdout.splitlines()) == 1
    assert_equal(done.metrics, oracle.evaluate(model, encode_file(model, eval_pairs), oracle.Options()))


def test_training_needs_more_than_evaluation_data(program):
    del program.config["data_path"]
    for command in ("train", "check"):
        done = program.run(command)
        assert done.code == 2
        assert "`data_path` is required: Training pairs" in done.stderr


@pytest.mark.parametrize("objective", FORMS)
def test_objectives(program, model, reference, eval_pairs, objective):
    options = oracle.Options(**FORMS[objective])
    ref_model = reference if options.stage in WITH_REFERENCE else None
    if ref_model is not None:
        program.config["ref_model"] = str(ref_model)
    program.config |= {key: value for key, value in asdict(options).items() if "adam" not in key}
    expected = oracle.evaluate(model, encode_file(model, eval_pairs), options, ref_model)
    assert_equal(program.run("evaluate").metrics, expected)


def test_dpo_begins_where_its_own_reference_stands(program, model, eval_pairs):
    expected = oracle.evaluate(model, encode_file(model, eval_pairs), oracle.Options(stage="dpo"))
    metrics = program.run("evaluate", 2, stage="dpo", **{TP: 2}).metrics
    assert metrics["rewards/margins"] == 0
    # without a margin, right and wrong is a matter of rounding
    assert_equal(metrics | {"rewards/accuracies": 0.0}, expected | {"rewards/accuracies": 0.0})


@pytest.mark.parametrize("stage", WITHOUT_REFERENCE)
def test_a_reference_model_that_nothing_reads_is_refused(program, reference, stage):
    done = program.run("evaluate", stage=stage, ref_model=reference)
    done.fails(2, "ref_model", DECLARED[stage].title, "remove ref_model, or set stage to one of", *WITH_REFERENCE)


@pytest.mark.parametrize(
    ("family", "ranks", "layout"),
    [("qwen2", 1, {}), ("qwen3", 2, {PP: 2}), ("llama", 4, {TP: 2}), ("mistral", 2, {TP: 2})],
)
def test_families_and_layouts(program, tmp_path, eval_pairs, family, ranks, layout):
    scaling = "llama3" if family == "llama" else None
    model = make_checkpoint(tmp_path / "model", family, hidden=32, std=0.2, rope_scaling=scaling)
    expected = oracle.evaluate(model, encode_file(model, eval_pairs), oracle.Options())
    assert_equal(program.run("evaluate", ranks, model_name_or_path=model, **layout).metrics, expected)


def test_the_second_part_of_split_is_evaluated(program, model, train_pairs):
    del program.config["eval_data_path"]
    expected = oracle.evaluate(model, encode_file(model, train_pairs)[18:], oracle.Options())
    assert_equal(program.run("evaluate", split="75,25").metrics, expected)


def test_a_checkpoint_is_evaluated_with_its_running_statistics(program, tmp_path):
    program.config |= {"stage": "alphadpo", "train_iters": 2, "alphadpo_alpha": 0.5}
    done = program.run("train")
    assert done.code == 0, done.stderr
    before, after = lines_of(tmp_path / "out", "eval")
    metrics = program.run("evaluate", load=tmp_path / "out").metrics
    assert metrics == {key: after[key] for key in metrics}
    # the gaps of held-out pairs are not the mean of the training pairs' gaps
    assert before["target_margin"] == pytest.approx(0.3, abs=1e-12)
    assert abs(metrics["target_margin"] - 0.3) > 1e-3


def test_nothing_to_evaluate(program):
    del program.config["eval_data_path"]
    program.run("evaluate").fails(2, "eval_data_path", "split")


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_real_pairs(program, tmp_path, language, family):
    file = SHARED_DATA / f"preference_{language}.json"
    if not file.is_file():
        pytest.skip(f"{file} is not here")
    rows = json.loads(file.read_text(encoding="utf-8"))
    rows = sorted(rows, key=lambda row: len(json.dumps(row)))[:10]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows), encoding="utf-8")
    roles = {"system": "system", "human": "user", "gpt": "assistant"}
    conversations = [
        (
            [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]],
            row["chosen"]["value"],
            row["rejected"]["value"],
        )
        for row in rows
    ]
    model = make_checkpoint(tmp_path / "model", family, hidden=32, std=0.2)
    other = make_checkpoint(tmp_path / "other", family, hidden=32, std=0.2, seed=5)
    pairs = encode_rows(model, conversations)
    program.config |= {"model_name_or_path": str(model), "eval_data_path": str(data), "seq_length": 2048}
    # every objective on one of the four, which take long
    for stage in DECLARED if (family, language) == ("qwen3", "zh") else ("simpo", "dpo"):
        reference = {"ref_model": other} if stage in WITH_REFERENCE else {}
        options = oracle.Options(stage=stage, pref_ftx=0.2)
        expected = oracle.evaluate(model, pairs, options, reference.get("ref_model"))
        assert_equal(program.run("evaluate", stage=stage, pref_ftx=0.2, **reference).metrics, expected)
