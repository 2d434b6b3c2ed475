"""``recipes``: the shipped configurations."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from mindspeed_simpo.cli.command import Command
from mindspeed_simpo.config.recipes import recipes


def _recipes(_command: Any, _argv: Sequence[str]) -> int:
    from rich.console import Console
    from rich.table import Table

    table = Table("recipe", "what it trains", "what to expect")
    for recipe in recipes():
        table.add_row(recipe.name, recipe.title, recipe.expect)
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


COMMAND = Command("recipes", "List the shipped recipes, whose names CONFIG takes.", _recipes)
