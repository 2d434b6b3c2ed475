"""The commands of the program, in the order of ``--help``; one declaration each."""

from mindspeed_simpo.cli.commands import files, recipes, runs, sweep

COMMANDS = (*runs.COMMANDS, *files.COMMANDS, sweep.COMMAND, recipes.COMMAND)
