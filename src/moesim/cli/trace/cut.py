"""`moesim trace cut`: part of a trace as a trace of its own."""

import re
from pathlib import Path

import click

from moesim.cli.common import check_output


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="TRACE")
@click.option(
    *("--output", "-o"),
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The npz file to write.",
)
@click.option(
    "--sequences",
    metavar="A:B",
    help="Sequences A to B - 1, counted from 0; either end may be left out.",
)
@click.option("--layers", metavar="A:B", help="Layers A to B - 1, by the model's own numbers.")
@click.option(
    "--phase", type=click.Choice(["prefill", "decode"]), help="Tokens of one phase alone."
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    help="The first so many tokens of each sequence, of those that --phase leaves.",
)
@click.option("--drop", metavar="NAME,...", help="Leave out the guesses of these predictors.")
def command(
    path: Path,
    output: Path,
    sequences: str | None,
    layers: str | None,
    phase: str | None,
    tokens: int | None,
    drop: str | None,
) -> None:
    """Take part of a trace: some sequences, tokens, layers or predictors.

    Sequences and positions keep their numbers. A trace without all its layers shows how some of
    them behave, and is refused where a whole model is needed.
    """
    from moesim.errors import InputError
    from moesim.traces.edit import take
    from moesim.traces.format import rows_by_sequence, write_trace
    from moesim.traces.importers import load_trace

    check_output(output)
    if output.resolve() == path.resolve():
        raise InputError(f"--output {output} is the trace itself; name another file")
    part = take(
        load_trace(path),
        sequences=_range("--sequences", sequences),
        layers=_range("--layers", layers),
        phase=phase,
        tokens=tokens,
        drop=[name.strip() for name in drop.split(",")] if drop else (),
    )
    write_trace(part, output)
    count = len(rows_by_sequence(part)[1]) - 1
    click.echo(
        f"{output}: {part.tokens} tokens of {count} sequences, {part.layers} layers, "
        f"{output.stat().st_size} bytes"
    )


def _range(option: str, text: str | None) -> tuple[int, int | None]:
    from moesim.errors import InputError

    match = re.fullmatch(r"(\d{0,9}):(\d{0,9})", text or ":")
    if match is None:
        raise InputError(f"{option} {text}: write A:B, as 0:16, 16: or :16")
    return int(match[1] or 0), int(match[2]) if match[2] else None
