"""Objectives that equal one another at a limit of their keys."""

import dataclasses

import pytest
import torch

from mindspeed_simpo.objectives import OBJECTIVES
from tests.pairs import PAIR, SEVERAL, loss_of


def _same(one, other, scale=1.0):
    """Loss and gradient by both sums of one objective are ``scale`` times those of the other."""
    results = []
    for objective in (one, other):
        leaves = SEVERAL.chosen_logprob.clone().requires_grad_(), SEVERAL.rejected_logprob.clone().requires_grad_()
        out = objective(dataclasses.replace(SEVERAL, chosen_logprob=leaves[0], rejected_logprob=leaves[1]))
        results.append(torch.stack([out.loss, *torch.autograd.grad(out.loss.sum(), leaves)]).detach())
    return torch.allclose(results[0], scale * results[1], rtol=1e-12, atol=1e-14)


def test_rainbowpo_without_the_reference_is_simpo_and_with_nothing_else_ln_dpo():
    keys = {"rainbowpo_beta": 3.0, "rainbowpo_gamma_beta_ratio": 0.4}
    simpo = loss_of(simpo_beta=3.0, gamma_beta_ratio=0.4)
    ln_dpo = loss_of("dpo", dpo_beta=3.0, dpo_length_norm=True)
    assert _same(loss_of("rainbowpo", rainbowpo_reference_mix=0.0, **keys), simpo)
    assert _same(loss_of("rainbowpo", rainbowpo_reference_mix=1.0, **keys), ln_dpo)
    assert not _same(loss_of("rainbowpo", rainbowpo_reference_mix=0.5, **keys), simpo)


def test_alphadpo_with_alpha_0_is_simpo():
    keys = {"alphadpo_beta": 3.0, "alphadpo_gamma_beta_ratio": 0.4}
    simpo = loss_of(simpo_beta=3.0, gamma_beta_ratio=0.4)
    assert _same(loss_of("alphadpo", alphadpo_alpha=0.0, **keys), simpo)
    assert not _same(loss_of("alphadpo", alphadpo_alpha=0.1, **keys), simpo)


def test_hinge_of_simpo_is_beta_times_repo():
    # 1 - beta (Dm - ratio) = beta (1 / beta + ratio - Dm): the ratio is RePO's margin minus 1 / beta
    for beta, margin in ((4.0, 0.5), (2.0, 0.5), (10.0, 0.3)):
        hinge = loss_of(simpo_loss_type="hinge", simpo_beta=beta, gamma_beta_ratio=margin - 1 / beta)
        assert _same(hinge, loss_of("repo", repo_margin=margin), scale=beta)
        assert not _same(hinge, loss_of("repo", repo_margin=margin))


@pytest.mark.parametrize("sign", [1, -1])
def test_alphapo_tends_to_simpo_linearly_in_alpha(sign):
    keys = {"alphapo_beta": 3.0, "alphapo_gamma_beta_ratio": 0.4}
    simpo = loss_of(simpo_beta=3.0, gamma_beta_ratio=0.4)(SEVERAL).loss

    def distance(alpha):
        return (loss_of("alphapo", alphapo_alpha=sign * alpha, **keys)(SEVERAL).loss - simpo).abs().max().item()

    assert _same(loss_of("alphapo", alphapo_alpha=0.0, **keys), loss_of(simpo_beta=3.0, gamma_beta_ratio=0.4))
    assert distance(1e-3) / distance(1e-4) == pytest.approx(10, rel=0.02)
    # the digits last where 1 - exp(-alpha m) has lost its own
    assert distance(1e-8) / distance(1e-4) == pytest.approx(1e-4, rel=0.02)
    assert distance(1e-300) < 1e-14


def test_the_gap_is_what_alphadpo_tracks():
    # 0.5 - (-1.25)
    assert OBJECTIVES["alphadpo"].tracked(PAIR).tolist() == [1.75]
