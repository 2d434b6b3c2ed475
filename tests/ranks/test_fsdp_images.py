"""Images with ``backend: fsdp`` against transformers in fp64, one row at a time: loss and every gradient."""

import pytest

from tests.images import make_image_model, make_image_pairs
from tests.oracle_objectives import Options
from tests.ranks.fsdp_images import by_transformers, fsdp_steps
from tests.ranks.parity import worst_error

pytestmark = pytest.mark.newest_core
FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "llava")
VOCABULARY = 500
SEQ = {"seq_length": 256}
BUDGET = {"max_tokens_per_micro_batch": 200}


def check(found, expected, *, frozen):
    loss, grads = expected
    assert found["losses"][0] == pytest.approx(loss, rel=1e-6)
    if frozen:
        grads = {name: grad for name, grad in grads.items() if "language_model" in name or "lm_head" in name}
        assert all("language_model" in name or "lm_head" in name for name in found["grads"])
    # biases of keys have none, but for the rounding of softmax, which some towers compute in fp32 in any case
    zero = [name for name, grad in grads.items() if grad.norm() < 1e-6]
    for name in zero:
        assert found["grads"][name].norm() < 1e-5, name
    kept = {name: grad for name, grad in grads.items() if name not in zero}
    error, name = worst_error({name: found["grads"][name] for name in kept}, kept)
    assert error < 1e-5, name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family(tmp_path, family):
    folder = make_image_model(tmp_path / "model", family)
    pairs = make_image_pairs(8, VOCABULARY)
    expected = by_transformers(folder, pairs, Options())
    for form in ("padded", "packed", "prefix_shared"):
        found = fsdp_steps(
            folder,
            [pairs],
            batching=form,
            fused_logprob=form != "packed",
            **SEQ,
            **({} if form == "padded" else BUDGET),
        )
        assert found["batching"] == form
        check(found, expected, frozen=True)
    for frozen in (True, False):
        found = fsdp_steps(folder, [pairs], ranks=2, batching="prefix_shared", freeze_vision=frozen, **SEQ, **BUDGET)
        check(found, expected, frozen=frozen)
