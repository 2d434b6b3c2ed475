"""The measurements of ``scripts/measure_memory.py`` as Markdown."""

from __future__ import annotations

from typing import Any


def tables(result: dict[str, Any]) -> str:
    """The measurements as Markdown."""
    machine, versions = result["machine"], result["versions"]
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['threads']} thread(s), "
        f"device {machine['device']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + f". Other programs ran: load average {machine['load_average_at_start']} at the start, "
        f"{machine['load_average_at_end']} at the end.",
    ]
    for item in result["schedules"]:
        shape = item["shape"]
        recompute = "full recompute" if shape["recompute"] else "no recompute"
        lines += [
            "",
            f"Schedules, {recompute}: {shape['layers']} layers of width {shape['hidden']}, "
            f"vocabulary {shape['vocab']}, {shape['micro_batches']} micro-batches of "
            f"{shape['pairs']} pair(s), prompt {shape['prompt']} and responses {shape['response']} tokens, "
            f"{shape['dtype']}, fused head.",
            "",
            "| `pair_schedule` | stored, MiB | ratio | wall, s (min to max) | ratio | CPU, s | ratio | gradient off |",
            "|---|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {_mib(row['stored_bytes'])} | {row['stored_ratio']:.3f} | {_times(row)} | "
            f"{row['gradient_difference']:.1e} |"
            for name, row in item["variants"].items()
        ]
    for item in result["heads"]:
        shape = item["shape"]
        worst = max(item["differences"].values())
        lines += [
            "",
            f"Head: vocabulary {shape['vocab']}, {shape['tokens']} response tokens, width {shape['hidden']}, "
            f"{shape['dtype']}, chunks of {shape['chunk_tokens']} tokens. Largest relative L2 difference of "
            f"log-probabilities and both gradients: {worst:.1e}.",
            "",
            "| head | peak extra, MiB | ratio | wall, s (min to max) | ratio | CPU, s | ratio |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {_mib(row['peak_extra_bytes'])} | {row['peak_extra_ratio']:.3f} | {_times(row)} |"
            for name, row in item["variants"].items()
        ]
    return "\n".join(lines)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f}"


def _times(row: dict[str, Any]) -> str:
    shortest, longest = row["wall_seconds_range"]
    return (
        f"{row['wall_seconds']:.2f} ({shortest:.2f} to {longest:.2f}) | {row['wall_ratio']:.2f} | "
        f"{row['cpu_seconds']:.2f} | {row['cpu_ratio']:.2f}"
    )
