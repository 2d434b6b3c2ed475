"""Parameters that are gathered while the next forward runs: steps are the same, and every parameter is waited for."""

import functools

import pytest
import torch

from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.launcher import run_ranks
from tests.ranks.parity import Run, engine_runs, make_config, start

PP, DP = "pipeline_model_parallel_size", "data_parallel_size"
VIRTUAL = {"num_layers_per_virtual_pipeline_stage": 1}
LAYOUTS = {
    "dp2": {DP: 2},
    "dp2 pp2 virtual tied": {DP: 2, PP: 2, **VIRTUAL},
    "dp2 pp2 experts": {DP: 2, PP: 2, "expert_model_parallel_size": 2},
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MODES = [{"pair_schedule": "two_pass", "fused_logprob": True, **FULL}, {"batching": "packed"}]
SHARDED = {"use_distributed_optimizer": True, "overlap_grad_reduce": True}
GATHERED = {"overlap_param_gather": True}


def small_buckets():
    """Several buckets in a small model."""
    from mindspeed_simpo.training import optimizer

    optimizer.DistributedDataParallelConfig = functools.partial(
        optimizer.DistributedDataParallelConfig, bucket_size=20_000
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_steps_are_the_same_bit_for_bit(tmp_path, name):
    family = "qwen3_moe" if "experts" in name else "qwen2"
    folder = make_checkpoint(tmp_path, family, tied="tied" in name, layers=4 if "virtual" in name else 2)
    batches = [make_token_pairs(8, seed=step) for step in range(3)]
    runs = [Run({**mode, **extra}) for mode in MODES for extra in ({}, GATHERED)]
    results = engine_runs(folder, batches, runs, small_buckets, lr=1e-2, **SHARDED, **LAYOUTS[name])
    for mode, plain, gathered in zip(MODES, results[::2], results[1::2], strict=True):
        assert plain["losses"] == gathered["losses"], mode
        assert plain["grad_norms"] == gathered["grad_norms"], mode
        assert len(set(plain["losses"])) == len(batches)
        for key in ("grads", "params"):
            for tensor, values in plain[key].items():
                assert torch.equal(values, gathered[key][tensor]), (mode, key, tensor)


def _not_waited_for(models):
    """Modules whose parameters a forward reads without a wait: for each model the names."""
    from mindspeed_simpo.batch import TokenizedPair
    from mindspeed_simpo.data.batching import Batching
    from scripts.engine import build_engine

    pairs = [TokenizedPair(*pair, source="test") for pair in make_token_pairs(2)]
    groups, found = None, {}
    for folder, options in models:
        config = make_config(folder, global_batch_size=2, **options)
        if groups is None:
            groups, device = start(config)
        [model], schedule = build_engine(config, device, groups)
        waiting = {module: name for name, module in model.named_modules() if [*module.parameters(recurse=False)]}

        def waits(module, *_, waiting=waiting):
            waiting.pop(module, None)

        for module in waiting:
            module.register_forward_pre_hook(waits)
        model.module.await_parameters = waits
        assert len(waiting) > 10
        schedule.forward(Batching.of(config).micro_batches(pairs, [0, 1]))
        found[folder] = sorted(waiting.values())
    return found


@pytest.mark.newest_core
def test_every_parameter_is_waited_for_before_it_is_read(tmp_path):
    adapters = {"lora_r": 2, "lora_target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]}
    models = [
        (str(make_checkpoint(tmp_path / family, family, tied=tied)), options)
        for family, tied, options in (
            ("qwen2", True, {}),
            ("qwen3_moe", False, adapters),
            ("gpt_oss", False, {}),
            ("deepseek_v3", False, {"fused_logprob": True}),
        )
    ]
    assert run_ranks(_not_waited_for, 1, models) == [{folder: [] for folder, _ in models}]
