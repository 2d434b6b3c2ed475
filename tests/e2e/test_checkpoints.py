"""kill -9 at any point, resume, and results bit-identical to an uninterrupted run; damaged checkpoints are refused."""

import json
import os
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.cli import Program, lines_of, wait_until
from tests.hf import make_checkpoint

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
STEPS = 6
LAYOUTS = {
    "one rank": (1, {}),
    "bf16, dp2, sharded optimizer": (2, {"bf16": True, "use_distributed_optimizer": True}),
    "tp2 pp2": (4, {TP: 2, PP: 2}),
    "alphadpo, dp2": (2, {"stage": "alphadpo", "alphadpo_alpha": 0.5}),
}


def tensors_of(checkpoint):
    """Every piece of every rank's file."""
    files = checkpoint.glob("rank_*.safetensors")
    return {(file.name, name): tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_bits(output, other):
    """Parameters, Adam's moments and random states after the last step, of two runs at the same layout."""
    ours, theirs = (tensors_of(folder / "checkpoints" / f"iter_{STEPS:07d}") for folder in (output, other))
    assert ours.keys() == theirs.keys()
    assert any("exp_avg_sq" in name for _, name in ours)
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different


def numbers_of(output):
    return [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines_of(output)]


def statistics_of(output):
    """What the last checkpoint keeps of the value that the objective tracks."""
    return json.loads((output / "checkpoints" / f"iter_{STEPS:07d}" / "state.json").read_text())["running"]


@pytest.fixture
def program(program):
    program.config |= {"train_iters": STEPS, "save_interval": 2, "global_batch_size": 10, "micro_batch_size": 1}
    return program


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_killed_in_training_goes_on_bit_by_bit(program, tmp_path, layout):
    ranks, options = LAYOUTS[layout]
    program.config |= options
    done = program.run("train", ranks, output_dir=tmp_path / "whole")
    assert done.code == 0, done.stderr

    run = program.start("train", ranks)
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 3, run)
    run.kill()
    assert not (tmp_path / "out" / "checkpoints" / f"iter_{STEPS:07d}").exists()
    done = program.run("train", ranks, load=tmp_path / "out")
    assert done.code == 0, done.stderr
    assert "resumed from" in done.stderr
    assert_same_bits(tmp_path / "out", tmp_path / "whole")
    assert numbers_of(tmp_path / "out") == numbers_of(tmp_path / "whole")
    statistics = [statistics_of(tmp_path / name) for name in ("out", "whole")]
    assert statistics[0] == statistics[1]
    assert (statistics[0] is None) == (options.get("stage") != "alphadpo")


