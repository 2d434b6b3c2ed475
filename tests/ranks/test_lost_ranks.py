"""After a failed collective the ranks determine which ranks are missing."""

import time

import pytest

from tests.ranks.launcher import run_ranks

pytestmark = pytest.mark.newest_core


def _one_hangs(hanging):
    import datetime

    import torch
    import torch.distributed as dist

    from mindspeed_simpo.parallel.lost_ranks import unresponsive_ranks

    group = dist.new_group(timeout=datetime.timedelta(seconds=2))
    if dist.get_rank() == hanging:
        time.sleep(6)
        return None
    begin = time.monotonic()
    with pytest.raises(RuntimeError):
        dist.all_reduce(torch.ones(1), group=group)
    silent = unresponsive_ranks(grace_s=2.0)
    return silent, time.monotonic() - begin


def test_the_rank_that_hangs_is_named_by_all_others():
    results = run_ranks(_one_hangs, 3, 1)
    for rank in (0, 2):
        silent, seconds = results[rank]
        assert silent == [1]
        assert seconds < 10
