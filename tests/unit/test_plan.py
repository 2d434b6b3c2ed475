"""``plan``: candidates that obey validation, pipelines and collectives against hand values, and the command."""

import dataclasses
import itertools
import json
import math
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from mindspeed_simpo.cli.main import execute
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.file import load_config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.config.resolution import resolve
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.largest import largest_pass
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.studies.plan import run_lengths
from mindspeed_simpo.studies.plan.bounds import Forms, bounds_of, interleaved_bounds
from mindspeed_simpo.studies.plan.collectives import Group, group_of, seconds
from mindspeed_simpo.studies.plan.devices import KINDS, DeviceKind, read_kind
from mindspeed_simpo.studies.plan.layouts import RECOMPUTE, SCHEDULES, Space
from mindspeed_simpo.studies.plan.pipeline import makespan
from mindspeed_simpo.studies.plan.rank import USABLE, search
from mindspeed_simpo.studies.plan.reasons import why_not
from mindspeed_simpo.studies.plan.run_lengths import RunLengths, assumed_lengths
from mindspeed_simpo.studies.plan.simulation import Simulator
from mindspeed_simpo.training.memory import estimate_memory
from scripts.layouts import MODELS

QUICKSTART = str(Path(__file__).parents[2] / "configs" / "quickstart")
HOST = ("layer_host_s", "experts_host_s", "pass_host_s", "step_host_s", "operator_s")


def config(**values) -> Config:
    given = {"model_name_or_path": QUICKSTART, "data_path": "x", "global_batch_size": 8, "seq_length": 1024}
    return Config(**(given | values))


@pytest.fixture(scope="module")
def model():
    return read_description(QUICKSTART)


def simulator(model, base: Config, kind: DeviceKind | None = None, lengths=(200, 100, 80), pairs=64) -> Simulator:
    drawn = assumed_lengths(*lengths, base.seq_length, pairs)
    windows = tuple(dict.fromkeys(layer.attention.window for layer in model.first_of_kind))
    return Simulator(model, kind or KINDS["910B-64GB"], RunLengths(drawn, windows, "assumed"))


def everything(space: Space):
    """The candidates and all that have more work."""
    found = {}
    waiting = list(space.candidates())
    while waiting:
        each = waiting.pop()
        if str(each) not in found:
            found[str(each)] = each
            waiting += space.heavier(each)
    return list(found.values())


def with_blocks(space: Space, candidates):
    """These, and each that recomputes everything also with fewer recomputed layers."""
    for each in candidates:
        yield each
        if each.config.recompute_method == "uniform":
            layers = each.config.num_layers_per_virtual_pipeline_stage or 4 // each.layout.pipeline
            yield from filter(None, (space.recomputing(each, number) for number in range(1, layers)))