def kill_during_a_save(program, output, ranks):
    """The run, killed -9 while it writes a checkpoint after the first one; False where the save was quicker."""
    run = program.start("train", ranks, output_dir=output)
    saves = output / "checkpoints"
    wait_until(lambda: (saves / "iter_0000002").exists(), run)
    wait_until(lambda: any(saves.glob(".iter_*.incomplete")), run)
    run.kill()
    return any(saves.glob(".iter_*.incomplete"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_after_a_signal_to_one_rank_the_same_command_goes_on_bit_by_bit(program, tmp_path, number):
    program.config |= {TP: 2, "load": "auto", "async_save": number == signal.SIGUSR1}
    done = program.run("train", 2, output_dir=tmp_path / "whole")
    assert done.code == 0, done.stderr

    run = program.start("train", 2)
    metrics = tmp_path / "out" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 1, run)
    os.kill(run.processes[1].pid, number)
    done = run.wait()
    assert done.code == 128 + number, done.stderr
    steps = len(lines_of(tmp_path / "out"))
    assert f"stopped by {number.name} after step {steps}, which is saved" in done.stderr
    assert (tmp_path / "out" / "checkpoints" / f"iter_{steps:07d}").exists()
    done = program.run("train", 2)
    assert done.code == 0, done.stderr
    assert_same_bits(tmp_path / "out", tmp_path / "whole")
    assert numbers_of(tmp_path / "out") == numbers_of(tmp_path / "whole")


@pytest.mark.parametrize("in_background", [False, True])
def test_a_run_killed_during_a_save_goes_on_bit_by_bit(program, tmp_path, in_background):
    program.config |= {TP: 2, "async_save": in_background}
    done = program.run("train", 2, output_dir=tmp_path / "whole")
    assert done.code == 0, done.stderr
    outputs = [tmp_path / f"killed{attempt}" for attempt in range(5)]
    output = next(output for output in outputs if kill_during_a_save(program, output, 2))
    [half] = (output / "checkpoints").glob(".iter_*.incomplete")

    saved = sorted((output / "checkpoints").glob("iter_*"))
    program.run("train", 2, load=half).fails(1, half.name, "half-written", saved[-1])
    done = program.run("train", 2, load=output, output_dir=output)
    assert done.code == 0, done.stderr
    assert_same_bits(output, tmp_path / "whole")
    assert not any((output / "checkpoints").glob(".*"))


@pytest.fixture(scope="module")
def written(tmp_path_factory, model, train_pairs):
    """Checkpoints of steps 1, 2 and 3 of a run on two ranks; copied before they are harmed."""
    folder = tmp_path_factory.mktemp("written")
    program = Program(
        folder / "program",
        model_name_or_path=str(model),
        data_path=str(train_pairs),
        output_dir=str(folder / "out"),
        seq_length=1024,
        seed=7,
        global_batch_size=4,
        lr=1e-3,
        train_iters=3,
        save_interval=1,
        **{TP: 2},
    )
    done = program.run("train", 2)
    assert done.code == 0, done.stderr
    return folder / "out"


@pytest.fixture
def checkpoints(written, tmp_path):
    shutil.copytree(written, tmp_path / "copy")
    return tmp_path / "copy" / "checkpoints"


def _truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "harm", "said"),
    [
        ("rank_00000.safetensors", _truncate, "bytes, expected"),
        ("rank_00001.safetensors", _flip, "does not match the digest"),
        ("rank_00001.safetensors", lambda path: path.unlink(), "is missing"),
        ("state.json", _flip, "state.json is damaged"),
        ("files.json", _truncate, "files.json is damaged"),
        ("files.json", lambda path: path.write_text('{"files": {}}'), "does not list every file"),
        ("files.json", lambda path: path.unlink(), "half-written"),
    ],
)
def test_a_damaged_checkpoint_is_refused_by_name_and_the_one_before_it_offered(program, checkpoints, name, harm, said):
    harm(checkpoints / "iter_0000003" / name)
    _flip(checkpoints / "iter_0000002" / "rank_00000.safetensors")
    done = program.run("export", checkpoint=checkpoints.parent, output=checkpoints.parent / "hf")
    message = done.fails(1, checkpoints / "iter_0000003", said, f"before it is {checkpoints / 'iter_0000001'}")
    assert len(message.splitlines()) == 1
    assert not (checkpoints.parent / "hf").exists()


def test_nothing_whole_to_offer(program, checkpoints):
    (checkpoints / "iter_0000001" / "files.json").unlink()
    load = checkpoints / "iter_0000001"
    program.run("train", load=load).fails(1, load, "there is no whole one before it")
    program.run("train", load=checkpoints / "absent").fails(1, "absent", "is not a folder")


def test_what_may_not_change(program, checkpoints, tmp_path):
    program.config |= {"load": str(checkpoints), "global_batch_size": 4}
    newest = checkpoints / "iter_0000003"
    other = make_checkpoint(tmp_path / "other", "qwen2", tied=True, vocab_size=515, hidden=64)
    program.run("train", 2, model_name_or_path=other).fails(1, newest, "is it a checkpoint of this model?")
    program.run("train", split="50,50").fails(1, "other data")
    program.run("train", seed=3).fails(1, newest, "seed: 7 (now 3)")
    program.run("train", bf16=True).fails(1, newest, "bf16: False (now True)")
    program.run("train", simpo_beta=3.5, stage="simpo").fails(1, newest, "simpo_beta: 2.5 (now 3.5)")
    program.run("train", stage="orpo").fails(1, newest, "stage: simpo (now orpo)")
    program.run("train", global_batch_size=8).fails(1, newest, "global_batch_size: 4 (now 8)")


def test_what_may_change_is_said(program, checkpoints):
    program.config |= {"load": str(checkpoints), "global_batch_size": 4, "train_iters": 4, "lr": 5e-4}
    done = program.run("train")
    assert done.code == 0, done.stderr
    [said] = [line for line in done.stderr.splitlines() if "options differ" in line]
    assert "lr: 0.001 (now 0.0005)" in said
    assert "train_iters: 3 (now 4)" in said


def test_a_run_does_not_write_over_another_one(program, checkpoints):
    program.run("train", output_dir=checkpoints.parent).fails(2, "holds checkpoints of another run", "load")
