"""The commands of the program, in the order of ``--help``; one declaration each."""

from mindspeed_simpo.cli.commands import analyse, files, plan, recipes, runs, sample, sweep, ui

COMMANDS = (
    *runs.COMMANDS,
    plan.COMMAND,
    analyse.COMMAND,
    sweep.COMMAND,
    sample.COMMAND,
    *files.COMMANDS,
    recipes.COMMAND,
    ui.COMMAND,
)
