"""`moesim trace`: look into a routing trace, make one, or turn one into another form."""

import click

from moesim.cli.common import LazyCommands

COMMANDS = {
    "info": "Show what decides policies: locality, popularity, working set, hits by cache size.",
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
