"""A complete optimizer step: host synchronisations, and the state after a gradient that is not finite."""

import json

import pytest
import torch

from tests.hf import make_checkpoint, make_pairs
from tests.ranks.launcher import run_ranks
from tests.ranks.waits import Waits

LAYOUTS = {
    "one rank": {},
    "dp2 distributed optimizer": {"use_distributed_optimizer": True},
    "tp2 sequence parallel": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


def make_run(folder, data, output, options):
    """A real run of this rank, after its data and model are there and before its first step."""
    from pathlib import Path

    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.config.validation import make_layout
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.parallel import initialize
    from mindspeed_simpo.training.reference_pass import UsedPairs, configured_tables
    from mindspeed_simpo.training.session import build_session
    from mindspeed_simpo.training.trainer import Run

    Path(output).mkdir(exist_ok=True)
    config = Config(
        model_name_or_path=folder,
        data_path=data,
        output_dir=output,
        data_cache_dir=f"{output}/cache",
        global_batch_size=8,
        train_iters=4,
        seq_length=1024,
        lr=1e-3,
        **options,
    )
    device = open_device("cpu")
    layout = make_layout(config, torch.distributed.get_world_size())
    session = build_session(config, device, initialize(layout, device))
    pairs = session.prepare("train")
    used = UsedPairs(pairs, session.loader(pairs).train_pairs(0, 4))
    tables = configured_tables(session, config, [used, None])
    models = session.backend.for_training()
    stepper = session.backend.stepper(models, 4)
    return Run(session, config, models, stepper, pairs, None, tables, 4)


def parameters_of(run):
    return [parameter.detach().clone() for model in run.models for parameter in model.parameters()]


def _waits(folder, data, output, options):
    run = make_run(folder, data, output, options)
    run.train_step(logged=True)
    # response tokens are searched in the micro-batches before these are copied to the device
    with Waits(on_host="shard_of") as waits:
        run.train_step(logged=False)
    return waits.seen, run.step


@pytest.mark.parametrize("adapters", [False, True], ids=["all weights", "adapters"])
@pytest.mark.parametrize("stage", ["simpo", "dpo"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_that_is_not_logged_waits_for_nothing(tmp_path, layout, stage, adapters):
    folder, data = make_checkpoint(tmp_path / "model", "qwen3"), make_pairs(tmp_path / "pairs.jsonl", 16)
    ranks = 1 if layout == "one rank" else 2
    options = LAYOUTS[layout] | {"stage": stage, "lora_r": 4 if adapters else 0}
    for seen, step in run_ranks(_waits, ranks, str(folder), str(data), str(tmp_path / "out"), options):
        assert seen == []
        assert step == 2


def _not_finite(folder, data, output, options, logged):
    from mindspeed_simpo.errors import TrainingError

    run = make_run(folder, data, output, options)
    run.train_step(logged=logged)
    before, original = parameters_of(run), type(run.schedule).forward_backward

    def planted(schedule, *args):
        scored = original(schedule, *args)
        next(run.models[0].parameters()).main_grad.view(-1)[0] = torch.nan
        return scored

    type(run.schedule).forward_backward = planted
    try:
        with pytest.raises(TrainingError) as raised:
            run.train_step(logged=logged)
    finally:
        type(run.schedule).forward_backward = original
    same = all(torch.equal(old, new) for old, new in zip(before, parameters_of(run), strict=True))
    return str(raised.value), same, run.step


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_gradient_that_is_not_finite_is_found_before_the_parameters_change(tmp_path, layout, logged):
    folder, data = make_checkpoint(tmp_path / "model"), make_pairs(tmp_path / "pairs.jsonl", 16)
    ranks = 1 if layout == "one rank" else 2
    arguments = str(folder), str(data), str(tmp_path / "out"), LAYOUTS[layout], logged
    for message, same, step in run_ranks(_not_finite, ranks, *arguments):
        assert "step 2: gradient norm is not finite" in message
        assert same
        assert step == 1
    report = json.loads((tmp_path / "out" / "not_finite_step_0000002.json").read_text())
    assert len(report["pairs"]) == 8
