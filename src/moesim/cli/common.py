"""What several commands share: settings, JSON, output files, and sizes as people write them."""

import importlib
import keyword
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click


class Commands(click.Group):
    """A group that answers an unknown command with those there are."""

    def load(self, cmd_name: str) -> click.Command | None:
        """Return a command, None if there is none of that name."""
        return self.commands.get(cmd_name)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command; for an unknown one, fail with a usage error that lists them."""
        command = self.load(cmd_name)
        if command is None:
            names = ", ".join(self.list_commands(ctx))
            ctx.fail(f"no command named {cmd_name!r}; there are: {names}")
        return command


class LazyCommands(Commands):
    """Imports `<package>.<name>`, whose `command` it is, when a command is called.

    So `moesim --help` stays instant. `helps` says in a line what each one does. Python's keywords
    are kept in modules with an underscore after them.
    """

    def __init__(self, *args: Any, package: str, helps: dict[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.package, self.helps = package, helps

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names, in the order of the help."""
        return list(self.helps)

    def load(self, cmd_name: str) -> click.Command | None:
        """Return a command, None if there is none of that name."""
        if cmd_name not in self.helps:
            return None
        module = f"{cmd_name}_" if keyword.iskeyword(cmd_name) else cmd_name
        command: click.Command = importlib.import_module(f"{self.package}.{module}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(self.helps.items()))


class _Share(click.FloatRange):
    """A number from 0 to 1, which FloatRange takes nan for, too."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        share = super().convert(value, param, ctx)
        if math.isnan(share):
            self.fail(f"{value} is not in the range 0<=x<=1.", param, ctx)
        return share


SHARE = _Share(0, 1)


def check_output(path: Path) -> None:
    """Raise InputError if a file cannot be written there, or would replace what is no file."""
    from moesim.errors import InputError

    folder = path.absolute().parent
    if not folder.is_dir():
        raise InputError(f"{path}: there is no folder {folder}")
    check_regular(path)


def check_regular(path: Path) -> None:
    """Raise InputError for a pipe, a device or a folder: renaming a file to it would destroy it."""
    from moesim.errors import InputError

    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is no regular file")


def setting_pairs(settings: tuple[str, ...]) -> dict[str, str]:
    """Return `--set key=value` options as a dictionary; raise InputError for one without `=`."""
    from moesim.errors import InputError

    for setting in settings:
        if "=" not in setting:
            raise InputError(f"--set {setting}: write key=value, as link.h2d.bytes_per_s=55e9")
    return dict(setting.split("=", 1) for setting in settings)


def print_json(value: Any) -> None:
    """Print a value as JSON, the same bytes for the same value."""
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def write_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write rows as CSV, with a column for each key of any; the file appears whole or not."""
    import csv
    import io

    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_text(text.getvalue(), encoding="utf-8", newline="")
    unfinished.replace(path)
