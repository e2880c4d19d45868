"""The command line: one small file per command, loaded when it is called."""

import importlib
import sys
from typing import NoReturn

import click

COMMANDS = {
    "hardware": "List the machines that moesim knows, or show one.",
    "models": "List the models that moesim knows, or show one.",
    "policies": "List the policies, their parameters, defaults and sources.",
    "replay": "Replay a routing trace through a policy on a simulated machine.",
    "trace": "Look into a routing trace, or make one.",
}


class _Lazy(click.Group):
    """Imports a command's module when the command is called: `moesim --help` stays instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"moesim.cli.{cmd_name}")
        command: click.Command = module.command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="moesim")
def moesim() -> None:
    """Say which expert-offloading policy is fastest on a machine, for a model, and why."""


def main() -> None:
    """Run the command line; a wrong input is one line on stderr and exit code 2."""
    from moesim.errors import MoesimError

    try:
        status = moesim(prog_name="moesim", standalone_mode=False)
    except MoesimError as error:
        fail(str(error), 2)
    except click.ClickException as error:
        fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    sys.exit(status if isinstance(status, int) else 0)


def fail(message: str, status: int) -> NoReturn:
    """Say in one line what is wrong, and leave."""
    click.echo(f"moesim: {' '.join(message.split())}", err=True)
    sys.exit(status)
