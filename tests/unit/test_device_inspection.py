"""What a device did: its profiler's file on NPUs, the warnings of the synchronisation debug mode, kinds by name."""

import warnings

import pytest
import torch

from mindspeed_simpo.device import Device
from mindspeed_simpo.device.inspection import read_kernel_details, waits_of_host
from scripts.device_report import tables, verdict
from scripts.device_report.ranks import LAYOUTS
from scripts.device_report.rates import device_kind, known_kind, peak_flops
from scripts.device_report.sections import RANKS, of_ranks

DETAILS = """Step Id,Device_id,Name,Type,Accelerator Core,Start Time(us),Duration(us),Wait Time(us)
0,0,aclnnFlashAttentionScore_1,FlashAttentionScore,MIX_AIC,"10.1\t",30.5,0
0,0,aclnnFlashAttentionScore_2,FlashAttentionScore,MIX_AIC,"50.1\t",29.5,0
0,0,hcom_allReduce__1,N/A,HCCL,"90.0\t",5,0
"""


def test_kernels_of_an_npu(tmp_path):
    path = tmp_path / "kernel_details.csv"
    path.write_text(DETAILS)
    found = read_kernel_details(path)
    assert [(each.name, each.calls) for each in found.kernels] == [("FlashAttentionScore", 2), ("hcom_allReduce__1", 1)]
    assert found.kernels[0].seconds == pytest.approx(60e-6)


def test_waits_are_counted_by_their_place(monkeypatch):
    modes = ["default"]
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with waits_of_host(Device("cuda", torch.device("cuda", 0)), package="unit") as found:
        for _ in range(2):
            warnings.warn("called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1)
        warnings.warn("Synchronization debug mode is a prototype feature", UserWarning, stacklevel=1)
        warnings.warn("another", UserWarning, stacklevel=1)
    assert modes == ["default", "warn", "default"]
    [(place, count)] = found.places.items()
    assert count == 2
    assert place.startswith("test_device_inspection.py:")
    assert place.endswith("of test_waits_are_counted_by_their_place")


@pytest.mark.parametrize(
    ("device", "product", "gib", "kind", "peak"),
    [
        ("npu", "Ascend910B3", 64, "910B-64GB", 295e12),
        ("npu", "Ascend910B4", 32, "910B-32GB", 264e12),
        ("npu", "Ascend910_9391", 64, "A3", 354e12),
        ("cuda", "NVIDIA H100 80GB HBM3", 80, "H100", 989e12),
        ("cuda", "NVIDIA H200", 141, "H200", 989e12),
        ("cuda", "NVIDIA GH200 480GB", 96, None, 989e12),
        ("cuda", "NVIDIA A100-SXM4-80GB", 80, None, 312e12),
        ("cuda", "NVIDIA GeForce RTX 4090", 24, None, None),
        ("cpu", None, None, None, None),
    ],
)
def test_products(device, product, gib, kind, peak):
    memory = gib and gib * 2**30
    found = known_kind(device, product, memory)
    assert (found and found.name) == kind
    assert peak_flops(device, product, memory) == peak


def test_the_record_for_plan_has_the_rates_that_were_measured():
    facts = {"device": "cuda", "product": "NVIDIA H100 80GB HBM3", "memory_bytes": 80 * 2**30, "devices": 4}
    rates = {"matmul_flops_bf16": 700e12, "matmul_flops_fp32": 50e12, "attention_flops": 300e12}
    rates |= {"memory_bytes_per_s": 2e12, "optimizer_bytes_per_s": 2e12, "operator_s": 4e-6, "layer_host_s": 3e-4}
    rates |= {"experts_host_s": 1e-4}
    alone = device_kind(facts, rates)
    assert alone.matmul_flops(bf16=True) == pytest.approx(700e12)
    assert alone.matmul_flops(bf16=False) == pytest.approx(50e12)
    assert alone.attention_flops(bf16=True) == pytest.approx(300e12)
    assert alone.bf16_flops == 989e12
    assert alone.inside.bytes_per_s == 450e9, "the links of the nearest kind"
    assert "those of H100" in alone.notes
    linked = device_kind(facts, rates, {"latency_s": 2e-6, "bytes_per_s": 300e9, "slower": {"send": 2.0}})
    assert linked.inside.bytes_per_s == 300e9
    assert linked.outside == alone.outside


def test_ranks_that_a_host_can_have():
    def named(device, devices):
        return [(section.name, section.ranks) for section in of_ranks(device, devices)]

    assert tuple(LAYOUTS) == RANKS
    assert named("cpu", 0) == [("ranks_2", 2)]
    assert named("cuda", 1) == [("one_device_nccl", 2), ("one_device_gloo", 2)]
    assert named("npu", 8) == [("ranks_2", 2), ("ranks_4", 4), ("ranks_8", 8)]


def _result(*rows, status="done", optional=False):
    return verdict.Result("", "", True, optional, status, rows=list(rows))


def test_errors_that_are_not_numbers_are_shown():
    row = {"case": "a", "dtype": "float32", "of": "value", "error": float("nan"), "bound": 1e-5, "holds": False}
    shown = "".join(tables.comparisons([row, {**row, "case": "b", "error": 1e-6, "holds": True}]))
    assert "width:100.0%" in shown
    assert "width:nan" not in shown
    assert "NO" in shown


def test_the_verdict():
    good = {"case": "a", "dtype": "float32", "of": "value", "error": 1e-7, "bound": 1e-5, "holds": True}
    bad = {**good, "error": float("nan"), "holds": False}
    crashed = {"case": "b", "dtype": "float32", "crashed": "Traceback\nRuntimeError: no", "holds": False}
    refused = {"case": "c", "dtype": "float32", "refused": "no operator"}

    def said(**results):
        return verdict.verdict(results)["numerics"]

    assert said(models=_result(good, refused)) == "held"
    assert said(models=_result(good, bad)) == "did not hold"
    assert said(models=_result(good, crashed)) == "did not hold"
    assert said(models=_result(good, {"left_out": "d"})) == "incomplete"
    assert said(models=_result(good, status="timed out")) == "incomplete"
    assert said() == "incomplete", "nothing was compared"
    # two ranks on one device: what does not work is no error, what is wrong is one
    assert said(models=_result(good), ranks=_result(crashed, status="failed", optional=True)) == "held"
    assert said(models=_result(good), ranks=_result(bad, optional=True)) == "did not hold"
