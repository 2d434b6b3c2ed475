"""What goes wrong in a run: every rank ends, soon, with one message and no traceback."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.cli import lines_of

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"


@pytest.mark.parametrize(("ranks", "layout"), [(1, {}), (2, {TP: 2}), (2, {PP: 2}), (2, {})], ids=str)
def test_a_loss_that_is_not_finite_stops_all_ranks_and_leaves_the_pairs(program, tmp_path, ranks, layout):
    program.config |= layout
    done = program.run("train", ranks, lr=1e30, train_iters=5)
    step = len(lines_of(tmp_path / "out")) + 1
    assert step > 1
    file = tmp_path / "out" / f"not_finite_step_{step:07d}.json"
    message = done.fails(1, f"step {step}", "not finite on rank", file)
    assert message.count("error:") == 1
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["step"] == step
    assert 1 <= len({pair["row"] for pair in report["pairs"]}) <= 8
    for pair in report["pairs"]:
        assert pair["prompt_ids"]
        assert pair["chosen_ids"]
        assert pair["rejected_ids"]
        assert "train.jsonl:" in pair["source"]
    assert not (tmp_path / "out" / "checkpoints").exists()


def test_broken_weights(program, model, tmp_path, eval_pairs):
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    program.config |= {"model_name_or_path": str(broken), "eval_data_path": str(eval_pairs)}
    done = program.run("evaluate")
    done.fails(1, "not finite", broken)
    assert done.stdout == ""
    program.run("train", 2).fails(1, "step 1", "loss is not finite on rank 0, 1")
    # a line stays JSON that every parser reads
    assert lines_of(tmp_path / "out", "eval")[0]["loss"] is None


def test_outputs_that_cannot_be_written(program, tmp_path, eval_pairs):
    file = tmp_path / "file"
    file.write_text("not a folder")
    program.config["eval_data_path"] = str(eval_pairs)
    program.run("train", output_dir=file).fails(2, "output_dir", file)
    program.run("train", 2, output_dir=file / "below").fails(2, "output_dir", file)
    program.run("evaluate", 2, data_cache_dir=file).fails(1, file, "data_cache_dir")
    program.run("evaluate", env={"HOME": str(file)}).fails(1, file, "data_cache_dir")
    assert file.read_text() == "not a folder"


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small file system, as root on Linux")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk(program, tmp_path, ranks):
    import ctypes

    small = tmp_path / "small"
    small.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", bytes(small), b"tmpfs", 0, b"size=600k") != 0:
        pytest.skip("may not mount")
    try:
        done = program.run("train", ranks, output_dir=small / "out", train_iters=4, save_interval=1)
        message = done.fails(1, small / "out" / "checkpoints")
        assert len(message.splitlines()) == 1
        assert "No space left" in message
        assert not list((small / "out" / "checkpoints").glob(".iter_*")), "an incomplete folder keeps the disk full"
        left = {path.name for path in (small / "out" / "checkpoints").glob("iter_*")}
        for name in left:
            assert (small / "out" / "checkpoints" / name / "files.json").exists()
    finally:
        libc.umount2(bytes(small), 2)


def test_a_bad_row_on_two_ranks_is_said_once(program, tmp_path):
    data = tmp_path / "bad.jsonl"
    data.write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n{"prompt": "a", "chosen": 3}\n')
    done = program.run("train", 2, data_path=data)
    message = done.fails(1, "bad.jsonl:2")
    assert message.count("bad.jsonl:2") == 1
