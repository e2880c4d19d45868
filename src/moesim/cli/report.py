"""`moesim report`: one HTML file of what other commands have written."""

from pathlib import Path

import click

from moesim.cli.common import check_output


@click.command()
@click.argument(
    "runs", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option(
    "--output",
    "-o",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="The file to write.",
)
@click.option("--title", help="What stands above everything.  [default: model and machine]")
def command(runs: tuple[Path, ...], output: Path, title: str | None) -> None:
    """Make one HTML file of results, which needs no network: tables, pictures, timelines.

    RUNS are what `moesim replay --json` has printed, or `real`, `compare`, `validate` or `advise`
    with that option, what `--timeline` has written (.json or .json.gz), and tables of `moesim
    sweep`; what a file is, is seen from what is in it. Replays of one workload on one machine are
    compared with each other. Needs moesim[analysis].
    """
    from moesim.answers.report import report
    from moesim.errors import InputError

    check_output(output)
    if output.resolve() in {path.resolve() for path in runs}:
        raise InputError(f"--output {output}: is one of the files to report on")
    report(list(runs), output, title)
    click.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB, open it in a browser")
