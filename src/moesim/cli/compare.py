"""`moesim compare`: which policy is fastest, by how much, and is that certain?"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from moesim.cli.common import check_output, print_json, write_rows
from moesim.cli.replay import policies_with_parameters, run_options, with_progress

if TYPE_CHECKING:
    from rich.console import Console

    from moesim.answers.compare import Comparison
    from moesim.answers.verdict import Cell

Value = TypeVar("Value")


@click.command()
@click.option(
    "--policies",
    metavar="NAME,NAME...|all",
    help="Policies with their default parameters.  [default: all that do not see the future]",
)
@policies_with_parameters
@click.option(
    "--baseline",
    default="static",
    show_default=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="What the others are compared with.",
)
@run_options
@click.option("--budgets", metavar="SIZE,SIZE...", help="A table for each, as 4GiB,8GiB.")
@click.option("--cache-ratios", metavar="SHARE,SHARE...", help="A table for each, as .1,.25,.5.")
@click.option("--batches", metavar="N,N...", help="A table for each, as 1,8.")
@click.option(
    "--windows",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Cut the workload from the trace so often, if it holds so much.",
)
@click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: one per core]")
@click.option(
    "--machine",
    type=click.Choice(["auto", "simpy", "compiled"]),
    default="auto",
    show_default=True,
    help="What simulates: see `moesim replay --help`.",
)
@click.option("--seed", type=click.IntRange(0, (1 << 31) - 1), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one row per policy, budget and batch.",
)
@click.option(
    "--plot",
    type=click.Path(file_okay=False, path_type=Path),
    help="Draw pictures into this folder.",
)
def command(
    policies: str | None, specs: tuple[str, ...], budgets: str | None, cache_ratios: str | None,
    batches: str | None, as_json: bool, csv_path: Path | None, plot: Path | None, **inputs: Any,
) -> None:  # fmt: skip
    """Replay policies side by side, and say which is fastest, by how much, and how certainly.

    Without TRACE, the example that ships with moesim. The workload is cut from the trace several
    times; speeds are those of all windows together. on-demand and oracle are replayed, too: what
    the one takes longer than the other is what a policy may gain.
    """
    from moesim.answers.compare import compare, names_in
    from moesim.errors import InputError

    if batches is not None and inputs["batch"] != 1:
        raise InputError("--batch and --batches exclude each other")
    chosen = [*(names_in(policies) if policies is not None else ()), *specs] or ["all"]
    check_files(inputs["trace"], csv_path, plot)
    grid: dict[str, Any] = {
        "budgets": None if budgets is None else several(budgets, str, "--budgets", "4GiB,8GiB"),
        "cache_ratios": None
        if cache_ratios is None
        else several(cache_ratios, float, "--cache-ratios", "numbers from 0 to 1, as .1,.25,.5"),
        "batches": None
        if batches is None
        else several(batches, int, "--batches", "whole numbers from 1 on, as 1,8"),
    }
    found: Any = with_progress(
        lambda progress: compare(policies=chosen, **grid, **inputs, progress=progress),
        "comparing",
    )
    comparison: Comparison = found
    for line in comparison.data["notices"]:
        click.echo(f"note: {line}", err=True)
    if csv_path is not None:
        write_rows(rows_of(comparison), csv_path)
    if plot is not None:
        from moesim.answers.plots import draw_comparison

        for path in draw_comparison(comparison, plot):
            click.echo(f"note: {path}", err=True)
    if as_json:
        print_json(comparison.data)
    else:
        show(comparison)


def several(text: str, kind: Callable[[str], Value], option: str, legal: str) -> list[Value]:
    """Return the values of a list with commas; raise InputError naming what would be legal."""
    from moesim.errors import InputError

    try:
        found = [kind(item.strip()) for item in text.split(",") if item.strip()]
    except ValueError:
        found = []
    if not found:
        raise InputError(f"{option} {text!r}: write {legal}")
    return found


def check_files(trace: Path | None, csv_path: Path | None, plot: Path | None) -> None:
    """Raise InputError for what cannot be written, or would replace the trace."""
    from moesim.cli.calibrate import check_writable
    from moesim.errors import InputError
    from moesim.real.plots import check_picture

    if csv_path is not None:
        check_output(csv_path)
        if trace is not None and csv_path.resolve() == trace.resolve():
            raise InputError("TRACE and --csv must be different files")
    if plot is not None:
        check_picture(plot / "comparison.png")
        check_writable(plot, "--plot")


def rows_of(comparison: "Comparison") -> list[dict[str, Any]]:
    """Return one row per policy, budget and batch; lists are joined with blanks or semicolons."""
    from moesim.answers.points import flat

    return [{key: joined(value) for key, value in flat(row).items()} for row in comparison.rows]


def joined(value: Any) -> Any:
    """Return a list as one text, and anything else as it is."""
    return "; ".join(map(str, value)) if isinstance(value, list) else value


def show(comparison: "Comparison") -> None:
    """Print, for each budget and batch, the answer and the table; and what it all rests on."""
    from rich.console import Console

    from moesim.answers.verdict import answer, cells, heading, rule

    console = Console(highlight=False, markup=False)
    found = cells(comparison.data)
    if len(found) > 1:
        for cell in found:
            console.print(f"{heading(cell)}: {answer(cell)}", style="bold green", soft_wrap=True)
        console.print()
    for cell in found:
        show_cell(console, cell)
        console.print()
    for line in rule(comparison.data):
        console.print(line)
    data, done = comparison.data, comparison.data["simulated"]
    console.print(
        f"{data['model']} on {data['hardware']}, experts in {data['workload']['bits']} bit; "
        f"{done['replays']} replays on machine {' and '.join(done['machines'])}",
        style="dim",
        soft_wrap=True,
    )


def show_cell(console: "Console", cell: "Cell") -> None:
    """Print the answer, why, what no policy can exceed, and the table."""
    from rich.table import Table

    from moesim.answers.verdict import answer, below, columns, heading, reasons

    console.print(answer(cell), style="bold green", soft_wrap=True)
    for line in reasons(cell):
        console.print(line, soft_wrap=True)
    about = cell.about
    console.print(
        f"\n{heading(cell)}; {about['prompt_tokens']} prompt + {about['output_tokens']} generated"
        " tokens",
        soft_wrap=True,
    )
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    shown = columns(cell.baseline)
    for at, column in enumerate(shown):
        names = at == 1
        table.add_column(
            column.title, justify="left" if names else "right", no_wrap=not names,
            vertical="bottom", overflow="fold",
        )  # fmt: skip
    for row in cell.rows:
        table.add_row(*(column.cell(row) for column in shown))
    if cell.rows:
        console.print(table)
    for line in below(cell):
        console.print(line)
