"""`moesim calibrate`: measure this machine, and write the profile that replays then use."""

import itertools
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import check_output, check_regular

if TYPE_CHECKING:
    from rich.console import Console

    from moesim.calibrate.assembly import Assembled
    from moesim.calibrate.calibration import Calibration
    from moesim.calibrate.tables import Finding

DEFAULT_MODEL = "qwen3-30b-a3b"
DEFAULT_BASE = "rtx3090-pcie4-ddr4"
PRECISIONS = ("bf16", "fp16", "fp32", "int8", "int4", "packed8", "packed4", "packed2")
HEADINGS = {"interference": "speed while all are busy"}


@click.command()
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="MODEL",
    help="A model whose shapes are measured: a name that `moesim models` lists, or a config.json;"
    f" its weights are not needed. May be repeated.  [default: {DEFAULT_MODEL}]",
)
@click.option(
    "--device",
    metavar="KIND[:KEY=VALUE,...]",
    help="What computes: cuda is a GPU, cpu this processor alone, emulated this processor in the"
    " place of a GPU. All take cpu_threads (one per core); emulated also takes gpu_threads, memory"
    " (2GiB), and for its link bandwidth (2e9 bytes per second) and latency_ns (20000)."
    "  [default: cuda if there is one, else cpu]",
)
@click.option(
    "--precision",
    "precisions",
    type=click.Choice(PRECISIONS),
    multiple=True,
    help="Weights of the experts that are measured; may be repeated. Without bf16 or fp16 the rates"
    " of processors are not measured.  [default: bf16]",
)
@click.option("--quick", is_flag=True, help="Fewer points and repetitions: a first look.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    help="Where the profile goes, a .yaml.  [default: the one that `moesim replay` uses by itself]",
)
@click.option("--fresh", is_flag=True, help="Measure again what was measured before.")
@click.option(
    "--base",
    default=DEFAULT_BASE,
    metavar="HARDWARE",
    help="Where numbers come from that are not measured: a name that `moesim hardware` lists, or a"
    f" YAML file.  [default: {DEFAULT_BASE}]",
)
def command(
    models: tuple[str, ...], device: str | None, precisions: tuple[str, ...], quick: bool,
    output: Path | None, fresh: bool, base: str,
) -> None:  # fmt: skip
    """Measure what this machine's processor, memory, link and device really do.

    It takes some ten minutes, or one with --quick; let nothing else run meanwhile. Every series
    that is done is kept: interrupted or repeated, the command measures only what is missing. Needs
    moesim[torch].
    """
    from rich.console import Console

    from moesim.calibrate.assembly import assemble, profile_text
    from moesim.calibrate.calibration import count_kept, run_tasks, state_folder, write_text
    from moesim.calibrate.tasks import open_bench, tasks_of
    from moesim.cli import fail
    from moesim.errors import CalibrationError
    from moesim.model import load_model
    from moesim.profile import load_profile, user_profile_path

    path = user_profile_path() if output is None else output
    if output is None:
        check_regular(path)
    else:
        check_output(path)
        if path.suffix not in (".yaml", ".yml"):
            raise CalibrationError(f"--output {path}: a profile's name ends in .yaml or .yml")
    specs = [load_model(name) for name in dict.fromkeys(models or (DEFAULT_MODEL,))]
    rest = load_profile(base)[0]

    bench = open_bench(device, quick=quick)
    try:
        tasks = tasks_of(bench, specs, precisions or ("bf16",))
        check_writable(path.absolute().parent, "--output")
        check_writable(state_folder(), "MOESIM_CACHE_DIR")
        try:
            with Bar(Console(stderr=True), len(tasks)) as bar:
                found = run_tasks(tasks, bench, fresh=fresh, progress=bar.show)
        except KeyboardInterrupt:
            kept = count_kept(tasks, bench)
            fail(
                f"interrupted; {kept} of {len(tasks)} series are kept, "
                "and the same command goes on from there" + (" without --fresh" if fresh else ""),
                130,
            )
    finally:
        bench.device.close()
    made = assemble(found, specs, rest)
    write_text(path, profile_text(made.profile))
    show(Console(highlight=False), found, made)
    click.echo(
        f"Wrote {path}; `moesim replay` on this machine now uses it"
        if path == user_profile_path()
        else f"Wrote {path}; `moesim replay --hardware {path}` uses it"
    )


