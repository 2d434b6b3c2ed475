"""The communication of the loss path, counted at the process groups, equals the formula."""

import pytest

from tests.ranks.launcher import run_ranks

ROWS, SEQ, HIDDEN, VOCAB = 4, 16, 8, 32
FP32, FP64 = 4, 8


def _loss_path(tensor, context, sequence_parallel):
    import torch

    from mindspeed_simpo.batch import IGNORE_INDEX, ScoredTokens
    from mindspeed_simpo.config.layout import Layout
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.loss.head import ResponseHead
    from mindspeed_simpo.parallel import initialize
    from tests.ranks.traffic import Traffic

    groups = initialize(Layout(tensor=tensor, context=context), open_device("cpu"))
    positions = SEQ // context
    targets = torch.randint(VOCAB, (ROWS, positions))
    targets[:, ::2] = IGNORE_INDEX
    local = positions // tensor if sequence_parallel else positions
    hidden = torch.randn(local, ROWS, HIDDEN, requires_grad=True)
    weight = torch.randn(VOCAB // tensor, HIDDEN, requires_grad=True)
    head = ResponseHead(
        groups.tensor, groups.context, vocab_size=VOCAB, sum_dtype=torch.float64, sequence_parallel=sequence_parallel
    )
    with Traffic(tensor=groups.tensor, context=groups.context) as forward:
        sums = head(hidden, weight, ScoredTokens.of(targets))
    with Traffic(tensor=groups.tensor, context=groups.context) as backward:
        sums.sum().backward()
    counted = [
        {key: (traffic.calls[key], traffic.bytes[key]) for key in traffic.calls} for traffic in (forward, backward)
    ]
    return counted, int((targets != IGNORE_INDEX).sum())


@pytest.mark.parametrize(("tensor", "context"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_the_loss_path_sends_three_numbers_a_token_and_one_a_row(tensor, context):
    for (forward, backward), tokens in run_ranks(_loss_path, tensor * context, tensor, context, False):
        expected = {}
        # also where the group is one rank: the MAX and the SUM are then free
        expected["allreduce", "tensor"] = (2, tokens * FP32 + 2 * tokens * FP32)
        if context > 1:
            expected["allreduce", "context"] = (1, ROWS * FP64)
        assert forward == expected
        assert backward == ({("allreduce", "tensor"): (1, tokens * HIDDEN * FP32)} if tensor > 1 else {})


def test_sequence_parallel_gathers_hidden_states_once_and_scatters_their_gradient_once():
    for (forward, backward), tokens in run_ranks(_loss_path, 2, 2, 1, True):
        whole = SEQ * ROWS * HIDDEN * FP32
        assert forward == {
            ("allgather_base", "tensor"): (1, whole),
            ("allreduce", "tensor"): (2, 3 * tokens * FP32),
        }
        assert backward == {("reduce_scatter_base", "tensor"): (1, whole)}


def _metrics():
    import torch.distributed as dist

    from mindspeed_simpo.config.layout import Layout
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.objectives import OBJECTIVES
    from mindspeed_simpo.parallel import initialize
    from mindspeed_simpo.training.metrics import MetricSums
    from tests.ranks.traffic import Traffic

    device = open_device("cpu")
    groups = initialize(Layout(data=2), device)
    sums = MetricSums(OBJECTIVES["simpo"], groups, device)
    with Traffic(world=dist.group.WORLD) as traffic:
        sums.reduce(sums.local([]))
    return dict(traffic.calls), dict(traffic.bytes), sums.size


def test_metrics_take_one_collective():
    for calls, sizes, num_sums in run_ranks(_metrics, 2):
        assert calls == {("allreduce", "world"): 1}
        assert sizes == {("allreduce", "world"): num_sums * FP64}
