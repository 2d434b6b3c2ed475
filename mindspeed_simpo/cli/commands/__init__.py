"""The commands of the program, in the order of ``--help``; one declaration each."""

from mindspeed_simpo.cli.commands import files, recipes, runs, ui

COMMANDS = (*runs.COMMANDS, *files.COMMANDS, recipes.COMMAND, ui.COMMAND)
