"""What a plan prints and writes: a table, a JSON file with every candidate, the YAML of the winner."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.studies.plan.devices import DeviceKind
from mindspeed_simpo.studies.plan.layouts import SEARCHED
from mindspeed_simpo.studies.plan.rank import NAMES, USABLE, Plan, Ranked, in_seconds, reasons, slower_because
from mindspeed_simpo.studies.plan.simulation import Candidate

_GIB = 2**30


def chosen_keys(candidate: Candidate) -> dict[str, Any]:
    """The searched keys that differ from their defaults, and the form of batches."""
    config, fields = candidate.config, Config.model_fields
    values = {name: getattr(config, name) for name in SEARCHED}
    return {name: value for name, value in values.items() if value != fields[name].default or name == "batching"}


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
    return ", ".join(words)


def print_plan(console: Console, plan: Plan, kind: DeviceKind, devices: int, source: str, shown: int) -> None:
    """Print the fastest layouts, what their steps are spent on, and why the others lose.

    Args:
        console: Where to.
        plan: A plan with a winner.
        kind: Of the devices.
        devices: Their number.
        source: Where the lengths of the pairs are from.
        shown: Number of rows.
    """
    console.print(
        f"Simulated, not measured: {devices} x {escape(kind.name)}; {escape(source)}. {escape(kind.notes)}",
        soft_wrap=True,
    )
    table = Table("", "layout", "s a step", "pairs/s", "GiB", "why not the first", title_justify="left")
    winner = plan.ranked[0].time
    for place, each in enumerate(plan.ranked[:shown], start=1):
        why = "" if place == 1 else slower_because(each.time, winner)
        table.add_row(
            str(place),
            escape(describe(each.candidate)),
            f"{each.time.total:.3g}",
            f"{each.time.pairs_per_second:.3g}",
            f"{each.memory_bytes / _GIB:.3g}",
            why,
        )
    console.print(table)
    spent = sorted(winner.parts.items(), key=lambda item: -item[1])
    console.print(
        "A step of the first: "
        + ", ".join(f"{NAMES[name]} {in_seconds(value)}" for name, value in spent if value > 0.001 * winner.total),
        soft_wrap=True,
    )
    console.print(
        f"{plan.allowed} candidates: {len(plan.ranked)} simulated, {len(plan.refused)} do not fit in {USABLE:.0%} of "
        f"{kind.memory_bytes / _GIB:.3g} GiB, {len(plan.slower)} slower by the lower bound of their busiest rank",
        soft_wrap=True,
    )


def as_json(plan: Plan, kind: DeviceKind, devices: int, source: str) -> str:
    """Every candidate, with its seconds or their lower bound, its memory and why it loses."""
    why = {id(candidate): reason for candidate, reason in reasons(plan, kind.memory_bytes)}
    found = {
        "simulated": True,
        "devices": devices,
        "device_kind": kind.model_dump(),
        "lengths": source,
        "candidates": [_ranked(each, why) for each in plan.ranked]
        + [
            {**_named(each.candidate, why), "least_step_seconds": each.least_seconds, "memory_bytes": each.memory_bytes}
            for each in plan.refused
        ]
        + [{**_named(candidate, why), "least_step_seconds": bound} for bound, candidate in plan.slower],
    }
    return json.dumps(found, indent=1) + "\n"


def _named(candidate: Candidate, why: Mapping[int, str]) -> dict[str, Any]:
    return {
        "layout": describe(candidate),
        "keys": chosen_keys(candidate),
        "why_not_first": why.get(id(candidate), ""),
    }


def _ranked(each: Ranked, why: Mapping[int, str]) -> dict[str, Any]:
    return {
        **_named(each.candidate, why),
        "step_seconds": each.time.total,
        "pairs_per_second": each.time.pairs_per_second,
        "parts_seconds": each.time.parts,
        "memory_bytes": each.memory_bytes,
    }


def as_yaml(plan: Plan, given: Mapping[str, Any], kind: DeviceKind, devices: int) -> str:
    """The configuration of the winner: the given keys, with those that the plan chose.

    Args:
        plan: A plan with a winner.
        given: Keys of the configuration that was planned for.
        kind: Of the devices.
        devices: Their number.
    """
    first = plan.ranked[0]
    kept = {name: value for name, value in given.items() if name not in SEARCHED}
    head = (
        f"# {describe(first.candidate)}\n"
        f"# simulated for {devices} x {kind.name}: {first.time.total:.3g} s a step, "
        f"{first.time.pairs_per_second:.3g} pairs/s, {first.memory_bytes / _GIB:.3g} GiB of a device\n"
    )
    return head + yaml.safe_dump({**kept, **chosen_keys(first.candidate)}, sort_keys=False, allow_unicode=True)
