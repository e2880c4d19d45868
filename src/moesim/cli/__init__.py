"""The command line: one small file per command, loaded when it is called."""

import os
import sys
from typing import NoReturn

import click

from moesim.cli.common import LazyCommands

COMMANDS = {
    "advise": "Say what is fastest for a model on a machine, what limits it, what would help.",
    "bound": "Say what no policy can beat with a budget, model and machine.",
    "cache": "Say how often caches of each rule and size hit, layer by layer.",
    "calibrate": "Measure this machine, so that replays are about it.",
    "compare": "Compare policies: which is fastest, by how much, and is that certain?",
    "compile": "Compile the simulator and policies once, or clear what was compiled.",
    "generate": "Generate text with a real model whose experts a policy offloads.",
    "hardware": "List the machines that moesim knows, show one, or compare two.",
    "models": "List the models that moesim knows, or show one.",
    "plan": "Show how a policy comes to the settings that it computes.",
    "policies": "List the policies, their parameters, defaults and sources.",
    "real": "Run a policy on this machine: real weights, kernels and copies.",
    "record": "Record what the routers of a real model decide.",
    "replay": "Replay a routing trace through a policy on a simulated machine.",
    "report": "Make one HTML file of results: tables, pictures, timelines.",
    "sweep": "Replay every point of a grid, on all cores, and find the best ones.",
    "trace": "Look into a routing trace, or make one.",
    "validate": "Run policies really and simulated: how far off is the simulator?",
}


@click.group(
    cls=LazyCommands,
    package="moesim.cli",
    helps=COMMANDS,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="moesim")
@click.pass_context
def moesim(context: click.Context) -> None:
    """Say which expert-offloading policy is fastest on a machine, for a model, and why."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def main() -> None:
    """Run the command line; a wrong input is one line on stderr and exit code 2."""
    from moesim.errors import MoesimError

    try:
        status = moesim(prog_name="moesim", standalone_mode=False)
    except MoesimError as error:
        fail(str(error), 2)
    except click.NoSuchOption as error:
        where = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        fail(error.format_message().removesuffix(".") + where, 2)
    except click.ClickException as error:
        fail(error.format_message(), error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        fail("interrupted", 130)
    except BrokenPipeError:
        # The reader has seen enough, as `| head` does; the flush at exit must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        fail(f"{error.filename or 'input or output'}: {error.strerror}", 2)
    except MemoryError:
        fail("the run needs more memory than there is; --batch and --prompt decide how much", 2)
    sys.exit(status if isinstance(status, int) else 0)


def fail(message: str, status: int) -> NoReturn:
    """Say in one line what is wrong, and leave."""
    click.echo(f"moesim: {' '.join(message.split())}", err=True)
    sys.exit(status)
