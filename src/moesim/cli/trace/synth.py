"""`moesim trace synth`: make up a trace that repeats itself as a model's does, or as a trace."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from moesim.cli.common import SHARE, check_regular

if TYPE_CHECKING:
    from moesim.traces.format import Trace

WITH_LIKE = frozenset({"output", "like", "sequences", "prompt", "generate", "seed"})
"""What may be said beside --like; the trace has the rest."""

NAMES = {
    "reuse": "used again {} tokens later",
    "lru": "hit rate of an LRU cache of {} experts",
    "active": "distinct experts of {} tokens",
    "recall": "recall of {}",
}
SKEW = {
    "entropy": "entropy of popularity (1: all alike)",
    "cov90": "experts that hold 90 % of the traffic",
    "top25": "hottest quarter of the experts holds",
}


@click.command()
@click.option(
    *("--output", "-o"),
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The npz file to write.",
)
@click.option(
    "--like",
    type=click.Path(path_type=Path),
    metavar="TRACE",
    help="Make a statistical twin of this trace, of its shape, with its sequences and predictors.",
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
def command(output: Path, like: Path | None, **parameters: Any) -> None:
    """Make up a trace that repeats itself as the preset's model does, or as another trace.

    With --like, sequences, prompts and generated tokens are the trace's own unless given, and a
    table says how near the copy came.
    """
    from moesim.traces.format import write_trace
    from moesim.traces.synthetic import synthesize

    check_regular(output)
    if like is not None:
        _copy(like, output, _given(click.get_current_context()))
        return
    trace = synthesize(parameters.pop("preset"), **parameters)
    write_trace(trace, output)
    _say(trace, output)


def _given(context: click.Context) -> dict[str, Any]:
    """Return the parameters that were typed; raise InputError for what --like excludes."""
    from moesim.errors import InputError

    default = (ParameterSource.DEFAULT, ParameterSource.DEFAULT_MAP)
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) not in default
    }
    excluded = [f"--{name.replace('_', '-')}" for name in sorted(given.keys() - WITH_LIKE)]
    if excluded:
        raise InputError(
            f"--like takes that from the trace: leave out {', '.join(excluded)}; legal beside it "
            "are --sequences, --prompt, --generate, --seed"
        )
    return {name: value for name, value in given.items() if name not in ("output", "like")}


def _copy(like: Path, output: Path, given: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from moesim.errors import InputError, TraceError
    from moesim.traces.fit import compare, copy, fit
    from moesim.traces.format import write_trace
    from moesim.traces.importers import load_trace

    if output.resolve() == like.resolve():
        raise InputError(f"--output {output} is the trace itself; name another file")
    trace = load_trace(like)
    try:
        fitted = fit(trace)
    except TraceError as error:
        raise TraceError(f"{like}: {error}") from error
    copied = copy(fitted, **given)
    write_trace(copied, output)
    _say(copied, output)

    table = Table(title="Means over layers", title_justify="left", box=None, header_style="dim")
    table.add_column("")
    for column in ("trace", "copy", "difference"):
        table.add_column(column, justify="right")
    for statistic, of, one, other in compare(trace, copied):
        if one is None or other is None:  # sequences are too short for it
            continue
        digits = 1 if statistic == "active" else 3
        numbers = (f"{one:.{digits}f}", f"{other:.{digits}f}", f"{other - one:+.{digits}f}")
        name = SKEW[of] if statistic == "skew" else NAMES[statistic].format(of)
        table.add_row(name, *numbers)
    console = Console()
    console.print()
    console.print(table)


def _say(trace: "Trace", output: Path) -> None:
    click.echo(f"{output}: {trace.tokens} tokens, {output.stat().st_size} bytes")
