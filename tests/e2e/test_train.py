"""Training as a user starts it: the same numbers on every layout, and what a run leaves behind."""

import json
import logging

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import load_config
from tests import oracle
from tests.e2e.cli import lines_of
from tests.e2e.encode import encode_file, order_of
from tests.hf import make_pairs

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
KEYS = {
    "step",
    "split",
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "sft_loss",
    "response_tokens/chosen",
    "response_tokens/rejected",
    "consumed_pairs",
    "step_seconds",
}
TRAIN_KEYS = KEYS | {"grad_norm", "learning_rate", "pairs_per_second", "tokens_per_second", "peak_memory_bytes"}
EXACT = 1e-5


def curve(output):
    return [number for line in lines_of(output) for number in (line["loss"], line["grad_norm"])]


@pytest.fixture
def expected(program, model, train_pairs):
    """Loss and gradient norm of each step by the oracle, on pairs that transformers alone has tokenised."""
    pairs = encode_file(model, train_pairs)
    batches = [[pairs[i] for i in batch] for batch in order_of(program, len(pairs))]
    history, _ = oracle.train(model, batches, learning_rates(program), oracle.Options())
    return [number for step in history for number in step]


def learning_rates(program):
    # 3 steps, cosine from the start to zero: no warm-up, since a tenth of 3 steps is none
    return [program.config["lr"] * factor for factor in (1.0, 0.75, 0.25)]


def test_one_process_two_ranks_and_torchrun_train_alike(program, expected, tmp_path, eval_pairs):
    done = program.type("train", eval_data_path=eval_pairs, eval_interval=2)
    assert done.code == 0, done.stderr
    assert done.stdout == ""
    assert "train step 3/3" in done.stderr
    assert curve(tmp_path / "out") == pytest.approx(expected, rel=EXACT)
    assert [line["step"] for line in lines_of(tmp_path / "out", "eval")] == [0, 2, 3]

    done = program.type("train", nproc_per_node=2, output_dir=tmp_path / "tp2", **{TP: 2})
    assert done.code == 0, done.stderr
    assert curve(tmp_path / "tp2") == pytest.approx(expected, rel=EXACT)

    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m")
    done = program.type("train", torchrun, output_dir=tmp_path / "dp2")
    assert done.code == 0, done.stderr
    assert curve(tmp_path / "dp2") == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {PP: 2}),
        (2, {"use_distributed_optimizer": True, "micro_batch_size": 1}),
        (4, {TP: 2, PP: 2, "micro_batch_size": 4}),
        (4, {TP: 2, "micro_batch_size": 4, "recompute_granularity": "selective"}),
        (1, {"micro_batch_size": 8}),
    ],
    ids=str,
)
def test_layouts_and_micro_batches_train_alike(program, expected, tmp_path, ranks, options):
    program.config |= options
    done = program.run("train", ranks)
    assert done.code == 0, done.stderr
    assert curve(tmp_path / "out") == pytest.approx(expected, rel=EXACT)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (2, {"batching": "prefix_shared", "max_tokens_per_micro_batch": 700, PP: 2}),
        (2, {"batching": "packed", "max_tokens_per_micro_batch": 900, "pair_schedule": "two_pass"}),
        (4, {"batching": "prefix_shared", TP: 2, "sequence_parallel": True, "context_parallel_size": 2}),
    ],
    ids=str,
)
def test_packed_micro_batches_train_and_evaluate_alike(program, model, expected, tmp_path, ranks, options):
    # in global batches of 8 pairs, the last is one pair and 7 of weight zero: one rank of two has nothing else
    eval_pairs = make_pairs(tmp_path / "nine.jsonl", 9, seed=1)
    program.config["eval_data_path"] = str(eval_pairs)
    done = program.run("train", ranks, **options)
    assert done.code == 0, done.stderr
    assert curve(tmp_path / "out") == pytest.approx(expected, rel=EXACT)
    held_out = lines_of(tmp_path / "out", "eval")
    assert [line["step"] for line in held_out] == [0, 3]
    first = oracle.evaluate(model, encode_file(model, eval_pairs), oracle.Options())
    assert {key: held_out[0][key] for key in first} == pytest.approx(first, rel=EXACT, abs=EXACT)


