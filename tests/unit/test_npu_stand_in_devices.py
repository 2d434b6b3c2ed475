"""Devices, redirections and groups of the stand-in for torch_npu: what torch_npu and HCCL say of each input.

``tests/fakes/torch_npu`` names the source file of each rule.
"""

import os
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from mindspeed_simpo.parallel.collectives import _reduce_scatter, _SumWithIdentityBackward
from tests.unit.conftest import FAKES

DOUBLE = torch.float64


@pytest.fixture
def hccl(torch_npu, monkeypatch):
    """A world of one rank that stands for HCCL's, and a group for which gloo was asked."""
    monkeypatch.setattr(dist, "new_group", dist.new_group)
    for name in torch_npu.hccl.METHODS:
        if hasattr(dist.ProcessGroup, name):  # put back after the test
            monkeypatch.setattr(dist.ProcessGroup, name, getattr(dist.ProcessGroup, name))
    monkeypatch.setattr(dist.ProcessGroup, "_get_backend", dist.ProcessGroup._get_backend)
    store = dist.HashStore()
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch_npu.hccl.make_groups()
    yield dist.new_group(backend="gloo")
    dist.destroy_process_group()


COLLECTIVES = {
    "all_reduce": dist.all_reduce,
    "reduce": lambda tensor: dist.reduce(tensor, 0),
    "reduce_scatter": lambda tensor: _reduce_scatter(torch.empty_like(tensor), tensor),
    "all_gather": lambda tensor: dist.all_gather([torch.empty_like(tensor)], tensor),
    "broadcast": lambda tensor: dist.broadcast(tensor, 0),
}
REDUCED = {torch.int8, torch.int32, torch.int64, torch.float16, torch.float32}
OTHERS = {torch.bool, torch.uint8, DOUBLE}


@pytest.mark.parametrize("name", COLLECTIVES)
def test_dtypes_of_collectives(name, hccl):  # noqa: ARG001
    copies = name in ("all_gather", "broadcast")
    refused = set() if copies else {DOUBLE} if name in ("all_reduce", "reduce") else OTHERS
    for dtype in REDUCED | (OTHERS - {torch.bool}) | ({torch.bool} if not copies else set()):
        tensor = torch.ones(4, dtype=dtype)
        if dtype in refused:
            with pytest.raises(RuntimeError, match="Unsupported data type"):
                COLLECTIVES[name](tensor)
        else:
            COLLECTIVES[name](tensor)
            assert torch.equal(tensor, torch.ones(4, dtype=dtype))


def test_what_else_hccl_refuses(hccl):
    with pytest.raises(RuntimeError, match="must be contiguous"):
        dist.all_reduce(torch.ones(3, 4).t())
    with pytest.raises(RuntimeError, match="bitwise"):
        dist.all_reduce(torch.ones(3, dtype=torch.int32), op=dist.ReduceOp.BOR)
    with pytest.raises(RuntimeError, match="does not support gather"):
        dist.gather_object("anything", [None])
    with pytest.raises(RuntimeError, match="Scalar tensors"):
        dist.all_to_all_single(torch.ones(()), torch.ones(()))
    dist.all_reduce(torch.ones(3, dtype=DOUBLE), group=hccl)
    dist.gather_object("anything", [None], group=hccl)


HALF = torch.bfloat16
PRODUCTS = [
    ("fp16 or bf16", {"dtype": torch.float32}),
    ("inputs of 2 axes", {"left": (4, 1, 256)}),
    ("inputs that are not empty", {"left": (0, 256)}),
    ("one summed axis", {"left": (4, 257)}),
    ("256 to 65534 elements", {"left": (4, 255), "right": (255, 8)}),
    ("256 to 65534 elements", {"left": (4, 65535), "right": (65535, 8)}),
    ("a contiguous left input", {"left": (256, 4), "turn": "left"}),
    ("a contiguous right input", {"right": (256, 9), "cut": True}),
    ("no bias", {"bias": torch.zeros(8, dtype=HALF)}),
    ("comm_turn 0", {"comm_turn": 1}),
    ("a name from get_hccl_comm_name", {"hcom": "another"}),
    ("2, 4 or 8 ranks", {"right": (8, 256), "turn": "right"}),
]


