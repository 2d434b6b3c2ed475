"""Each rank writes its shard: how much of it, in the background, on hosts that share no folder, with a foreign file."""

import pickle
import threading
import time
from pathlib import Path

import pytest

from tests.hf import make_checkpoint
from tests.ranks.launcher import run_ranks
from tests.ranks.parity import build, make_config, start

pytestmark = pytest.mark.newest_core

LAYOUTS = {
    "dp4": {},
    "dp4 sharded": {"use_distributed_optimizer": True},
    "tp2 dp2": {"tensor_model_parallel_size": 2},
    "pp2 cp2": {"pipeline_model_parallel_size": 2, "context_parallel_size": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", tied=True, vocab_size=515, layers=4)


def _state(config, step):
    from mindspeed_simpo.training.checkpoint import TrainingState

    return TrainingState(step=step, consumed_pairs=0, data_fingerprint="", config=config.model_dump())


def _shard_bytes(model, options):
    """Bytes of this rank's copy, and bytes of the fp32 parameters and moments that the layout's ranks hold once."""
    from mindspeed_simpo.model.naming import hf_tensors
    from mindspeed_simpo.training.checkpoint.writer import copied_shard

    config = make_config(model, global_batch_size=8, **options)
    groups, device = start(config)
    backend, wrapped, stepper = build(config, groups, device, 1)
    copied = copied_shard(wrapped, stepper, groups)
    whole = sum(3 * 4 * _numel(tensor.shape) for tensor in hf_tensors(backend.description))
    return sum(tensor.untyped_storage().nbytes() for tensor in copied.values()), whole


def _numel(shape):
    return shape[0] * (shape[1] if len(shape) > 1 else 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ranks_copy_the_state_once_and_about_equally(model, layout):
    ranks = run_ranks(_shard_bytes, 4, model, LAYOUTS[layout])
    whole = ranks[0][1]
    assert sum(copied for copied, _ in ranks) == whole
    # norms, which are not sharded, and the embedding, on one pipeline rank, are not equal on all
    assert max(copied for copied, _ in ranks) <= (0.27 if "pp2" not in layout else 0.36) * whole


def _save_in_background(model, root):
    import torch
    import torch.distributed as dist

    from mindspeed_simpo.training.checkpoint import CheckpointWriter, find, list_checkpoints, writer

    config = make_config(model, global_batch_size=8)
    groups, device = start(config)
    _, wrapped, stepper = build(config, groups, device, 1)
    go_on = threading.Event()
    original = writer._write_shard

    def slow(*arguments):
        assert go_on.wait(60)
        return original(*arguments)

    writer._write_shard = slow
    checkpoints = CheckpointWriter(Path(root), groups, device, keep=1, in_background=True)
    checkpoints.save(_state(config, 1), wrapped, stepper)
    before = float(next(wrapped[0].parameters()).detach().sum())
    with torch.no_grad():
        for parameter in wrapped[0].parameters():
            parameter.zero_()  # training goes on: the files must have the copy
    one = torch.ones(1)
    dist.all_reduce(one)
    assert list_checkpoints(Path(root)) == []
    go_on.set()
    checkpoints.wait()
    folder, state = find(str(root), groups.control)
    from mindspeed_simpo.training import checkpoint

    checkpoint.load(folder, wrapped, stepper, groups, device)
    after = float(next(wrapped[0].parameters()).detach().sum())
    checkpoints.save(_state(config, 2), wrapped, stepper)
    checkpoints.wait()
    return before, after, state.step, [path.name for path in list_checkpoints(Path(root))]


def test_training_goes_on_while_files_are_written(model, tmp_path):
    for before, after, step, names in run_ranks(_save_in_background, 2, model, str(tmp_path)):
        assert before == after != 0
        assert step == 1
        assert names == ["iter_0000002"]


def _save_where_one_fails(model, root, in_background):
    from mindspeed_simpo.errors import CheckpointError
    from mindspeed_simpo.training.checkpoint import CheckpointWriter, writer

    config = make_config(model, global_batch_size=8)
    groups, device = start(config)
    _, wrapped, stepper = build(config, groups, device, 1)
    original = writer._write_shard
    if groups.world.rank() == 1:

        def failing(*_):
            time.sleep(0.2)
            raise OSError(28, "No space left on device")

        writer._write_shard = failing
    checkpoints = CheckpointWriter(Path(root), groups, device, in_background=in_background)
    try:
        checkpoints.save(_state(config, 1), wrapped, stepper)
        checkpoints.wait()
    except CheckpointError as error:
        writer._write_shard = original
        checkpoints.save(_state(config, 2), wrapped, stepper)
        checkpoints.wait()
        return str(error), sorted(path.name for path in Path(root).iterdir())
    raise AssertionError("saved")


@pytest.mark.parametrize("in_background", [False, True])
def test_a_rank_that_cannot_write_is_told_by_all_and_leaves_nothing(model, tmp_path, in_background):
    for message, left in run_ranks(_save_where_one_fails, 2, model, str(tmp_path), in_background):
        assert "No space left on device" in message
        assert "MiB are free" in message
        assert left == ["iter_0000002"]


def _save_on_hosts(model, roots):
    from mindspeed_simpo.errors import SimpoError
    from mindspeed_simpo.training.checkpoint import CheckpointWriter
    from mindspeed_simpo.training.output import claimed

    config = make_config(model, global_batch_size=8)
    groups, device = start(config)
    root = Path(roots[groups.world.rank()])
    messages = []
    try:
        with claimed(root, groups):
            pass
    except SimpoError as error:
        messages.append(str(error))
    _, wrapped, stepper = build(config, groups, device, 1)
    try:
        CheckpointWriter(root / "checkpoints", groups, device).save(_state(config, 1), wrapped, stepper)
    except SimpoError as error:
        messages.append(str(error))
    return messages


def test_hosts_that_share_no_folder_are_refused_at_the_start_and_save_nothing(model, tmp_path):
    roots = [tmp_path / "host0", tmp_path / "host1"]
    for root in roots:
        (root / "checkpoints" / ".iter_0000001.incomplete").mkdir(parents=True)
    for at_start, at_save in run_ranks(_save_on_hosts, 2, model, [str(root) for root in roots]):
        assert "output_dir: rank 1 on" in at_start
        assert "does not see the folder" in at_start
        assert "rank 1 wrote this file" in at_save or "No such file" in at_save
    for root in roots:
        assert not list((root / "checkpoints").glob("iter_*"))


class _Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


def _load_foreign(model, root):
    from mindspeed_simpo.errors import CheckpointError
    from mindspeed_simpo.training.checkpoint import CheckpointWriter, find, folder, load

    config = make_config(model, global_batch_size=8)
    groups, device = start(config)
    _, wrapped, stepper = build(config, groups, device, 1)
    CheckpointWriter(Path(root), groups, device).save(_state(config, 1), wrapped, stepper)
    path = Path(root) / "iter_0000001"
    for name in (folder.rank_file(0), ".metadata", "common.pt", "rng_0.pt"):
        (path / name).write_bytes(pickle.dumps(_Attack(Path(root) / "ran")))
    files = {file.name: folder.record_of(file) for file in path.iterdir() if file.name != folder.FILES}
    (path / folder.FILES).write_text(folder.FileList(files=files).model_dump_json())
    found, _ = find(str(root), groups.control)
    try:
        load(found, wrapped, stepper, groups, device)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("loaded")


def test_a_checkpoint_from_a_stranger_runs_no_code(model, tmp_path):
    [message] = run_ranks(_load_foreign, 1, model, str(tmp_path))
    assert "iter_0000001" in message
    assert "is it a checkpoint of this model?" in message
    assert not (tmp_path / "ran").exists()