def test_the_candidates_are_what_validation_allows_and_all_of_it(model):
    base = config(device="npu", max_tokens_per_micro_batch=None)
    fixed = frozenset({"micro_batch_size", "max_tokens_per_micro_batch", "use_distributed_optimizer"})
    space = Space(base, model, 4, "npu", fixed)
    found = everything(space)
    allowed = []
    forms, virtual = ("padded", "packed", "prefix_shared"), (None, 1, 2)
    for tensor, pipeline, context, layers, sequence, recompute, schedule, form in itertools.product(
        (1, 2, 4),
        (1, 2, 4),
        (1, 2),
        virtual,
        (False, True),
        RECOMPUTE,
        SCHEDULES,
        forms,
    ):
        if (sequence and tensor == 1) or (pipeline == 1 and layers) or layers == 4 // pipeline:
            continue  # a switch without effect, a key that another forbids, one virtual stage of each rank
        values = {
            **{"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline},
            **{"context_parallel_size": context, "num_layers_per_virtual_pipeline_stage": layers},
            **{"sequence_parallel": sequence, "pair_schedule": schedule, "batching": form, **recompute},
        }
        try:
            each = resolve(config(device="npu", **values), model, "npu")
            allowed.append((each, make_layout(each, 4, model, "npu")))
        except ConfigError:
            continue
    assert len(allowed) > 100
    assert {str(each) for each in allowed} == {str((each.config, each.layout)) for each in found}


@pytest.mark.parametrize(("ranks", "chunks", "passes"), [(2, 1, 4), (4, 1, 8), (4, 2, 8), (4, 4, 16), (8, 1, 8)])
def test_equal_passes_leave_the_bubble_of_the_schedule(ranks, chunks, passes):
    forward = np.full((ranks * chunks, passes, 1), 1.0 / chunks)
    [total] = makespan(forward, 2 * forward, np.zeros((passes, 1)), ranks)
    assert total / (3 * passes) - 1 == pytest.approx((ranks - 1) / (chunks * passes))


def test_unequal_passes_and_messages_by_hand():
    forward = np.array([[[1.0], [3.0]], [[2.0], [1.0]]])  # two ranks, two passes
    # rank 0: F0 0-1, F1 1-4; rank 1: F0 2-4, B0 4-6, F1 6-7, B1 7-9; rank 0: B0 7-8, B1 10-11, messages of 1
    backward = np.array([[[1.0], [1.0]], [[2.0], [2.0]]])
    assert makespan(forward, backward, np.ones((2, 1)), 2) == [11.0]
    assert makespan(forward, None, np.zeros((2, 1)), 2) == [5.0]
    assert makespan(forward[:1], backward[:1], np.ones((2, 1)), 1) == [6.0]


def test_collectives_by_hand():
    kind = KINDS["H100"].model_copy(
        update={
            "inside": KINDS["H100"].inside.model_copy(update={"latency_s": 0.0, "bytes_per_s": 100.0}),
            "outside": KINDS["H100"].outside.model_copy(update={"latency_s": 1.0, "bytes_per_s": 10.0}),
        }
    )
    assert seconds("gather", 800.0, Group(8, 8), kind) == 7.0
    assert seconds("reduce", 800.0, Group(8, 8), kind) == 14.0
    # 8 ranks of each of 2 hosts: 7 s inside, then 50 of 100 bytes of each device outside, and one step
    assert seconds("scatter", 800.0, Group(16, 8), kind) == 7.0 + 5.0 + 1.0
    assert seconds("exchange", 160.0, Group(16, 8), kind) == pytest.approx(70 / 100 + 80 / 10 + 1.0)
    assert seconds("send", 20.0, Group(2, 1), kind) == 3.0
    assert seconds("gather", 800.0, Group(1, 1), kind) == 0.0
    mesh = kind.model_copy(update={"inside": kind.inside.model_copy(update={"wires": 7})})
    assert seconds("gather", 800.0, Group(8, 8), mesh) == 7.0
    assert seconds("gather", 800.0, Group(2, 2), mesh) == pytest.approx(400 / (100 / 7))
    assert seconds("send", 100.0, Group(2, 2), mesh) == pytest.approx(7.0)
    layout = Layout(tensor=4, context=2, pipeline=2, data=2)
    assert group_of("tensor", layout, kind) == Group(4, 4)
    assert group_of("data", layout, kind) == Group(4, 2)
    assert group_of("pipeline", layout, kind) == Group(2, 1)


def test_memory_is_what_check_estimates(model):
    base = config(device="npu", bf16=True)
    simulated = simulator(model, base)
    for candidate in list(Space(base, model, 4, "npu").candidates())[::29]:
        largest = largest_pass(simulated.run.lengths, candidate.config, Batching.of(candidate.config), candidate.layout)
        expected = estimate_memory(model, candidate.config, candidate.layout, largest, "npu")
        assert simulated.memory(candidate, whole_run=True) == expected


_ONE_FORM = {"batching", "pair_schedule", "sequence_parallel"}


@pytest.mark.parametrize(
    ("spare", "host", "more", "batching", "pairs"),
    [
        (1.15, True, {"max_tokens_per_micro_batch"}, "auto", 48),
        (3.0, False, {"batching", "sequence_parallel"}, "auto", 48),
        (
            1.02,
            False,
            _ONE_FORM,
            "padded",
            160,
        ),  # fastest that fit in the simulated steps alone; some layers recomputed
    ],
)
def test_nothing_is_faster_than_its_bound_and_the_search_misses_nothing(
    model, spare, host, more, batching, pairs, monkeypatch
):
    """With little memory, so that recomputation and two passes are needed, and with much; everything is simulated."""
    monkeypatch.setattr(run_lengths, "_STEPS", 2)
    base = config(device="npu", bf16=True, sequence_parallel=True, batching=batching)
    space = Space(base, model, 4, "npu", frozenset({"context_parallel_size"} | more))
    if batching == "auto":
        space = dataclasses.replace(space, fixed=space.fixed | {"micro_batch_size"})
    candidates = list(with_blocks(space, everything(space)))
    simulated = simulator(model, base, pairs=pairs)
    least = min(max(each.total for each in simulated.memory(one, whole_run=True)) for one in candidates)
    kind = KINDS["910B-64GB"].model_copy(update={"memory_bytes": int(spare * least / USABLE)})
    kind = kind if host else kind.model_copy(update=dict.fromkeys(HOST, 0))
    simulated = simulator(model, base, kind, pairs=pairs)
    plan = search(space, simulated, keep=3)
    fastest = {}
    for each in candidates:
        time_ = simulated.step(each)
        [bound] = bounds_of(simulated, each, Forms.of(simulated.run, [each])).totals
        assert bound <= time_.total * (1 + 1e-9), each
        assert sum(time_.parts.values()) == pytest.approx(time_.total)
        assert min(time_.parts.values()) > -1e-9, time_.parts
        if each.layout.virtual_pipeline and each.config.recompute_granularity is None:
            plain = space.changed(each, {"num_layers_per_virtual_pipeline_stage": None})
            bounds = interleaved_bounds(simulated, plain, Forms.of(simulated.run, [plain]))
            assert bounds.totals[0] <= bound * (1 + 1e-9), each
        if max(part.total for part in simulated.memory(each, whole_run=True)) <= USABLE * kind.memory_bytes:
            degrees = dataclasses.replace(each.layout, virtual_pipeline=False)
            fastest[degrees] = min(time_.total, fastest.get(degrees, math.inf))
    found = {each.layout: each.fitting[0].time.total for each in plan.ranked}
    assert list(found.values()) == pytest.approx(sorted(fastest.values())[:3], rel=1e-9)
    assert found == pytest.approx({layout: fastest[layout] for layout in found}, rel=1e-9)
    assert {each.layout for each in plan.refused}.isdisjoint(fastest)
    for each in plan.others:
        assert each.bound.total <= each.least * (1 + 1e-9)
        assert list(found.values())[-1] <= each.least <= fastest.get(each.layout, math.inf) * (1 + 1e-9)
    methods = {each.fitting[0].candidate.config.recompute_method for each in plan.ranked}
    assert ("block" in methods) == (spare < 1.1)
    for each in (*plan.ranked[1:], *plan.others, *plan.refused):
        assert why_not(each, plan.winner, kind).startswith(("1.", "2.", "3.", "4.", "at least", "does not fit"))


def test_switches_have_the_sign_that_they_should(model):
    base = config(device="npu", bf16=True)
    # a host that is fast enough not to hide the device's work
    simulated = simulator(model, base, KINDS["910B-64GB"].model_copy(update=dict.fromkeys(HOST, 0)))

    def total(**values):
        each = Space(base, model, 8, "npu").candidate({"batching": "packed", **values})
        return simulated.step(each).total

    full = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    assert total() < total(pair_schedule="two_pass")
    assert total() < total(recompute_granularity="selective") < total(**full)
    assert total(batching="prefix_shared") < total() < total(batching="padded")
    assert total(use_distributed_optimizer=True) <= total()
    sharded = {"use_distributed_optimizer": True}
    reduced = {**sharded, "overlap_grad_reduce": True}
    gathered = {**reduced, "overlap_param_gather": True}
    assert 0 < total(**gathered) < total(**reduced) < total(**sharded)


def test_the_command_writes_a_configuration_that_train_takes(tmp_path, capsys):
    source = tmp_path / "run.yaml"
    data = Path(QUICKSTART) / "train.jsonl"
    source.write_text(
        f"model_name_or_path: {QUICKSTART}\ndata_path: {data}\nglobal_batch_size: 16\nseq_length: 512\n"
        f"simpo_beta: 2.0\ndata_cache_dir: {tmp_path / 'cache'}\n"
    )
    kind = tmp_path / "kind.json"
    kind.write_text(KINDS["H100"].model_copy(update={"name": "mine"}).model_dump_json())
    words = ["plan", str(source), "--devices", "8", "--device-file", str(kind), "--top", "2"]
    files = ["--output", str(tmp_path / "plan.json"), "--write", str(tmp_path / "best.yaml")]
    assert execute([*words, *files, "--context-parallel-size", "2"]) == 0
    printed = capsys.readouterr().out
    assert "Simulated, not measured: 8 x mine; the run's own" in printed
    best = load_config(tmp_path / "best.yaml")
    assert make_layout(best, 8, read_description(QUICKSTART), "cuda").context == 2
    assert (best.simpo_beta, best.global_batch_size) == (2.0, 16)
    found = json.loads((tmp_path / "plan.json").read_text())
    ranked = [each for each in found["layouts"] if "step_seconds" in each]
    assert [each["step_seconds"] for each in ranked] == sorted(each["step_seconds"] for each in ranked)
    assert all(each["why_not_first"] for each in found["layouts"][1:])
    assert all(each["keys"].get("context_parallel_size") == 2 for each in found["layouts"])
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["data_path"] == str(data)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--devices", "8"], "expected one of --device-kind"),
        (["--devices", "8", "--device-kind", "H900"], "found 'H900'"),
        (["--devices", "none", "--device-kind", "H100"], "--devices: expected a whole number"),
        (["--devices", "8", "--device-kind", "H100", "--lengths", "3,4"], "--lengths: expected PROMPT,"),
        (
            ["--devices", "7", "--device-kind", "H100", "--lengths", "9,9,9", "--global-batch-size", "2"],
            "no layout of 7",
        ),
        (["--devices", "1", "--device-file", "absent.json"], "absent.json"),
    ],
)
def test_what_is_wrong_is_named(flags, message, capsys):
    lengths = [] if "--lengths" in flags else ["--lengths", "20,20,20"]
    assert execute(["plan", QUICKSTART, *flags, *lengths]) == 2
    assert message in capsys.readouterr().err


