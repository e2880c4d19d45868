"""`moesim trace synth`: make up a trace that repeats itself as a model's does."""

from pathlib import Path
from typing import Any

import click

from moesim.cli.common import SHARE, check_regular


@click.command()
@click.option(
    *("--output", "-o"),
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The npz file to write.",
)
@click.option("--preset", default="qwen3-30b", show_default=True, help="A model's shape and drift.")
@click.option("--layers", type=click.IntRange(1), help="MoE layers.  [default: the preset's]")
@click.option("--experts", type=click.IntRange(2), help="Experts per layer.  [default: as above]")
@click.option("--top-k", type=click.IntRange(1), help="Experts per token.  [default: as above]")
@click.option("--sequences", type=click.IntRange(1), default=8, show_default=True)
@click.option(
    "--prompt", type=click.IntRange(1), default=64, show_default=True, help="Tokens of a prompt."
)
@click.option(
    "--generate",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Tokens generated per sequence; the last one is never forwarded and has no row.",
)
@click.option(
    "--domains",
    type=click.IntRange(1),
    default=2,
    show_default=True,
    help="Topics, each with favourites of its own; sequences take turns.",
)
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True)
@click.option(
    "--recall",
    type=SHARE,
    default=0.9,
    show_default=True,
    help="Share of a token's experts that the guess one layer ahead names, as many guessed.",
)
@click.option(
    "--distances",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Guesses recorded: gate1, gate2, ... so many layers ahead.",
)
@click.option(
    "--residual-recall",
    type=SHARE,
    help="Record residual1 too, with this recall.  [default: do not]",
)
@click.option(
    "--width", type=click.IntRange(1), help="Candidates kept per guess.  [default: 3 x top-k]"
)
def command(output: Path, **parameters: Any) -> None:
    """Make up a trace that repeats itself as the preset's model does."""
    from moesim.traces.format import write_trace
    from moesim.traces.synthetic import synthesize

    check_regular(output)
    trace = synthesize(parameters.pop("preset"), **parameters)
    write_trace(trace, output)
    click.echo(f"{output}: {trace.tokens} tokens, {output.stat().st_size} bytes")
