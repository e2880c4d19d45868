"""`moesim trace join`: traces of one model as one."""

from pathlib import Path

import click

from moesim.cli.common import check_output


@click.command()
@click.argument("paths", nargs=-1, type=click.Path(path_type=Path), metavar="TRACE TRACE...")
@click.option(
    *("--output", "-o"),
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The npz file to write.",
)
def command(paths: tuple[Path, ...], output: Path) -> None:
    """Put traces of one model together, one after the other.

    Sequences are numbered anew. What not all of them recorded is dropped, with a note.
    """
    from moesim.errors import InputError
    from moesim.traces.edit import join
    from moesim.traces.format import rows_by_sequence, write_trace
    from moesim.traces.importers import load_trace

    check_output(output)
    if len(paths) < 2:
        raise InputError(f"{len(paths)} traces to join; give at least 2")
    if output.resolve() in [path.resolve() for path in paths]:
        raise InputError(f"--output {output} is one of the traces; name another file")
    joined, notes = join([load_trace(path) for path in paths], [str(path) for path in paths])
    write_trace(joined, output)
    for note in notes:
        click.echo(f"note: {note}", err=True)
    count = len(rows_by_sequence(joined)[1]) - 1
    click.echo(
        f"{output}: {joined.tokens} tokens of {count} sequences, {output.stat().st_size} bytes"
    )
