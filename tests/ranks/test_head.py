"""Response log-probabilities under tensor parallelism: value and gradient against a dense fp64 softmax."""

import pytest
import torch

from mindspeed_simpo.batch import IGNORE_INDEX, ScoredTokens
from tests.ranks.launcher import run_ranks

pytestmark = pytest.mark.newest_core

HIDDEN, SEQ, ROWS = 12, 9, 6


def _problem(vocab_size, padded):
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(SEQ, ROWS, HIDDEN, generator=generator, dtype=torch.float64)
    weight = torch.zeros(padded, HIDDEN, dtype=torch.float64)
    weight[:vocab_size] = torch.randn(vocab_size, HIDDEN, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocab_size, (ROWS, SEQ), generator=generator)
    shard = padded // 4
    targets[0, :5] = torch.tensor([0, shard, 2 * shard, min(3 * shard, vocab_size - 1), vocab_size - 1])
    targets[1, :3] = torch.tensor([shard - 1, 0, 2 * shard - 1])
    targets[2] = IGNORE_INDEX  # a filler row
    targets[3, 1:] = IGNORE_INDEX  # a one-token response
    targets[4, :4] = IGNORE_INDEX
    targets[5, 6:] = IGNORE_INDEX
    upstream = torch.linspace(-1.0, 2.0, ROWS, dtype=torch.float64)
    return hidden, weight, targets, upstream


def _dense(vocab_size, padded, softcap=None):
    hidden, weight, targets, upstream = _problem(vocab_size, padded)
    hidden.requires_grad_()
    weight.requires_grad_()
    logits = hidden.transpose(0, 1) @ weight[:vocab_size].T
    logprobs = torch.log_softmax(logits if softcap is None else softcap * torch.tanh(logits / softcap), dim=-1)
    scored = targets != IGNORE_INDEX
    token = logprobs.gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    sums = torch.where(scored, token, 0.0).sum(dim=1)
    sums.backward(upstream)
    return sums.detach(), hidden.grad, weight.grad


def _heads_on_rank(tensor, variants):
    """``_head`` of each variant."""
    from mindspeed_simpo.config.layout import Layout
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.parallel import initialize

    groups = initialize(Layout(tensor=tensor), open_device("cpu"))
    return [_head(groups, *variant) for variant in variants]


def _head(groups, vocab_size, padded, chunk_tokens, dtype=torch.float32, sequence_parallel=False, softcap=None):
    """Sums and both gradients; chunk_tokens None is the head that holds all logits."""
    from mindspeed_simpo.loss.head import ResponseHead

    rank, ranks = groups.tensor.rank(), groups.tensor.size()
    hidden, weight, targets, upstream = _problem(vocab_size, padded)
    if sequence_parallel:
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, 0, 0, -SEQ % ranks)).chunk(ranks)[rank]
        targets = torch.nn.functional.pad(targets, (0, -SEQ % ranks), value=IGNORE_INDEX)
    hidden = hidden.to(dtype, copy=True).requires_grad_()
    shard = weight.to(dtype).chunk(ranks)[rank].clone().requires_grad_()
    head = ResponseHead(
        groups.tensor,
        groups.context,
        vocab_size=vocab_size,
        sum_dtype=torch.float64,
        softcap=softcap,
        chunk_tokens=chunk_tokens,
        sequence_parallel=sequence_parallel,
    )
    sums = head(hidden, shard, ScoredTokens.of(targets))
    sums.backward(upstream.float())
    return [result.detach().float().numpy() for result in (sums, hidden.grad, shard.grad)]


def _check(ranks, vocab_size, padded, *, sequence_parallel=False, softcap=None, exact=1e-6):
    sums, hidden_grad, weight_grad = _dense(vocab_size, padded, softcap)
    ranks = [tuple(map(torch.from_numpy, result)) for result in ranks]
    for rank_sums, _, _ in ranks:
        torch.testing.assert_close(rank_sums.double(), sums, rtol=exact, atol=exact)
    hidden_grads = [result[1] for result in ranks]
    for rank_hidden_grad in [torch.cat(hidden_grads)[:SEQ]] if sequence_parallel else hidden_grads:
        assert (rank_hidden_grad - hidden_grad).norm() < exact * hidden_grad.norm()
    gathered = torch.cat([result[2] for result in ranks])
    assert (gathered - weight_grad).norm() < exact * weight_grad.norm()
    assert not gathered[vocab_size:].any(), "a padded id received a gradient"


