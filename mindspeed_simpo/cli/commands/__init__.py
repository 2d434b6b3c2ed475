"""The commands of the program, in the order of ``--help``; one declaration each."""

from mindspeed_simpo.cli.commands import analyse, files, recipes, runs, sample, ui

COMMANDS = (*runs.COMMANDS, analyse.COMMAND, *files.COMMANDS, sample.COMMAND, recipes.COMMAND, ui.COMMAND)
