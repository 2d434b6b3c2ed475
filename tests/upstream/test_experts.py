"""Mixture-of-experts models in a real MindSpeed-LLM: loss and every gradient, against the dense fp64 oracle."""

import random

import pytest
import torch

from tests import oracle_model
from tests.upstream.harness import expected, gradient_errors, make_pairs, needs_upstream, train
from tests.upstream.weights import VOCABULARY, config_of, hf_params

pytestmark = needs_upstream

LOCAL = "--transformer-impl local"
DISPATCH = "--moe-token-dispatcher-type alltoall"
EP2 = f"--expert-model-parallel-size 2 {DISPATCH}"
TP2 = "--tensor-model-parallel-size 2 --sequence-parallel"
PP2 = "--pipeline-model-parallel-size 2"
RING = "--context-parallel-size 2 --context-parallel-algo megatron_cp_algo --use-flash-attn"
ULYSSES = "--context-parallel-size 2 --context-parallel-algo ulysses_cp_algo"
ONE = "--micro-batch-size 1"
CASES = {
    "one rank": (1, DISPATCH),
    "ep2": (2, f"{EP2} {ONE}"),
    "ep2 tp2 sp": (4, f"{EP2} {TP2} {ONE}"),
    "ep2 tp2 sp in one": (2, f"{EP2} {TP2} --expert-tensor-parallel-size 1"),
    "ep2 pp2": (4, f"{EP2} {PP2} {ONE}"),
    "cp2 ring ep2": (2, f"{EP2} {RING}"),
    "cp2 ulysses ep2": (2, f"{EP2} {ULYSSES}"),
    "ep2 alltoall_seq": (2, f"{EP2} {ONE}".replace("alltoall", "alltoall_seq")),
    "ep2 distributed optimizer": (4, f"{EP2} --use-distributed-optimizer {ONE}"),
    "two_pass ep2": (2, f"{EP2} --pair-schedule two_pass {ONE}"),
    "two_pass ep2 pp2": (4, f"{EP2} --pair-schedule two_pass {PP2} {ONE}"),
    "fused ep2 tp2 sp": (4, f"{EP2} --fused-logprob {TP2} {ONE}"),
    "full recompute ep2": (
        2,
        f"{EP2} {ONE} --recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
    ),
}
PAIRS = make_pairs(8)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("name", CASES)
def test_topology(tmp_path, name, family):
    ranks, flags = CASES[name]
    run = train(tmp_path, PAIRS, f"{LOCAL} {flags}", ranks, family=family)
    wanted, gradients = expected(PAIRS[:4], family)
    found = run.metrics()[-1]
    assert found["lm loss"] == pytest.approx(wanted["loss"], rel=1e-6)
    errors = gradient_errors(run, gradients, family=family)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize(("ranks", "flags"), [(2, ONE), (4, f"{PP2} {ONE}")])
def test_dpo_exact(tmp_path, family, ranks, flags):
    run = train(tmp_path, PAIRS, f"{LOCAL} {EP2} --dpo-exact {flags}", ranks, stage="dpo", family=family)
    wanted, gradients = expected(PAIRS[:4], family, stage="dpo")
    # DPO's loss is made of differences between sums of many nats
    assert run.metrics()[-1]["lm loss"] == pytest.approx(wanted["loss"], rel=5e-6)
    errors = gradient_errors(run, gradients, family=family)
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("flags", ["", "--use-distributed-optimizer --bf16"])
def test_resuming_is_as_if_never_stopped(tmp_path, flags):
    flags = f"{LOCAL} {EP2} {ONE} --ckpt-format torch {flags}"
    whole = train(tmp_path / "whole", PAIRS, flags, 2, iterations=4, family="qwen3_moe")
    saved = f"{flags} --save {tmp_path}/checkpoints --save-interval 2 --exit-interval 2"
    train(tmp_path / "first", PAIRS, saved, 2, iterations=4, family="qwen3_moe")
    loaded = f"{flags} --load {tmp_path}/checkpoints"
    resumed = train(tmp_path / "second", PAIRS, loaded, 2, iterations=4, family="qwen3_moe")
    assert resumed.metrics() == whole.metrics()[2:]
    for before, after in zip(whole.ranks, resumed.ranks, strict=True):
        for name, (_, _, value) in before["parameters"].items():
            assert torch.equal(after["parameters"][name][2], value), name


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize(("ranks", "flags"), [(2, ""), (4, f"{TP2} --use-distributed-optimizer")])
def test_grouped_products_are_those_of_the_experts_one_by_one(tmp_path, family, ranks, flags):
    """In bf16, which alone MindSpeed's grouped products take, and in which rounding may choose another expert."""
    one_by_one, grouped = (
        train(tmp_path / name, PAIRS, f"{LOCAL} {EP2} --bf16 {ONE} {flags} {added}", ranks, family=family)
        for name, added in (("one by one", ""), ("grouped", "--moe-grouped-gemm"))
    )
    assert grouped.metrics() == [pytest.approx(metrics, rel=2e-3) for metrics in one_by_one.metrics()]
    assert grouped.logged("grad norm") == pytest.approx(one_by_one.logged("grad norm"), rel=1e-2)


