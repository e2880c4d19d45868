"""`moesim sweep`: all points of a grid, on all cores, as often interrupted as need be."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import check_output, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from moesim.answers.store import Row
    from moesim.answers.sweep import Plan
    from moesim.answers.swept import Swept

EVERY_S = 30
"""How often a line says how far it is where there is no terminal."""
SHOWN, FRONT_SHOWN = 3, 12
"""Reasons and notes, and points worth their memory, that are printed."""


@click.command()
@click.argument("grid", type=click.Path(path_type=Path))
@click.option(
    *("--output", "-o"),
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The Parquet file to write; finished points are kept beside it, in OUTPUT.points.",
)
@click.option("--dry-run", is_flag=True, help="Say what there is to do, and do nothing.")
@click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: one per core]")
@click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Run on the workers of a Dask scheduler, as tcp://host:8786. They need this moesim, and "
    "to find traces and other files under the same paths.",
)
@click.option("--retry-failed", is_flag=True, help="Run the points again that failed before.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def command(
    grid: Path,
    output: Path,
    dry_run: bool,
    jobs: int | None,
    scheduler: str | None,
    retry_failed: bool,
    as_json: bool,
) -> int:
    """Run every point of a grid file, and write a Parquet file of a row per point.

    Fields are named as the options of `moesim replay`, under `grid` lists that are crossed:

    \b
      trace: trace.npz
      grid:
        policy: [lru, "dali:cache=lru"]
        cache_ratio: [0.1, 0.25, 0.5]
        hardware: [rtx3090-pcie4-ddr4, rtx4090-pcie4-ddr5]
        hardware.link.h2d.bytes_per_s: [x1, x2]

    Also policy.<parameter>, stretch.<section> and trace.<argument of moesim trace synth>; lists
    under `zip`, a list of groups, go together. Interrupted or repeated, only what is missing is
    run.
    """
    from moesim.answers.grid import read_grid
    from moesim.answers.store import Store
    from moesim.answers.sweep import checked, folder_of, plan_of, sweep

    check_output(output)
    if dry_run:
        plan = plan_of(read_grid(grid), Store(folder_of(checked(output))), retry_failed)
        if as_json:
            print_json(planned(plan, jobs))
        else:
            show_plan(plan, jobs)
        return 0
    with reporting() as progress:
        swept = sweep(
            grid, output, jobs, scheduler, progress, retry_failed=retry_failed,
            say=lambda line: click.echo(f"note: {line}", err=True),
        )  # fmt: skip
    if as_json:
        print_json(swept.data)
    else:
        show(swept, output)
    return 0 if swept.good else 1


@contextmanager
def reporting() -> Iterator[Callable[[int, int], None]]:
    """Give a function that shows progress: a bar on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield lines()
        return
    columns = (
        TextColumn("points"), BarColumn(), MofNCompleteColumn(),
        TimeRemainingColumn(), TextColumn("left"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True, speed_estimate_period=300) as bar:
        task = bar.add_task("points", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def lines() -> Callable[[int, int], None]:
    """Return a function that says how far it is, at most every EVERY_S."""
    began = said = 0.0
    before: int | None = None

    def progress(done: int, total: int) -> None:
        nonlocal began, said, before
        now = time.monotonic()
        if before is None:  # what came before the first point is no point's time
            began, said, before = now, now, done
        if now - said < EVERY_S:
            return
        said = now
        left_s = (now - began) / (done - before) * (total - done)
        click.echo(f"note: {done} of {total} points, about {in_words(left_s)} left", err=True)

    return progress


def in_words(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    for unit, name in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


def planned(plan: "Plan", jobs: int | None) -> dict[str, Any]:
    """Return what there is to do, ready for JSON."""
    from moesim.answers.swept import axes_of

    return {
        "points": plan.points,
        "repeated": plan.grid.count - plan.points,
        "done": plan.done,
        "failed": plan.failed,
        "left": len(plan.tasks),
        "left_s": plan.left_s(jobs),
        "axes": axes_of(plan.grid),
        "fixed": plan.grid.fixed,
    }


def show_plan(plan: "Plan", jobs: int | None) -> None:
    """Print what there is to do."""
    from moesim.answers.grid import text_of

    failed = f" ({plan.failed} of them failed)" if plan.failed else ""
    left_s = plan.left_s(jobs)
    if not plan.tasks:
        left = "nothing is left"
    elif left_s is None:
        left = f"{len(plan.tasks)} are left, which take nobody knows how long: none was run yet"
    else:
        left = (
            f"{len(plan.tasks)} are left, which take about {in_words(left_s)} if they are as those "
            "that are done"
        )
    click.echo(f"{plan.points} points: {plan.done} are done{failed}, {left}")
    if repeated := plan.grid.count - plan.points:
        click.echo(f"{repeated} more are the same as others, and run once")
    click.echo()
    for axis in plan.grid.axes:
        for at, key in enumerate(axis.keys):
            texts = [text_of(values[at]) for values in axis.values]
            more = f", ... ({len(texts)})" if len(texts) > 8 else ""
            together = "  (goes with the one above)" if at else ""
            click.echo(f"  {key}: {', '.join(texts[:8])}{more}{together}")


def show(swept: "Swept", output: Path) -> None:
    """Print the fastest point, the best of each policy, what is worth its memory, and failures."""
    from rich.console import Console

    from moesim.answers.swept import SPEED, front

    console = Console(highlight=False, markup=False)
    best = swept.fastest()
    if best is not None:
        policy = best["run.policy"]
        console.print(f"{best[SPEED]:.2f} tokens/s   policy {policy}", style="bold green")
        at = swept.setting(best)
        console.print(f"the fastest of {len(swept.good)} points{at and ': '}{at}")
        console.print(f"{best['why']}\n")
        show_policies(swept, console)
        show_front(front(swept.good), swept, console)
        show_notices(swept, best, console)
    if swept.failed:
        show_failed(swept, console)
    count = len(swept.good) + len(swept.failed)
    console.print(f"{output}: {count} points, {swept.earlier} of them done before", soft_wrap=True)


def show_policies(swept: "Swept", console: "Console") -> None:
    """Print the best point of each policy."""
    from moesim.answers.swept import MEMORY, SPEED

    policies = swept.by_policy()
    shared = {key for key in swept.others if len({f"{row[key]}" for row in policies}) == 1}
    table = titled("Best point of each policy")
    table.add_column("policy")
    for name in ("tokens/s", "of best", "TTFT ms", "TPOT ms", "GiB", "fastest in"):
        table.add_column(name, justify="right", no_wrap=True)
    at: dict[str, list[str]] = {}
    for row in policies:
        table.add_row(
            row["run.policy"],
            f"{row[SPEED]:.2f}",
            f"{row['share']:.0%}",
            f"{row['ttft_ms']:.1f}",
            "-" if row["tpot_ms"] is None else f"{row['tpot_ms']:.1f}",
            f"{row[MEMORY] / 2**30:.2f}",
            f"{row['fastest_in']} of {row['compared_in']}",
        )
        at.setdefault(swept.setting(row, shared), []).append(row["run.policy"])
    console.print(table)
    console.print(
        "GiB: GPU memory for experts; fastest in: of the settings of everything else", style="dim"
    )
    own = set(swept.others) - shared
    if shared:
        console.print(f"All at {swept.setting(policies[0], own)}", style="dim", soft_wrap=True)
    if own:
        for setting, names in at.items():
            console.print(f"{', '.join(names)}: {setting}", style="dim", soft_wrap=True)
    console.print()


def show_front(rows: "list[Row]", swept: "Swept", console: "Console") -> None:
    """Print the points that are worth their memory; those that are alike in both on one line."""
    from moesim.answers.swept import MEMORY, SPEED

    alike: dict[tuple[float, float], list[Row]] = {}
    for row in rows:
        alike.setdefault((row[MEMORY], row[SPEED]), []).append(row)
    table = titled("Worth their memory: no point is as fast with less")
    for name in ("GiB", "tokens/s"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("policy")
    table.add_column("at")
    for (memory, speed), same in list(alike.items())[:FRONT_SHOWN]:
        others = f" (the same at {len(same) - 1} more)" if len(same) > 1 else ""
        at = swept.setting(same[0]) + others
        table.add_row(f"{memory / 2**30:.2f}", f"{speed:.2f}", same[0]["run.policy"], at)
    console.print(table)
    if len(alike) > FRONT_SHOWN:
        console.print(f"and {len(alike) - FRONT_SHOWN} more, in --json", style="dim")
    console.print()


def show_failed(swept: "Swept", console: "Console") -> None:
    """Print why points cannot run, the most frequent reason first, and one point for each."""
    from moesim.answers.grid import text_of

    reasons = Counter(row["error"] for row in swept.failed)
    console.print(f"{len(swept.failed)} of {len(swept.good) + len(swept.failed)} points cannot run")
    for error, count in reasons.most_common(SHOWN):
        row = next(row for row in swept.failed if row["error"] == error)
        at = ", ".join(f"{key} {text_of(row[key])}" for key in swept.grid.keys)
        such = f"{count} such, the first " if count > 1 else ""
        console.print(f"  {error}" + (f" ({such}at {at})" if at else ""), soft_wrap=True)
    if len(reasons) > SHOWN:
        console.print(f"  and {len(reasons) - SHOWN} other reasons: see the column error")
    console.print()


def show_notices(swept: "Swept", best: "Row", console: "Console") -> None:
    """Print what is to be known of points: of the fastest first, then what is true of most."""
    notices = Counter(line for row in swept.good for line in row["notices"])
    lines = [*best["notices"], *(line for line, _ in notices.most_common(SHOWN))]
    shown = list(dict.fromkeys(lines))
    for line in shown:
        of = ", the fastest among them" if line in best["notices"] else ""
        of = f"{notices[line]} of {len(swept.good)} points{of}"
        console.print(f"note: {line} ({of})", soft_wrap=True)
    if len(notices) > len(shown):
        console.print(f"and {len(notices) - len(shown)} other notes: see the column notices")
    if notices:
        console.print()


def titled(title: str) -> "Table":
    """Return an empty table under a title."""
    from rich.table import Table

    return Table(title=title, title_justify="left", box=None, header_style="dim", pad_edge=False)
