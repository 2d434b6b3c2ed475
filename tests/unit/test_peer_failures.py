"""Errors of collectives by their messages: which of them say that a peer is lost."""

import pytest

from mindspeed_simpo.errors import PeerLostError
from mindspeed_simpo.parallel.lost_ranks import is_peer_failure, naming_lost_ranks

ERROR = "\n[ERROR] 2026-01-05-11:59:30 (PID:7277, Device:1, RankID:1) "
HCCL = {
    "a call": f"operator():build/ProcessGroupHCCL.cpp:2853 HCCL function error: HcclAllReduce(...), error code is "
    f"9 {ERROR}ERR02200 DIST call hccl api failed..\n",
    "the watchdog": "[Rank 1] Watchdog caught collective operation timeout: WorkHCCL(SeqNum=7, OpType=ALLREDUCE, "
    "Timeout(ms)=600000) ran for 600123 milliseconds before timing out.",
    "a query": f"{ERROR}ERR02005 DIST internal error",
    "a set-up": "[1] is setting up HCCL communicator and retrieving hcclUniqueId from [0] via c10d key-value store by "
    "key '0', but store->get('0') got error: Connection reset by peer",
    "a synchronisation": "ACL stream synchronize failed, error code:507048\nEI0002: [PID: 7277] The wait execution of "
    "the Notify register times out. Reason: The Notify register has not received the record from remote rank [1].",
    "a remote error": "SUSPECT REMOTE ERROR happened with workEnqueue.",
}


@pytest.mark.parametrize("text", HCCL.values(), ids=HCCL)
def test_failures_of_hccl_are_those_of_peers(text):
    assert is_peer_failure(RuntimeError(text))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(f"NPU out of memory. Tried to allocate 2.00 GiB{ERROR}ERR00006 PTA memory error"),
        RuntimeError(f"call aclnnMatmul failed{ERROR}ERR01100 OPS call acl api failed"),
        ValueError("HCCL function error"),
    ],
)
def test_other_errors_are_not(error):
    assert not is_peer_failure(error)


def test_the_message_begins_with_the_first_line_that_says_something():
    with (
        pytest.raises(PeerLostError, match=r"the ranks lost each other: .*ERR02005 DIST internal error"),
        naming_lost_ranks(),
    ):
        raise RuntimeError(HCCL["a query"])
