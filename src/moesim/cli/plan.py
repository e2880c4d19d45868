"""`moesim plan`: the settings that a policy computes for itself, and how it came to them."""

from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import print_json
from moesim.cli.replay import run_options

if TYPE_CHECKING:
    from moesim.policies.api import Table


@click.command()
@click.argument("policy", metavar="POLICY[:KEY=VALUE,...]")
@run_options
@click.option("--seed", type=click.IntRange(0, (1 << 31) - 1), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def command(policy: str, seed: int, as_json: bool, **inputs: Any) -> None:
    """Show how a policy comes to its settings, without running it.

    Without TRACE, the example that ships with moesim. What a policy learns beforehand it learns
    from the sequences of the trace that are not replayed; --batch, --prompt and --generate say
    which are. If there are none, it learns from what is left of them.
    """
    from moesim.answers.inputs import Inputs
    from moesim.errors import InputError, MoesimError, PolicyError
    from moesim.policies.registry import BUILTIN, choose, load_class

    chosen = choose(policy)
    if not hasattr(chosen.cls, "plan"):
        planners = sorted(name for name in BUILTIN if hasattr(load_class(name), "plan"))
        raise InputError(
            f"policy '{chosen.name}' computes no settings; those that do: {', '.join(planners)}"
        )
    given = Inputs.load(**inputs)
    prepared = given.prepare(chosen, seed)
    for line in (*given.notices, *prepared.notices):
        click.echo(f"note: {line}", err=True)
    try:
        tables: tuple[Table, ...] = prepared.policy.plan(prepared.setting)
        data = [as_dict(table) for table in tables]
    except MoesimError:
        raise
    except Exception as error:
        raise PolicyError(
            f"policy '{chosen.name}', plan: {type(error).__name__}: {error}"
        ) from error
    if as_json:
        print_json({"policy": policy, "tables": data})
    else:
        show(tables)


def as_dict(table: "Table") -> dict[str, Any]:
    """Return a table with one dictionary per row."""
    rows = [dict(zip(table.columns, map(plain, row), strict=True)) for row in table.rows]
    return {"title": table.title, "note": table.note, "rows": rows}


def plain(value: Any) -> Any:
    """Return a number of NumPy as one of Python."""
    return value.item() if hasattr(value, "item") else value


def show(tables: "tuple[Table, ...]") -> None:
    """Print the tables one after the other."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    for table in tables:
        console.print(table.title, style="bold", soft_wrap=True)
        grid = Table(box=None, header_style="dim", pad_edge=False)
        for at, column in enumerate(table.columns):
            numbers = all(
                isinstance(plain(row[at]), int | float) or row[at] == "" for row in table.rows
            )
            grid.add_column(column, justify="right" if numbers else "left")
        for row in table.rows:
            grid.add_row(*(in_words(plain(cell)) for cell in row))
        console.print(grid)
        if table.note:
            console.print(table.note, soft_wrap=True)
        console.print()


def in_words(value: object) -> str:
    """Return a cell as people read it."""
    match value:
        case bool():
            return "yes" if value else "no"
        case float():
            return f"{value:,.3f}" if abs(value) < 1000 else f"{value:,.0f}"
        case int():
            return f"{value:,}"
    return str(value)