def test_a_device_file_that_is_no_record_is_named(tmp_path):
    file = tmp_path / "kind.json"
    file.write_text('{"name": "x", "device": "tpu"}')
    with pytest.raises(
        ConfigError, match=r"device: input should be 'npu', 'cuda' or 'cpu'.*memory_bytes: field required"
    ):
        read_kind(file)


def test_ten_thousand_devices_are_planned_from_a_config_alone(tmp_path):
    """In a process of its own, without the checks of shapes that tests run with."""
    (tmp_path / "config.json").write_text(MODELS["Llama-3.1-70B"])
    words = ["--devices", "10000", "--device-kind", "910B-64GB", "--lengths", "512,300,300", "--top", "1"]
    command = [sys.executable, "-m", "mindspeed_simpo", "plan", str(tmp_path / "config.json"), *words]
    before = _seconds_of_children()
    done = subprocess.run(
        [*command, "--global-batch-size", "2500"], capture_output=True, text=True, timeout=300, check=True
    )
    assert "10000 x 910B-64GB" in done.stdout
    assert _seconds_of_children() - before < 60


def _seconds_of_children():
    """CPU seconds of all processes that this one has waited for."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def test_too_little_memory_is_said_with_what_is_missing(tmp_path, capsys):
    (tmp_path / "config.json").write_text(MODELS["Llama-3.1-70B"])
    words = ["--devices", "2", "--device-kind", "910B-32GB", "--lengths", "512,300,300"]
    assert execute(["plan", str(tmp_path), *words, "--batching", "packed", "--sequence-parallel"]) == 2
    assert "fits on 2 x 910B-32GB: the smallest, " in capsys.readouterr().err