def check_writable(folder: Path, setting: str) -> None:
    """Raise CalibrationError if no file can be put into a folder, which is made if need be."""
    from moesim.errors import CalibrationError

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise CalibrationError(
            f"{folder}: nothing can be written there ({error.strerror}); {setting} says where else"
        ) from None


class Bar:
    """A bar with the time left on a terminal; elsewhere one line at the beginning."""

    def __init__(self, console: "Console", total: int) -> None:
        """Show nothing yet."""
        from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
        from rich.text import Text

        class Left(ProgressColumn):
            def render(self, task: Any) -> Text:
                left = max(0.0, task.fields["until"] - time.monotonic())
                return Text(f"about {in_words(left)} left")

        self.console = console
        self.progress = Progress(
            TextColumn("{task.completed} of {task.total}"),
            BarColumn(),
            Left(),
            TextColumn("{task.description}", style="dim", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("", total=total, until=0.0)

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def show(self, done: int, total: int, left_s: float, name: str) -> None:
        """Say how far the calibration is."""
        if not self.console.is_terminal and done == 0 and left_s > 0:
            click.echo(f"measuring {total} series, about {in_words(left_s)}", err=True)
        self.progress.update(
            self.task, completed=done, description=name, until=time.monotonic() + left_s
        )


def in_words(seconds: float) -> str:
    """Return a time as one says it."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"


def show(console: "Console", found: "Calibration", made: "Assembled") -> None:
    """Print what was measured, how well, and what was not."""
    from rich.table import Table

    from moesim.calibrate.experts import remarks

    def say(text: str) -> None:
        console.print(text, markup=False)

    say(f"{made.profile.name}: {made.profile.description}")
    reused = [outcome.kept.date for outcome in found.outcomes if outcome.kept and outcome.reused]
    seconds = sum(o.kept.seconds for o in found.outcomes if o.kept and not o.reused)
    new = sum(o.kept is not None and not o.reused for o in found.outcomes)
    say(
        f"{new} series measured in {in_words(seconds)}"
        + (
            f", {len(reused)} kept from {min(reused)} (--fresh measures them again)"
            if reused
            else ""
        )
    )
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("")
    for title in ("measured", "spread", "off by,\nheld out", "points"):
        table.add_column(title, justify="right", no_wrap=True)
    section = ""
    for finding, value in together(made.findings):
        if finding.section != section:
            section = finding.section
            table.add_row(f"[bold]{HEADINGS.get(section, section)}[/bold]")
        table.add_row(
            f"  {finding.what}",
            value,
            "" if finding.spread is None else f"{100 * finding.spread:.1f} %",
            "" if finding.error is None else f"{100 * finding.error:.1f} %",
            str(finding.points) if finding.points else "",
        )
    console.print()
    console.print(table)
    console.print()
    for line in made.misses:
        say(f"misses: {line}")
    for outcome in found.outcomes:
        if outcome.error:
            say(f"failed: {outcome.task}: {outcome.error}")
    for line in (*made.notices, *remarks(found.series)):
        say(f"note: {line}")
    for line in made.absent:
        say(f"not measured: {line}")


def together(findings: Sequence["Finding"]) -> Iterator[tuple["Finding", str]]:
    """Give what makes a row each, and its value: the lanes that slow each other down make one."""
    for key, group in itertools.groupby(
        findings,
        lambda f: (f.section, f.what.partition(":")[0] if f.unit == "factor" else f.what),
    ):
        own = list(group)
        spreads = [finding.spread for finding in own if finding.spread is not None]
        yield (
            own[0]._replace(what=key[1], spread=max(spreads, default=None)),
            ", ".join(map(in_units, own)),
        )


def in_units(finding: "Finding") -> str:
    """Return a number with the unit that people use for it."""
    value = finding.value
    if finding.unit == "ns":
        for scale, unit in ((1e9, "s"), (1e6, "ms"), (1e3, "µs")):
            if value >= scale:
                return f"{value / scale:.3g} {unit}"
        return f"{value:.0f} ns"
    if finding.unit == "bytes":
        return f"{value / 2**20:.4g} MiB"
    if finding.unit == "factor":
        return f"{value:.3f}"
    if finding.unit == "flops_per_s":
        return f"{value / 1e12:.3g} TFLOPS" if value >= 1e11 else f"{value / 1e9:.3g} GFLOPS"
    return f"{value / 1e9:.3g} GB/s"
