"""What a plan prints and writes: a table, a JSON file with every layout, the YAML of the winner."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.studies.plan.devices import DeviceKind
from mindspeed_simpo.studies.plan.layouts import SEARCHED
from mindspeed_simpo.studies.plan.rank import USABLE, Degrees, Plan
from mindspeed_simpo.studies.plan.reasons import NAMES, extra_seconds, in_seconds, name_of, why_not
from mindspeed_simpo.studies.plan.simulation import Candidate

_GIB = 2**30


def chosen_keys(candidate: Candidate) -> dict[str, Any]:
    """The searched keys that differ from their defaults, and the form of batches."""
    config, fields = candidate.config, Config.model_fields
    values = {name: getattr(config, name) for name in SEARCHED}
    return {name: value for name, value in values.items() if value != fields[name].default or name == "batching"}


def degrees_of(candidate: Candidate) -> str:
    """The degrees of the axes, whether or not there are virtual stages."""
    return str(dataclasses.replace(candidate.layout, virtual_pipeline=False))


def describe(candidate: Candidate) -> str:
    """Layout, micro-batches, schedule and recomputation in one line."""
    config = candidate.config
    size = f"{config.micro_batch_size} pairs" if config.batching == "padded" else f"{config.token_budget} tokens"
    words = [str(candidate.layout)]
    if config.num_layers_per_virtual_pipeline_stage is not None:
        words.append(f"{config.num_layers_per_virtual_pipeline_stage} layers a virtual stage")
    words.append(f"{config.batching} {size}")
    if config.pair_schedule != "concat":
        words.append(config.pair_schedule)
    if config.recompute_granularity is not None:
        words.append(f"recompute {config.recompute_granularity}")
    if config.recompute_method == "block":
        words[-1] = f"recompute {config.recompute_num_layers} layers of a stage"
    return ", ".join(words)


def print_plan(console: Console, plan: Plan, kind: DeviceKind, devices: int, source: str) -> None:
    """Print the fastest layouts, what a step of the first is spent on, and why the others lose.

    Args:
        console: Where to.
        plan: A plan with a winner.
        kind: Of the devices.
        devices: Their number.
        source: Where the lengths of the pairs are from.
    """
    console.print(
        f"Simulated, not measured: {devices} x {escape(kind.name)}; {escape(source)}. {escape(kind.notes)}",
        soft_wrap=True,
    )
    table = Table("", "layout", "s a step", "pairs/s", "GiB", "why not the first", title_justify="left")
    winner = plan.winner
    for place, degrees in enumerate(plan.ranked, start=1):
        each = degrees.fitting[0]
        table.add_row(
            str(place),
            escape(describe(each.candidate)),
            f"{each.time.total:.3g}",
            f"{each.time.pairs_per_second:.3g}",
            f"{each.memory_bytes / _GIB:.3g}",
            "" if each is winner else why_not(degrees, winner, kind),
        )
    console.print(table)
    spent = sorted(winner.time.parts.items(), key=lambda item: -item[1])
    spent = [(name, value) for name, value in spent if value > 0.001 * winner.time.total]
    layout = winner.candidate.layout
    console.print(
        "A step of the first: "
        + ", ".join(f"{name_of(name, layout, kind)} {in_seconds(value)}" for name, value in spent),
        soft_wrap=True,
    )
    for line in _rest(plan, kind):
        console.print(line, soft_wrap=True)


def _rest(plan: Plan, kind: DeviceKind) -> list[str]:
    """Why the layouts that the table does not show lose: how many by which part, and the next of each."""
    found: list[str] = []
    by_part: dict[str, list[Degrees]] = {}
    for degrees in plan.others:
        by_part.setdefault(_largest_loss(degrees, plan), []).append(degrees)
    if by_part:
        found.append(f"{len(plan.others)} other layouts are slower; by what they lose most, with the next of each:")
    for name, several in sorted(by_part.items(), key=lambda item: -len(item[1])):
        first = several[0]
        found.append(
            f"  {len(several)} by {name}, such as {escape(degrees_of(first.example))}: "
            f"{why_not(first, plan.winner, kind)}"
        )
    if plan.refused:
        least = plan.refused[0]
        found.append(
            f"{len(plan.refused)} layouts do not fit in {USABLE:.0%} of {kind.memory_bytes / _GIB:.3g} GiB, such as "
            f"{escape(degrees_of(least.example))}: {why_not(least, plan.winner, kind)}"
        )
    return found


def _largest_loss(degrees: Degrees, plan: Plan) -> str:
    """What costs a layout most more than the winner, in words."""
    if degrees.best is None and degrees.refused is not None:
        return "memory"
    more = extra_seconds(degrees.bound if degrees.best is None else degrees.best.time, plan.winner.time)
    return NAMES[max(more, key=lambda name: more[name])] if more else "several parts"


def as_json(plan: Plan, kind: DeviceKind, devices: int, source: str) -> str:
    """Every layout, with its seconds or their lower bound, its memory and why it loses."""
    found = {
        "simulated": True,
        "devices": devices,
        "device_kind": kind.model_dump(),
        "lengths": source,
        "layouts": [_as_record(each, plan, kind) for each in (*plan.ranked, *plan.others, *plan.refused)],
    }
    return json.dumps(found, indent=1) + "\n"


def _as_record(degrees: Degrees, plan: Plan, kind: DeviceKind) -> dict[str, Any]:
    first = degrees.best is plan.winner
    record: dict[str, Any] = {"layout": degrees_of(degrees.example)}
    record["why_not_first"] = "" if first else why_not(degrees, plan.winner, kind)
    if degrees.verified and degrees.best is not None:
        return record | {
            "form": describe(degrees.best.candidate),
            "keys": chosen_keys(degrees.best.candidate),
            "step_seconds": degrees.best.time.total,
            "pairs_per_second": degrees.best.time.pairs_per_second,
            "parts_seconds": degrees.best.time.parts,
            "memory_bytes": degrees.best.memory_bytes,
        }
    record |= {"keys": degrees.values, "least_step_seconds": max(degrees.bound.total, _finite(degrees.least))}
    record["least_parts_seconds"] = degrees.bound.parts
    if degrees.refused is not None and not degrees.fitting:
        record |= {"refused": describe(degrees.refused.candidate), "memory_bytes": degrees.refused.memory_bytes}
    return record


def _finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def as_yaml(plan: Plan, given: Mapping[str, Any], kind: DeviceKind, devices: int) -> str:
    """The configuration of the winner: the given keys, with those that the plan chose.

    Args:
        plan: A plan with a winner.
        given: Keys of the configuration that was planned for.
        kind: Of the devices.
        devices: Their number.
    """
    first = plan.winner
    kept = {name: value for name, value in given.items() if name not in SEARCHED}
    head = (
        f"# {describe(first.candidate)}\n"
        f"# simulated for {devices} x {kind.name}: {first.time.total:.3g} s a step, "
        f"{first.time.pairs_per_second:.3g} pairs/s, {first.memory_bytes / _GIB:.3g} GiB of a device\n"
    )
    return head + yaml.safe_dump({**kept, **chosen_keys(first.candidate)}, sort_keys=False, allow_unicode=True)
