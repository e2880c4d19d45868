"""`moesim trace info`: the statistics of a trace that decide between policies."""

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import print_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="TRACE")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else.")
def command(path: Path, as_json: bool) -> None:
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