def test_parameters_gathered_in_the_next_forward_change_nothing_that_is_read_between_steps(
    program, model, tmp_path, eval_pairs
):
    program.config |= {"stage": "dpo", "eval_data_path": str(eval_pairs), "eval_interval": 1, "eval_generate": 1}
    program.config |= {"eval_generate_max_new_tokens": 3, "save_interval": 2, "export_hf": True}
    program.config |= {"lr": 0.02, "lr_decay_style": "constant"}
    program.config |= {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
    assert program.run("train", 2).code == 0
    program.config |= {"overlap_param_gather": True, "output_dir": str(tmp_path / "gathered")}
    stopped = program.run("train", 2, train_iters=2)
    assert stopped.code == 0, stopped.stderr
    resumed = program.run("train", 2, load="auto", train_iters=3)
    assert resumed.code == 0, resumed.stderr
    for split in ("train", "eval"):
        plain, gathered = (
            {line["step"]: line for line in lines_of(tmp_path / name, split)} for name in ("out", "gathered")
        )
        assert gathered.keys() == plain.keys()
        for step, line in plain.items():
            same = KEYS - {"step_seconds"} & line.keys()
            assert {key: gathered[step][key] for key in same} == {key: line[key] for key in same}, step
    whole = [load_file(tmp_path / name / "hf" / "model.safetensors") for name in ("out", "gathered")]
    started = load_file(model / "model.safetensors")
    assert whole[0].keys() == whole[1].keys()
    for name, values in whole[0].items():
        assert torch.equal(values, whole[1][name]), name
        assert not torch.equal(values, started[name]), name


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, {}), (2, {"batching": "padded"}), (2, {PP: 2, "pair_schedule": "two_pass"})],
    ids=str,
)
def test_every_pair_of_an_epoch_is_trained_on(program, model, tmp_path, ranks, options):
    """9 pairs in global batches of 8: the second batch of each epoch is the mean over one pair."""
    nine = make_pairs(tmp_path / "nine.jsonl", 9, seed=1)
    del program.config["train_iters"]
    program.config |= {"data_path": str(nine), "num_train_epochs": 2, "lr_decay_style": "constant"} | options
    done = program.run("train", ranks)
    assert done.code == 0, done.stderr
    assert [line["consumed_pairs"] for line in lines_of(tmp_path / "out")] == [8, 9, 17, 18]
    pairs = encode_file(model, nine)
    batches = [[pairs[i] for i in batch] for batch in order_of(program, len(pairs), steps=4)]
    assert [len(batch) for batch in batches] == [8, 1, 8, 1]
    history, _ = oracle.train(model, batches, [program.config["lr"]] * 4, oracle.Options())
    assert curve(tmp_path / "out") == pytest.approx([number for step in history for number in step], rel=EXACT)


def test_what_a_run_leaves(program, tmp_path, eval_pairs, caplog):
    caplog.set_level(logging.WARNING, "tensorboard")
    program.config |= {"eval_data_path": str(eval_pairs), "save_interval": 2, "bf16": True}
    done = program.run("train")
    assert done.code == 0, done.stderr
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        *("config.yaml", "metrics.jsonl", "tensorboard", "checkpoints", "run.log", "summary.json", ".lock")
    }
    assert load_config(out / "config.yaml") == Config(**program.config, logprob_chunk_tokens=512)
    assert yaml.safe_load((out / "config.yaml").read_text()).keys() == Config.model_fields.keys()
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"iter_0000002", "iter_0000003"}

    train, held_out = lines_of(out), lines_of(out, "eval")
    assert [line["step"] for line in train] == [1, 2, 3]
    assert [line["step"] for line in held_out] == [0, 3]
    assert all(line.keys() == TRAIN_KEYS for line in train)
    assert all(line.keys() == KEYS for line in held_out)
    assert [line["consumed_pairs"] for line in train] == [8, 16, 24]
    assert [line["learning_rate"] for line in train] == pytest.approx(learning_rates(program))

    log = (out / "run.log").read_text(encoding="utf-8")
    assert "eval step 0/3" in log
    assert "saved" in log
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3]
    assert [event.value for event in events.Scalars("eval/loss")] == pytest.approx([x["loss"] for x in held_out])


