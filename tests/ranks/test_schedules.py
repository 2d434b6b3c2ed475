"""Every pair schedule, fused head or not, has the oracle's gradient at every layout, and the same metrics."""

import functools
import itertools

import pytest
import torch

from tests import oracle
from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.launcher import run_ranks
from tests.ranks.parity import worst_error

TP, PP, CP, DP = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "data_parallel_size",
)
MODES = [
    {"pair_schedule": name, "fused_logprob": fused, "logprob_chunk_tokens": 7}
    for name, fused in itertools.product(("concat", "split", "two_pass"), (False, True))
]
VIRTUAL = {"num_layers_per_virtual_pipeline_stage": 1}
SHARDED = {"use_distributed_optimizer": True}
OVERLAP = {"overlap_grad_reduce": True}
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
LAYOUTS = {
    "one rank": {},
    "tp2 sequence parallel": {TP: 2, "sequence_parallel": True},
    "pp2": {PP: 2},
    "virtual stages": {PP: 2, **VIRTUAL},
    "cp2": {CP: 2},
    "dp2 sharded optimizer": {DP: 2, **SHARDED},
    "dp2 overlapped reduction": {DP: 2, **OVERLAP, **SHARDED},
    "dp2 overlapped reduction tied": {DP: 2, **OVERLAP},
    "virtual stages dp2 overlapped reduction": {PP: 2, DP: 2, **VIRTUAL, **OVERLAP},
    "tp2 pp2": {TP: 2, PP: 2},
    "full recompute": RECOMPUTE,
}
UNTIED = {"pp2", "dp2 overlapped reduction"}
"""The others tie the embedding to the head: its weight then has two gradients on one rank, or on two stages."""
PAIRS, VOCAB = 8, 517


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    @functools.cache
    def make(tied, layers, seed=0):
        folder = tmp_path_factory.mktemp("model")
        return make_checkpoint(folder, tied=tied, layers=layers, vocab_size=VOCAB, std=0.15, seed=seed)

    return make


@functools.cache
def all_pairs():
    return make_token_pairs(PAIRS, VOCAB)


@functools.cache
def expectation(folder, ref_folder):
    arguments = folder, all_pairs(), oracle.Options(stage="dpo" if ref_folder else "simpo"), ref_folder
    return oracle.evaluate(*arguments), oracle.gradients(*arguments)


def sums_of(folder, token_pairs):
    """Reference sums by the oracle."""
    params, config = oracle.load(folder)
    return [
        [oracle.sequence_logprob(params, config, prompt, ids)[0].item() for ids in responses]
        for prompt, *responses in token_pairs
    ]


def engine_modes(folder, modes, references=None, pairs=None, **options):
    """``(metrics, gradients)`` of one global batch in each mode, all modes in the same ranks."""
    token_pairs = pairs or all_pairs()
    data = options.pop(DP, 1)
    ranks = data
    for key in (TP, PP, CP):
        ranks *= options.get(key, 1)
    options = {"micro_batch_size": 2, "global_batch_size": len(token_pairs), **options}
    results = run_ranks(_rank, ranks, str(folder), token_pairs, references, options, modes)
    return [
        (metrics, {name: torch.from_numpy(array) for name, array in grads.items()}) for metrics, grads in results[0]
    ]


def _rank(folder, token_pairs, references, options, modes):
    from megatron.core import tensor_parallel

    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.config.validation import make_layout
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.parallel import initialize

    device = open_device("cpu")
    layout = make_layout(
        Config(model_name_or_path=folder, data_path="unused", **options), torch.distributed.get_world_size()
    )
    groups = initialize(layout, device)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    return [
        _one_mode(
            Config(model_name_or_path=folder, data_path="unused", **options, **mode),
            token_pairs,
            references,
            device,
            groups,
        )
        for mode in modes
    ]


def _one_mode(config, token_pairs, references, device, groups):
    from mindspeed_simpo.loss.reference import ReferenceTable
    from mindspeed_simpo.model.megatron.weights import gather_hf_tensors
    from mindspeed_simpo.training.metrics import MetricSums
    from scripts.engine import build_engine
    from tests.ranks.parity import _complete_sharded_gradients, _micro_batches

    table = None if references is None else ReferenceTable(torch.tensor(references, dtype=torch.float64))
    wrapped, schedule = build_engine(config, device, groups, table)
    micro_batches = _micro_batches(token_pairs, 0, config, groups)
    scored = schedule.forward_backward(micro_batches, len(token_pairs))
    metric_sums = MetricSums(config.objective, groups, device)
    sums = metric_sums.reduce(metric_sums.local(scored))
    _complete_sharded_gradients(wrapped, config)
    gathered = gather_hf_tensors(
        wrapped, wrapped[0].module.description, groups, value=lambda parameter: parameter.main_grad
    )
    return metric_sums.totals(sums).means, {name: tensor.clone().numpy() for name, tensor in gathered}


def compare(modes, results, expected_metrics, expected_grads):
    for mode, (metrics, grads) in zip(modes, results, strict=True):
        # a margin is a difference: where its terms are exact to fp32's unit roundoff, it is to their sum of it
        rewards = sum(abs(expected_metrics[f"rewards/{answer}"]) for answer in ("chosen", "rejected"))
        for key, value in expected_metrics.items():
            allowed = max(1e-6, 2**-24 * rewards) if key == "rewards/margins" else 1e-6
            assert metrics[key] == pytest.approx(value, rel=2e-6, abs=allowed), f"{key} in {mode}"
        error, name = worst_error(grads, expected_grads)
        assert error < 1e-5, f"gradient of {name} in {mode}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_and_metrics_are_the_oracles(checkpoint, layout):
    folder = checkpoint(layout not in UNTIED, 4 if "virtual" in layout else 2)
    compare(MODES, engine_modes(folder, MODES, **LAYOUTS[layout]), *expectation(folder, None))


def test_dpo(checkpoint):
    folder, reference = checkpoint(True, 2), checkpoint(True, 2, seed=1)
    results = engine_modes(folder, MODES, sums_of(reference, all_pairs()), stage="dpo", **{TP: 2, DP: 2})
    compare(MODES, results, *expectation(folder, reference))
