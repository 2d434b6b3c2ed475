"""Write docs/configuration.md, and the table of objectives in docs/plugin.md, from what the package declares.

Run it after a change of an option or of an objective.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from mindspeed_simpo.config.describe import describe_default, describe_values
from mindspeed_simpo.config.options import OPTION_GROUPS
from mindspeed_simpo.integrations.mindspeed_llm import stages
from mindspeed_simpo.objectives import OBJECTIVES, Objective

DOCS = Path(__file__).parents[1] / "docs"
OUTPUT, PLUGIN = DOCS / "configuration.md", DOCS / "plugin.md"
BEGIN, END = "<!-- written by scripts/make_configuration_docs.py -->\n", "<!-- end -->\n"
INTRODUCTION = """\
# Configuration

Written by `scripts/make_configuration_docs.py` from `mindspeed_simpo/config/options/` and
`mindspeed_simpo/objectives/`; do not edit it by hand.

All keys live side by side in one YAML file. The key `simpo_beta` is the flag `--simpo-beta`; a flag wins over the file.
Boolean keys are `--bf16` and `--no-bf16`; a list is `--data-path a.jsonl b.jsonl`; `--map-keys` takes JSON. An unknown
key is an error that names the nearest known one. `mindspeed-simpo train --help` prints the same tables.

"required" means that the key must be given, in the file or as a flag. A dash means that the key has no value unless it
is given; its description says what happens then.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(line for group in OPTION_GROUPS for line in _section(group))])


def render_plugin(page: str) -> str:
    """docs/plugin.md with the table of objectives as they are declared."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + "\n".join(_stages()) + END + after


def _stages() -> Iterator[str]:
    yield "| stage | flag | value | default | meaning |"
    yield "|---|---|---|---|---|"
    for stage in (*stages.SUPPORTED, stages.UPSTREAM_STAGE):
        objective = OBJECTIVES[stage]
        name = f"`{stage}`" if stage in stages.SUPPORTED else f"`{stage}` with `--dpo-exact`"
        for key, field in objective.keys.model_fields.items():
            flag = stages.flag(key)
            flag = f"`{flag}`, `--no-{flag[2:]}`" if field.annotation is bool else f"`{flag}`"
            value = "" if field.annotation is bool else describe_values(field)
            yield f"| {name} | {flag} | {value} | {_default(field)} | {_escape(field.description or '')} |"
        if not objective.keys.model_fields:
            yield f"| {name} | | | | no flags of its own |"
    yield ""


def _section(group: Any) -> Iterator[str]:
    yield f"## {(group.__doc__ or group.__name__).rstrip('.')}\n"
    of_objectives = {name for objective in OBJECTIVES.values() for name in objective.keys.model_fields}
    fields = group.model_fields
    yield from _table({name: field for name, field in fields.items() if name not in of_objectives})
    if of_objectives & fields.keys():
        for objective in OBJECTIVES.values():
            yield from _objective(objective)


def _objective(objective: Objective) -> Iterator[str]:
    reference = "needs a reference model" if objective.needs_reference else "no reference model"
    yield f"### {objective.title}\n"
    yield f"`stage: {objective.stage}`, {reference}. Source: {objective.source}.\n"
    yield f"Rewards in the metrics: {objective.rewards}.\n"
    for name, meaning in objective.metrics.items():
        yield f"Metric of its own: `{name}`, {meaning}.\n"
    if objective.keys.model_fields:
        yield from _table(objective.keys.model_fields)
    else:
        yield "It has no keys.\n"


def _table(fields: Mapping[str, FieldInfo]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "|---|---|---|---|"
    for name, field in fields.items():
        yield f"| `{name}` | {describe_values(field)} | {_default(field)} | {_escape(field.description or '')} |"
    yield ""


def _default(field: FieldInfo) -> str:
    default = describe_default(field)
    return default if field.is_required() else f"`{default}`" if default else "-"


def _escape(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    OUTPUT.write_text(render(), encoding="utf-8")
    PLUGIN.write_text(render_plugin(PLUGIN.read_text(encoding="utf-8")), encoding="utf-8")
