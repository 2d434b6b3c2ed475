"""The commands of the program, in the order of ``--help``; one declaration each."""

from mindspeed_simpo.cli.commands import files, plan, recipes, runs

COMMANDS = (*runs.COMMANDS, *files.COMMANDS, plan.COMMAND, recipes.COMMAND)
