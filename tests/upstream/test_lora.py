"""LoRA of a real MindSpeed-LLM under ``--stage simpo``: the gradients of every adapter, against the oracle."""

import re

import pytest
import torch

from tests.upstream.harness import dense, make_pairs, needs_upstream, train
from tests.upstream.weights import EXPERTS, LAYERS, Place, hf_params, megatron_part

pytestmark = needs_upstream

PAIRS = make_pairs(8)
ROW_PARALLEL = ("linear_proj", "linear_fc2")
RANK, ALPHA = 4, 8
LORA = (
    f"--transformer-impl local --lora-r {RANK} --lora-alpha {ALPHA} --lr 0.0 --min-lr 0.0 "
    "--lora-target-modules linear_qkv linear_proj linear_fc1 linear_fc2"
)
TP2 = "--tensor-model-parallel-size 2"
ATTENTION = "--lora-target-modules linear_qkv linear_proj"
EP2 = "--expert-model-parallel-size 2 --micro-batch-size 1"
RECOMPUTE = "--recompute-granularity full --recompute-num-layers 1 --recompute-method"
CASES = {
    "one rank": (1, ""),
    "tp2": (2, TP2),
    "tp2 sp": (2, f"{TP2} --sequence-parallel"),
    "pp2": (2, "--pipeline-model-parallel-size 2"),
    "cp2 ring": (2, "--context-parallel-size 2 --context-parallel-algo megatron_cp_algo --use-flash-attn"),
    "cp2 ulysses two_pass": (
        2,
        "--context-parallel-size 2 --context-parallel-algo ulysses_cp_algo --pair-schedule two_pass",
    ),
    "pp2 two_pass": (2, "--pipeline-model-parallel-size 2 --pair-schedule two_pass --micro-batch-size 1"),
    "two_pass fused dp2": (2, "--pair-schedule two_pass --fused-logprob --use-distributed-optimizer"),
    "recompute": (1, f"{RECOMPUTE} uniform"),
    "recompute blocks, tp2 sp": (2, f"{RECOMPUTE} block {TP2} --sequence-parallel"),
}


def adapters(run):
    """{(base parameter, layer, place): {A or B: (value, gradient)}}, fp64; the learning rate 0 leaves the values."""
    found = {}
    for rank in run.ranks:
        for name, (layer, gradient, value) in rank["parameters"].items():
            module, kind = re.fullmatch(r"(.*)\.lora_([AB])\.default\.weight", name).groups()
            tensor, expert, expert_tensor = rank["place"]
            # what divides this parameter: ranks that differ in something else hold the same one
            divides = Place((0, 1), expert, expert_tensor) if ".experts." in module else Place(tensor)
            found.setdefault((f"{module}.weight", layer, divides), {})[kind] = value.double(), gradient.double()
    return found


def merged(parts, salt=0, family="llama"):
    """The dense weights with the adapters' products added, in Hugging Face's names."""
    params = {name: value.double().requires_grad_() for name, value in hf_params(salt, family).items()}
    # megatron_part moves numbers without changing them, so that its transpose moves them back
    total = sum(
        (megatron_part(params, name, layer, place, family) * (ALPHA / RANK * pair["B"][0] @ pair["A"][0])).sum()
        for (name, layer, place), pair in parts.items()
    )
    moved = torch.autograd.grad(total, params.values(), allow_unused=True)
    return {
        name: (param.detach() if part is None else param.detach() + part).requires_grad_()
        for (name, param), part in zip(params.items(), moved, strict=True)
    }


def wanted_gradients(parts, gradients, family="llama"):
    """{(base parameter, layer, place): {A or B: gradient}} from those of the dense weights."""
    wanted, whole = {}, {}
    for (name, layer, place), pair in parts.items():
        dense = ALPHA / RANK * megatron_part(gradients, name, layer, place, family)
        wanted[name, layer, place] = {"A": pair["B"][0].T @ dense, "B": dense @ pair["A"][0].T}
        # what the ranks that shard a layer hold whole: the adapter's side that the layer does not shard
        kind, shared = "B" if name.split(".")[-2] in ROW_PARALLEL else "A", (name, layer, place.expert)
        whole[shared] = kind, whole.get(shared, (kind, 0))[1] + wanted[name, layer, place][kind]
    for name, layer, place in wanted:
        kind, total = whole[name, layer, place.expert]
        wanted[name, layer, place][kind] = total
    return wanted


def check(run, parts, metrics, gradients, loss_tolerance=1e-6, family="llama", modules=4):
    """Compare the adapters' gradients with those that follow from the dense weights'."""
    assert all("lora_" in name for rank in run.ranks for name in rank["parameters"])
    assert run.logged("lm loss")[-1] == pytest.approx(metrics["loss"], rel=loss_tolerance)
    errors = {
        (*place, kind): ((parts[place][kind][1] - gradient).norm() / gradient.norm()).item()
        for place, both in wanted_gradients(parts, gradients, family).items()
        for kind, gradient in both.items()
    }
    assert len({(name, layer) for name, layer, *_ in errors}) == modules * LAYERS
    assert max(errors.values()) < 1e-5, errors


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_adapters(tmp_path, case):
    ranks, flags = CASES[case]
    run = train(tmp_path, PAIRS, f"{LORA} {flags}", ranks)
    parts = adapters(run)
    params = merged(parts)
    check(run, parts, *dense(params, params, PAIRS[:4]))


@pytest.mark.parametrize(("ranks", "flags"), [(2, TP2), (1, f"{RECOMPUTE} uniform")])
def test_dpo_exact(tmp_path, ranks, flags):
    run = train(tmp_path, PAIRS, f"{LORA} --dpo-exact {flags}", ranks, stage="dpo")
    parts = adapters(run)
    # the reference model of these runs has other weights, and adapters as the policy's
    reference = merged(parts, salt=1)
    wanted = dense(merged(parts), reference, PAIRS[:4], stage="dpo")
    # DPO's loss is made of differences between sums of many nats
    check(run, parts, *wanted, loss_tolerance=5e-6)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize(
    ("ranks", "flags", "modules"),
    [
        (1, "", 2 + 2 * EXPERTS),
        (2, f"{ATTENTION} {EP2}", 2),
        (4, f"{ATTENTION} {TP2} --sequence-parallel {EP2}", 2),
    ],
)
def test_models_with_experts(tmp_path, family, ranks, flags, modules):
    run = train(tmp_path, PAIRS, f"{LORA} --moe-token-dispatcher-type alltoall_seq {flags}", ranks, family=family)
    parts = adapters(run)
    params = merged(parts, family=family)
    check(run, parts, *dense(params, params, PAIRS[:4], family), family=family, modules=modules)