CHUNKS = [None, 1, 4, 1000]
"""Held whole, or by chunks: of one token, of some that do not divide the tokens, of more than there are."""


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_value_and_gradient_equal_a_dense_softmax(tensor):
    # none, some and more than a whole shard of padding
    vocabularies = [(32, 32), (29, 32), (25, 36)]
    variants = [(*sizes, chunk) for sizes in vocabularies for chunk in CHUNKS]
    by_rank = run_ranks(_heads_on_rank, tensor, tensor, variants)
    for variant, ranks in zip(variants, zip(*by_rank, strict=True), strict=True):
        _check(ranks, *variant[:2])


def test_sequence_parallel_ranks_hold_parts_of_the_hidden_states():
    variants = [(29, 32, chunk, torch.float32, True) for chunk in CHUNKS]
    for ranks in zip(*run_ranks(_heads_on_rank, 2, 2, variants), strict=True):
        _check(ranks, 29, 32, sequence_parallel=True)


@pytest.mark.parametrize("tensor", [1, 2])
def test_capped_logits(tensor):
    variants = [(29, 32, chunk, torch.float32, False, 0.7) for chunk in CHUNKS]
    for ranks in zip(*run_ranks(_heads_on_rank, tensor, tensor, variants), strict=True):
        _check(ranks, 29, 32, softcap=0.7)


def test_bfloat16_heads_agree():
    variants = [(29, 32, chunk, torch.bfloat16) for chunk in CHUNKS]
    for ranks in zip(*run_ranks(_heads_on_rank, 2, 2, variants), strict=True):
        _check(ranks, 29, 32, exact=0.02)


def _nothing_scored_on_rank():
    from mindspeed_simpo.config.layout import Layout
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.loss.head import ResponseHead
    from mindspeed_simpo.parallel import initialize

    groups = initialize(Layout(tensor=2), open_device("cpu"))
    hidden = torch.randn(SEQ, ROWS, HIDDEN, requires_grad=True)
    weight = torch.randn(16, HIDDEN, requires_grad=True)
    targets = torch.full((ROWS, SEQ), IGNORE_INDEX)
    head = ResponseHead(groups.tensor, groups.context, vocab_size=32, sum_dtype=torch.float64, chunk_tokens=4)
    sums = head(hidden, weight, ScoredTokens.of(targets))
    sums.sum().backward()
    return [tensor.detach().abs().sum().item() for tensor in (sums, hidden.grad, weight.grad)]


def test_no_response_token_at_all():
    assert run_ranks(_nothing_scored_on_rank, 2) == [[0.0, 0.0, 0.0]] * 2


def _main_grad_on_rank(dtype, awaited):
    from mindspeed_simpo.config.layout import Layout
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.loss.head import ResponseHead
    from mindspeed_simpo.parallel import initialize

    groups = initialize(Layout(), open_device("cpu"))
    hidden, weight, targets, upstream = _problem(29, 32)
    weight = torch.nn.Parameter(weight.to(dtype))
    weight.main_grad = torch.ones(weight.shape)
    weight.grad_added_to_main_grad = False  # as megatron's DDP marks it
    head = ResponseHead(
        groups.tensor,
        groups.context,
        vocab_size=29,
        sum_dtype=torch.float64,
        chunk_tokens=4,
        weight_grad_awaited=awaited,
    )
    sums = head(hidden.to(dtype), weight, ScoredTokens.of(targets))
    sums.backward(upstream.float())
    return weight.main_grad.numpy(), None if weight.grad is None else bool(weight.grad.any())


@pytest.mark.parametrize("awaited", [False, True])
@pytest.mark.parametrize(("dtype", "exact"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
def test_weight_gradient_is_added_to_main_grad(dtype, exact, awaited):
    [(main_grad, grad)] = run_ranks(_main_grad_on_rank, 1, dtype, awaited)
    expected = _dense(29, 32)[2] + 1
    assert (torch.from_numpy(main_grad) - expected).norm() < exact * expected.norm()
    assert grad is (False if awaited else None), "a second gradient would be added by DDP's hook"
