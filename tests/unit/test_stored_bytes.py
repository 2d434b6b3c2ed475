"""Bytes that the schedules save for the backward and that the fused head allocates, counted from the tensors."""

import pytest
import torch

from scripts.engine import build_engine
from scripts.tensor_bytes import PeakBytes, StoredBytes
from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.launcher import run_ranks


def test_counters_count():
    kept, parameter = torch.ones(1000, requires_grad=True), torch.ones(1000, requires_grad=True)
    with StoredBytes([parameter]) as stored:
        product = kept.exp() * parameter  # exp keeps its result, the product keeps it too
        assert stored.now == stored.peak == 4000
        product.sum().backward()
        del product
    assert stored.now == 0
    with PeakBytes([kept]) as made, torch.no_grad():
        for _ in range(3):
            double = kept * 2
            half = double[:500]
            del double, half
        kept.view(-1)
    assert made.peak == made.largest == 4000


def _stored_on_rank(folder, pairs, schedules):
    from megatron.core import tensor_parallel

    from mindspeed_simpo.batch import TokenizedPair
    from mindspeed_simpo.config.config import Config
    from mindspeed_simpo.config.validation import make_layout
    from mindspeed_simpo.data.batching import Batching
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.parallel import initialize

    device = open_device("cpu")
    pairs = [TokenizedPair(*pair, source="") for pair in pairs]
    peaks = []
    for schedule in schedules:
        config = Config(
            **{"model_name_or_path": folder, "data_path": "x", "batching": "padded", **schedule},
            global_batch_size=len(pairs),
            micro_batch_size=len(pairs),
        )
        [batch] = Batching.of(config).micro_batches(pairs, list(range(len(pairs))))
        if not peaks:
            groups = initialize(make_layout(config, 1), device)
            tensor_parallel.model_parallel_cuda_manual_seed(1)
        models, runner = build_engine(config, device, groups)
        with StoredBytes(models[0].parameters()) as stored:
            runner.forward_backward([batch, batch], len(pairs))
        peaks.append(stored.peak)
    return peaks


@pytest.mark.parametrize("recompute", [False, True])
def test_two_pass_keeps_half_and_split_keeps_all(tmp_path, recompute):
    folder = make_checkpoint(tmp_path, layers=4, vocab_size=512)
    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    schedules = [{"pair_schedule": name, **(full if recompute else {})} for name in ("concat", "split", "two_pass")]
    prompt, response = list(range(64)), list(range(64))
    [(concat, split, two_pass)] = run_ranks(
        _stored_on_rank, 1, str(folder), [(prompt, response, response[::-1])] * 2, schedules
    )
    assert two_pass <= 0.52 * concat
    if recompute:
        # both forwards' layer inputs are there, but a layer is recomputed for one of them at a time
        assert two_pass < split < concat
    else:
        # what each forward keeps for itself, such as rotary angles, is there twice
        assert concat * 0.99 <= split <= concat * 1.1


def test_two_pass_does_not_pad_the_shorter_half(tmp_path):
    folder = make_checkpoint(tmp_path, layers=4, vocab_size=512)
    schedules = [{"pair_schedule": name} for name in ("concat", "two_pass")]
    [prompt_ids, chosen_ids, _] = make_token_pairs(1, 512, max_prompt=4)[0]
    short_first = [(prompt_ids, chosen_ids[:1], list(range(100)))]
    [(concat, two_pass)] = run_ranks(_stored_on_rank, 1, str(folder), short_first, schedules)
    assert two_pass <= 0.52 * concat


def test_two_pass_of_packed_rows_keeps_half_where_one_side_is_longer(tmp_path):
    folder = make_checkpoint(tmp_path, layers=4, vocab_size=512)
    schedules = [{"batching": "packed", "pair_schedule": name} for name in ("concat", "two_pass")]
    # chosen answers have 280 tokens together, rejected ones 80
    lengths = [(20, 100, 20), (60, 90, 10), (20, 60, 40), (30, 30, 10)]
    pairs = [tuple(list(range(length)) for length in pair) for pair in lengths]
    [(concat, two_pass)] = run_ranks(_stored_on_rank, 1, str(folder), pairs, schedules)
    assert two_pass <= 0.52 * concat


def test_packed_rows_keep_what_their_tokens_need(tmp_path):
    folder = make_checkpoint(tmp_path, layers=4, vocab_size=512)
    prompt, short, long = list(range(160)), list(range(32)), list(range(96))
    # tokens: padded 4 x 256, packed 2 x (160 + 32 + 160 + 96), shared 2 x (160 + 32 + 96)
    schedules = [{"batching": name} for name in ("padded", "packed", "prefix_shared")]
    [(padded, packed, shared)] = run_ranks(_stored_on_rank, 1, str(folder), [(prompt, short, long)] * 2, schedules)
    # a token of a packed row keeps angles of its own, and joined contexts; no mask of any document is among them
    assert packed / 896 < 1.2 * padded / 1024
    assert packed < padded
    assert shared < 0.72 * packed


VOCAB, TOKENS, HIDDEN, CHUNK = 152_000, 96, 8, 8


def _head_on_rank():
    from mindspeed_simpo.config.layout import Layout
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.loss.head import ResponseHead
    from mindspeed_simpo.parallel import initialize

    groups = initialize(Layout(), open_device("cpu"))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator)
    targets = torch.randint(VOCAB, (TOKENS,), generator=generator)
    upstream = torch.randn(TOKENS, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator).requires_grad_()
    counts, results = [], []
    for chunk_tokens in (None, CHUNK):
        head = ResponseHead(
            groups.tensor, groups.context, vocab_size=VOCAB, sum_dtype=torch.float64, chunk_tokens=chunk_tokens
        )
        leaf = hidden.clone().requires_grad_()
        weight.grad = None
        with PeakBytes([leaf, weight]) as made, StoredBytes([leaf, weight]) as stored:
            logprobs = head.token_logprobs(leaf, weight, targets)
            logprobs.backward(upstream)
        counts.append((made.peak, made.largest, stored.peak))
        results.append((logprobs.detach(), leaf.grad, weight.grad))
    errors = [float((one - other).norm() / other.norm()) for one, other in zip(*results, strict=True)]
    return counts, errors


def test_fused_head_makes_nothing_of_tokens_by_vocabulary():
    [(counts, errors)] = run_ranks(_head_on_rank, 1)
    whole = TOKENS * VOCAB * 4
    (plain_peak, plain_largest, plain_stored), (peak, largest, stored) = counts
    assert plain_largest == whole
    assert plain_stored >= whole
    assert plain_peak >= 2 * whole
    gradient = VOCAB * HIDDEN * 4
    assert largest == max(gradient, CHUNK * VOCAB * 4)
    assert peak - gradient < 1.1 * CHUNK * VOCAB * 4
    assert stored < 10 * TOKENS * 8
    assert max(errors) < 1e-6
