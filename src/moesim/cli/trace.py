"""`moesim trace`: look into a routing trace, or make one."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import SHARE, Commands, check_regular, print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@click.group(cls=Commands, invoke_without_command=True)
@click.pass_context
def command(context: click.Context) -> None:
    """Look into a routing trace, or make one."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@command.command()
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
def synth(output: Path, **parameters: Any) -> None:
    """Make up a trace that repeats itself as the preset's model does."""
    from moesim.traces.format import write_trace
    from moesim.traces.synthetic import synthesize

    check_regular(output)
    trace = synthesize(parameters.pop("preset"), **parameters)
    write_trace(trace, output)
    click.echo(f"{output}: {trace.tokens} tokens, {output.stat().st_size} bytes")


@command.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="TRACE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
def info(path: Path, as_json: bool) -> None:
    """Show what decides policies: locality, popularity, working set, hits by cache size."""
    from moesim.traces.format import read_trace
    from moesim.traces.stats import summary

    found = summary(read_trace(path))
    if as_json:
        print_json(found)
        return
    from rich.console import Console

    _print(found, Console())


def _print(found: dict[str, Any], console: "Console") -> None:
    span = found["sequence_tokens"]
    model = found["model"] or "unnamed model"
    predictors = ", ".join(found["predictors"]) or "none"
    lines = [
        f"{model}: {found['layers']} layers, {found['experts']} experts, top-{found['top_k']}; "
        f"{found['tokens']} tokens ({found['prefill_tokens']} prefill, "
        f"{found['decode_tokens']} decode) in {found['sequences']} sequences of "
        f"{span['min']} to {span['max']}",
        f"router weights {'' if found['weights'] else 'not '}recorded; guesses: {predictors}",
    ]
    if found["tokens_examined"] < found["tokens"]:
        lines.append(f"below: the first {found['tokens_examined']} tokens")
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    for table in (_hits(found), _reuse(found), _depth(found), _popularity(found)):
        console.print()
        console.print(table)


def _hits(found: dict[str, Any]) -> "Table":
    ratios = found["hit_ratio"]
    table = _table("Hit rate of a cache of so many experts per layer, mean over layers", "rule")
    for size in ratios["lru"]:
        table.add_column(f"{size} ({int(size) / found['experts']:.0%})", justify="right")
    names = {
        "static": "static: hottest of first fifth",
        "lru": "LRU",
        "belady": "ideal: knows the future",
    }
    for key, name in names.items():
        table.add_row(name, *map(_text, ratios[key].values()))
    return table


def _reuse(found: dict[str, Any]) -> "Table":
    table = _table("Experts used again so many tokens later (mean over layers)", "tokens later")
    for lag in found["reuse"]:
        table.add_column(lag, justify="right")
    table.add_column("by chance", justify="right")
    table.add_row("share", *map(_text, [*found["reuse"].values(), found["skew"]["chance"]]))
    return table


def _depth(found: dict[str, Any]) -> "Table":
    by_layer = found["reuse_by_layer"]
    table = _table("Experts used again by the next token, by layer", "layers")
    layers = len(by_layer)
    borders = sorted({0, 1, *(round(layers * eighth / 8) for eighth in range(1, 9))})
    groups = [(a, b) for a, b in pairwise(borders) if a < layers]
    means = []
    for first, end in groups:
        name = str(first) if end == first + 1 else f"{first}-{end - 1}"
        table.add_column(name, justify="right")
        known = [value for value in by_layer[first:end] if value is not None]
        means.append(sum(known) / len(known) if known else None)
    table.add_row("share", *map(_text, means))
    return table


def _popularity(found: dict[str, Any]) -> "Table":
    table = _table("Popularity and working set (mean over layers)", "what")
    table.add_column("", justify="right")
    skew = found["skew"]
    table.add_row("hottest quarter of the experts holds", _text(skew["top25"]))
    table.add_row("experts that hold 90 % of the traffic", _text(skew["cov90"]))
    table.add_row("hottest expert over the mean", _text(skew["max_over_mean"]))
    table.add_row("entropy (1: all alike)", _text(skew["entropy"]))
    for span, distinct in found["active"].items():
        table.add_row(f"distinct experts of {span} tokens", _text(distinct, 1))
    for span, best in found["srp"].items():
        table.add_row(f"best guess for {span} tokens at once (SRP, F1)", _text(best))
    return table


def _table(title: str, first: str) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=None, header_style="dim")
    table.add_column(first, no_wrap=True)
    return table


def _text(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