@pytest.mark.parametrize("operator", ["npu_all_gather_base_mm", "npu_mm_reduce_scatter_base"])
@pytest.mark.parametrize(("words", "options"), PRODUCTS)
def test_products_refuse(words, options, operator, hccl, torch_npu):  # noqa: ARG001
    options = {"left": (4, 256), "right": (256, 8), "dtype": HALF, "turn": "", "cut": False, **options}
    hcom = options.pop("hcom", dist.group.WORLD._get_backend(torch.device("cpu")).get_hccl_comm_name(0))
    shapes, dtype, turn = [options.pop("left"), options.pop("right")], options.pop("dtype"), options.pop("turn")
    left, right = (torch.ones(shape, dtype=dtype) for shape in shapes)
    left, right = left.t() if turn == "left" else left, right.t() if turn == "right" else right
    right = right[:, :8] if options.pop("cut") else right
    with pytest.raises(RuntimeError, match=words):
        getattr(torch_npu, operator)(left, right, hcom, 1, **options)


def test_the_name_of_a_communicator(hccl):
    with pytest.raises(RuntimeError, match="rank in the world, found 1"):
        dist.group.WORLD._get_backend(torch.device("cpu")).get_hccl_comm_name(1)
    assert not hasattr(hccl._get_backend(torch.device("cpu")), "get_hccl_comm_name")
    backend = dist.group.WORLD._get_backend(torch.device("cpu"))
    assert backend.get_hccl_comm_name(0, False) == ""
    assert backend.get_hccl_comm_name(0) == backend.get_hccl_comm_name(0, False) != ""


def test_the_sum_over_ranks_takes_any_strides(hccl):  # noqa: ARG001
    value = torch.randn(3, 4).t()
    torch.testing.assert_close(_SumWithIdentityBackward.apply(value, dist.group.WORLD), value)


def test_devices_are_numbers(torch_npu):
    assert torch_npu.npu.current_device() == 0
    torch_npu.npu.set_device("cuda:3")
    assert torch_npu.npu.current_device() == 3
    assert torch_npu.npu.default_generators[3] is torch.default_generator
    with pytest.raises(RuntimeError, match="8 of 8 devices"):
        torch_npu.npu.set_device(8)


TRANSFERRED = """
import torch
from torch_npu.contrib import transfer_to_npu

host = torch.ones(3)
pinned = host.pin_memory()
host.zero_()
assert pinned.tolist() == [1, 1, 1], "a pinned tensor is a copy"
assert host.is_cuda and host.is_npu
assert type(torch.cuda.current_device()) is int
assert torch.zeros(2, device=torch.cuda.current_device()).tolist() == [0, 0]
assert torch.cuda.DoubleTensor([1]).dtype == torch.float32
torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
for group, dtype in ((None, torch.float32), (torch.distributed.new_group(backend="gloo"), torch.float64)):
    torch.distributed.all_reduce(torch.ones(3, dtype=dtype), group=group)
for group in (None, torch.distributed.new_group()):
    try:
        torch.distributed.all_reduce(torch.ones(3, dtype=torch.float64), group=group)
    except RuntimeError as error:
        assert "Unsupported data type" in str(error)
    else:
        raise AssertionError("HCCL does not add float64")
torch.distributed.destroy_process_group()
"""


def test_transfer_to_npu():
    """In a process of its own, for it patches torch."""
    environment = {**os.environ, "PYTHONPATH": str(FAKES)}
    process = subprocess.run(
        [sys.executable, "-c", TRANSFERRED], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert process.returncode == 0, process.stderr
