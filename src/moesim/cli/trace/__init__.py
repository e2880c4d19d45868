"""`moesim trace`: look into a routing trace, make one, or turn one into another form."""

import click

from moesim.cli.common import LazyCommands

COMMANDS = {
    "cut": "Take part of a trace: some sequences, tokens, layers or predictors.",
    "export": "Write a trace in the form of another program.",
    "import": "Turn what an engine or tool recorded into a trace.",
    "info": "Show what decides policies: locality, popularity, working set, hits by cache size.",
    "join": "Put traces of one model together, one after the other.",
    "synth": "Make up a trace that repeats itself as the preset's model does.",
}


@click.group(
    cls=LazyCommands, package="moesim.cli.trace", helps=COMMANDS, invoke_without_command=True
)
@click.pass_context
def command(context: click.Context) -> None:
    """Look into a routing trace, make one, or turn one into another form."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
