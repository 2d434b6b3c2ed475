"""alpha-DPO over several steps: its statistics are those of the global batches so far, whatever the layout."""

import dataclasses
import functools

import pytest
import torch

from tests import oracle
from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.parity import Run, engine_runs, engine_steps, worst_error

pytestmark = pytest.mark.newest_core

TP, PP, CP, DP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "data_parallel_size",
)
STEPS, PAIRS, VOCAB = 4, 8, 517
OPTIONS = {"alphadpo_alpha": 0.2, "alphadpo_beta": 5.0}
TRAINING = {"stage": "alphadpo", **OPTIONS, "lr": 3e-3, "lr_decay_style": "constant", "adam_eps": 1e-4}
# of several micro-batches, and in data-parallel ranks of different sizes
PACKED = {"batching": "packed", "max_tokens_per_micro_batch": 90}
LAYOUTS = {
    "one rank": {},
    "micro-batch of 1": {"micro_batch_size": 1},
    "tp2 pp2": {TP: 2, PP: 2},
    "cp2 dp2 sharded": {CP: 2, DP: 2, "use_distributed_optimizer": True},
    "pp2 virtual two_pass": {PP: 2, "num_layers_per_virtual_pipeline_stage": 1, "pair_schedule": "two_pass"},
    "dp4 packed": {DP: 4, **PACKED},
    "dp2 prefix_shared": {DP: 2, **PACKED, "batching": "prefix_shared"},
    "split": {"pair_schedule": "split"},
}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [
        make_checkpoint(folder / str(seed), layers=4, tied=True, vocab_size=VOCAB, std=0.15, seed=seed)
        for seed in (0, 1)
    ]


@functools.cache
def batches():
    pairs = make_token_pairs(STEPS * PAIRS, VOCAB)
    return [pairs[first : first + PAIRS] for first in range(0, len(pairs), PAIRS)]


@pytest.fixture(scope="module")
def references(checkpoints):
    params, config = oracle.load(checkpoints[1])
    return [
        [oracle.sequence_logprob(params, config, prompt, ids)[0].item() for ids in responses]
        for pairs in batches()
        for prompt, *responses in pairs
    ]


@pytest.fixture(scope="module")
def expected(checkpoints):
    """History, parameters and statistics by the oracle; and the losses of a run whose margins stay as they began."""
    options = oracle.Options(stage="alphadpo", **OPTIONS, adam_eps=TRAINING["adam_eps"])
    lrs, running = [TRAINING["lr"]] * STEPS, oracle.Running()
    history, params = oracle.train(checkpoints[0], batches(), lrs, options, checkpoints[1], running)
    frozen = dataclasses.replace(options, alphadpo_alpha=0.0)
    constant, _ = oracle.train(checkpoints[0], batches(), lrs, frozen, checkpoints[1])
    return history, {name: param.detach() for name, param in params.items()}, running.value, constant


@pytest.mark.parametrize("layout", LAYOUTS)
def test_statistics_and_curve_are_the_oracles(checkpoints, references, expected, layout):
    history, params, statistics, constant = expected
    result = engine_steps(checkpoints[0], batches(), references, **TRAINING, **LAYOUTS[layout])
    assert result["running"] == pytest.approx(statistics, rel=1e-5)
    assert result["losses"] == pytest.approx([loss for loss, _ in history], rel=2e-6)
    assert result["grad_norms"] == pytest.approx([norm for _, norm in history], rel=2e-5)
    error, name = worst_error(result["params"], params)
    assert error < 5e-5, name
    # the first batch has no statistics before it; the others' losses depend on them
    assert history[0][0] == pytest.approx(constant[0][0], rel=1e-12)
    assert all(abs(loss - other) > 1e-3 for (loss, _), (other, _) in zip(history[1:], constant[1:], strict=True))


@pytest.mark.parametrize("layout", ["one rank", "cp2 dp2 sharded", "tp2 pp2"])
def test_a_resumed_run_goes_on_bit_by_bit(checkpoints, references, tmp_path, layout):
    half = STEPS // 2
    options = {**TRAINING, **LAYOUTS[layout]}
    whole = engine_steps(checkpoints[0], batches(), references, **options)
    engine_steps(checkpoints[0], batches()[:half], references, save=tmp_path, **options)
    rest = references[half * PAIRS :]
    second = engine_steps(checkpoints[0], batches()[half:], rest, load=tmp_path / f"iter_{half:07d}", **options)
    assert second["losses"] == whole["losses"][half:]
    assert second["grad_norms"] == whole["grad_norms"][half:]
    assert second["running"] == whole["running"]
    assert all(torch.equal(second["params"][name], value) for name, value in whole["params"].items())


@pytest.mark.parametrize(("written", "read"), [("tp2 pp2", "cp2 dp2 sharded"), ("dp4 packed", "one rank")])
def test_a_run_goes_on_at_another_layout(checkpoints, references, expected, tmp_path, written, read):
    half = STEPS // 2
    history, params, statistics, _ = expected
    engine_steps(checkpoints[0], batches()[:half], references, save=tmp_path, **TRAINING, **LAYOUTS[written])
    load, rest = tmp_path / f"iter_{half:07d}", references[half * PAIRS :]
    second = engine_steps(checkpoints[0], batches()[half:], rest, load=load, **TRAINING, **LAYOUTS[read])
    assert second["losses"] == pytest.approx([loss for loss, _ in history[half:]], rel=2e-6)
    assert second["running"] == pytest.approx(statistics, rel=1e-5)
    assert worst_error(second["params"], params)[0] < 5e-5


def test_other_objectives_track_nothing(checkpoints):
    [result] = engine_runs(checkpoints[0], batches()[:1], [Run()], lr=1e-3)
    assert result["running"] is None