AUXILIARY = 0.1
AUXILIARY_CASES = {
    "one rank": (1, DISPATCH, 2),
    "ep2": (2, f"{EP2} {ONE}", 1),
    "ep2 tp2 sp": (4, f"{EP2} {TP2} {ONE}", 1),
    "ep2 alltoall_seq": (2, f"{EP2} {ONE}".replace("alltoall", "alltoall_seq"), 1),
}
"""Ranks, flags, and pairs of a micro-batch."""


def full_pairs(number, seq_length=48):
    """Pairs whose rows need no padding, which upstream routes too."""
    draw = random.Random(3)
    return [
        tuple([draw.randrange(VOCABULARY) for _ in range(length)] for length in (prompt, *2 * (seq_length - prompt,)))
        for prompt in (draw.randint(4, 40) for _ in range(number))
    ]


def auxiliary_gradients(micro_batches, family):
    """Gradients of the mean over micro-batches of upstream's loss, ``coefficient experts sum_e f_e P_e`` a layer.

    ``f_e`` is the share of the choices that are expert e, ``P_e`` its mean probability, over a micro-batch's tokens.
    """
    config, seen = config_of(family), {}

    def record(params, config, layer, hidden, unevenness):
        block = "block_sparse_moe" if family == "mixtral" else "mlp"
        seen.setdefault(layer, []).append((hidden @ params[f"{layer}.{block}.gate.weight"].T).softmax(-1))
        return experts(params, config, layer, hidden, unevenness)

    params = {name: value.double().requires_grad_() for name, value in hf_params(family=family).items()}
    total, experts = 0.0, oracle_model._experts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle_model, "_experts", record)
        for pairs in micro_batches:
            for prompt, *answers in pairs:
                for answer in answers:
                    oracle_model.logits(params, config, [*prompt, *answer])
            for probabilities in map(torch.cat, seen.values()):
                count = config["num_experts_per_tok"]
                chosen = probabilities.topk(count).indices.flatten().bincount(minlength=probabilities.shape[1])
                share = chosen / (count * len(probabilities))
                total = total + AUXILIARY * len(share) * (share * probabilities.mean(0)).sum()
            seen.clear()
    found = torch.autograd.grad(total / len(micro_batches), list(params.values()), allow_unused=True)
    return {
        name: torch.zeros_like(params[name]) if grad is None else grad for name, grad in zip(params, found, strict=True)
    }


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize("name", AUXILIARY_CASES)
def test_the_auxiliary_loss_is_that_of_each_micro_batch(tmp_path, name, family):
    ranks, flags, size = AUXILIARY_CASES[name]
    pairs = full_pairs(4)
    run = train(tmp_path, pairs, f"{LOCAL} {flags} --moe-aux-loss-coeff {AUXILIARY}", ranks, family=family)
    _, gradients = expected(pairs, family)
    added = auxiliary_gradients([pairs[first : first + size] for first in range(0, 4, size)], family)
    errors = gradient_errors(run, {key: gradient + added[key] for key, gradient in gradients.items()}, family=family)
    assert max(errors.values()) < 1e-5, errors