def test_intervals_and_limits(program, tmp_path):
    program.config |= {"save_interval": 1, "save_total_limit": 2, "log_interval": 2, "train_iters": 5}
    done = program.run("train")
    assert done.code == 0, done.stderr
    assert [line["step"] for line in lines_of(tmp_path / "out")] == [2, 4, 5]
    kept = {path.name for path in (tmp_path / "out" / "checkpoints").iterdir()}
    assert kept == {"iter_0000004", "iter_0000005"}


def test_a_mirror_that_is_not_installed_is_named(program, tmp_path):
    for name in ("wandb", "swanlab"):
        done = program.run("train", output_dir=tmp_path / name, **{f"{name}_project": "pairs"})
        done.fails(2, f"{name}_project", f"pip install {name}")
        assert not (tmp_path / name / "checkpoints").exists()


def test_the_reference_scores_the_pairs_that_are_used(program, tmp_path, eval_pairs):
    program.config |= {"stage": "dpo", "eval_data_path": str(eval_pairs), "eval_iters": 1, "global_batch_size": 4}
    program.config |= {"micro_batch_size": 1, "train_iters": 2, "save_interval": 1}

    def scored():
        files = sorted((program.home / ".cache" / "mindspeed_simpo" / "reference").glob("*/*.npy"))
        return sorted(int((~np.isnan(np.load(file)[:, 0])).sum()) for file in files)

    done = program.run("train", 2)
    assert done.code == 0, done.stderr
    assert scored() == [4, 8]
    assert "reference log-probabilities: 2 of 2" in done.stderr
    before = lines_of(tmp_path / "out")
    # a longer run with another layout computes what is not there
    done = program.run("train", 2, output_dir=tmp_path / "longer", train_iters=4, **{TP: 2})
    assert done.code == 0, done.stderr
    assert scored() == [4, 16]
    assert "reference log-probabilities: 2 of 2" in done.stderr
    longer = lines_of(tmp_path / "longer")
    assert [line["loss"] for line in longer[:2]] == pytest.approx([line["loss"] for line in before], rel=EXACT)
    # and one that resumes needs the pairs of the steps to come
    done = program.run("train", 2, load=tmp_path / "longer" / "checkpoints" / "iter_0000003", train_iters=6)
    assert done.code == 0, done.stderr
    assert scored() == [4, 24]


def test_dpo_takes_its_reference_from_the_cache(program, model, train_pairs, tmp_path):
    program.config |= {"stage": "dpo", "lr": 1e-4}
    done = program.run("train", 2, **{TP: 2})
    assert done.code == 0, done.stderr
    [cached] = (program.home / ".cache" / "mindspeed_simpo" / "reference").glob("*/*.npy")
    written = cached.stat().st_mtime_ns

    done = program.run("train", output_dir=tmp_path / "again")
    assert done.code == 0, done.stderr
    assert cached.stat().st_mtime_ns == written
    assert "reference" in done.stderr

    pairs = encode_file(model, train_pairs)
    batches = [[pairs[i] for i in batch] for batch in order_of(program, len(pairs))]
    options = oracle.Options(stage="dpo")
    history, _ = oracle.train(model, batches, learning_rates(program), options)
    for output in ("out", "again"):
        assert curve(tmp_path / output) == pytest.approx([x for step in history for x in step], rel=EXACT)


@pytest.mark.parametrize("stage", ["dpo", "alphadpo", "simper"])
def test_other_objectives_with_shared_prompts(program, model, train_pairs, tmp_path, stage):
    program.config |= {"stage": stage, "lr": 1e-4, "batching": "prefix_shared", "max_tokens_per_micro_batch": 600}
    done = program.run("train", 2)
    assert done.code == 0, done.stderr
    pairs = encode_file(model, train_pairs)
    batches = [[pairs[i] for i in batch] for batch in order_of(program, len(pairs))]
    history, _ = oracle.train(model, batches, learning_rates(program), oracle.Options(stage=stage))
    assert curve(tmp_path / "out") == pytest.approx([x for step in history for x in step], rel=EXACT)


def test_metrics_lines_are_strict_json(program, tmp_path):
    done = program.run("train", train_iters=1)
    assert done.code == 0, done.stderr
    for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))
