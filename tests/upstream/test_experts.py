"""Mixture-of-experts models in a real MindSpeed-LLM: loss and every gradient, against the dense fp64 oracle."""

import pytest

from tests.upstream.harness import expected, gradient_errors, make_pairs, needs_upstream, train

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
@pytest.mark.parametrize(("ranks", "flags"), [(2, ""), (4, f"{TP2} --use-distributed-optimizer")])
def test_grouped_products_are_those_of_the_experts_one_by_one(tmp_path, family, ranks, flags):
    """In bf16, which alone MindSpeed's grouped products take, and in which rounding may choose another expert."""
    one_by_one, grouped = (
        train(tmp_path / name, PAIRS, f"{LOCAL} {EP2} --bf16 {ONE} {flags} {added}", ranks, family=family)
        for name, added in (("one by one", ""), ("grouped", "--moe-grouped-gemm"))
    )
    assert grouped.metrics() == [pytest.approx(metrics, rel=2e-3) for metrics in one_by_one.metrics()]
    assert grouped.logged("grad norm") == pytest.approx(one_by_one.logged("grad norm"), rel=1e-2)
