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
    from moesim.traces.importers import load_trace
    from moesim.traces.stats import summary

    found = summary(load_trace(path))
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
    if found["missing"]:
        lines.append(f"{found['missing']:.1%} of all choices are missing, and counted nowhere")
    if not found["rank_order"]:
        lines.append("a token's experts are in no order: their ranks mean nothing")
    if found["tokens_examined"] < found["tokens"]:
        lines.append(f"below: the first {found['tokens_examined']} tokens")
    console.print("\n".join(lines), markup=False, soft_wrap=True)
    for table in (_hits, _reuse, _depth, _recall, _recall_by_layer, _popularity):
        console.print()
        console.print(table(found))


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
    return _by_layer(
        "Experts used again by the next token, by layer", {"share": found["reuse_by_layer"]}
    )


def _recall(found: dict[str, Any]) -> "Table":
    recall = found["recall"]
    narrow, wide = str(found["top_k"]), str(2 * found["top_k"])
    widths = [width for width in (narrow, wide) if width in recall["chance"]]
    distances = ("1", "2", "3")
    table = _table(
        f"Needed experts among the first {' or '.join(widths)} that are guessed (recall), "
        f"{recall['tokens']} {recall['phase']} tokens",
        "layers ahead\ncandidates",
    )
    for distance in distances:
        for width in widths:
            table.add_column(f"{distance if width == narrow else ''}\n{width}", justify="right")
    for name, by_distance in _best_first(found).items():
        shares = [by_distance.get(d, {"at": {}})["at"].get(w) for d in distances for w in widths]
        table.add_row(name, *map(_text, shares))
    table.add_row("at random", *(_text(recall["chance"][w]) for _ in distances for w in widths))
    if recall["router"] is not None:
        table.add_row("the router itself", _text(recall["router"]))
    if recall["left_out"]:
        why = "; ".join(f"{name} {reason}" for name, reason in recall["left_out"].items())
        table.caption = f"Without {why}"
        table.caption_justify = "left"
    return table


def _recall_by_layer(found: dict[str, Any]) -> "Table":
    rows = {name: d["1"]["by_layer"] for name, d in _best_first(found).items() if "1" in d}
    return _by_layer(f"Recall of the first {found['top_k']}, one layer ahead, by layer", rows)


def _best_first(found: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of each predictor by label, the best for the next layer first."""
    labelled = {}
    for name, by_distance in found["recall"]["predictors"].items():
        share, *deeper = by_distance["1"]["by_layer"] if "1" in by_distance else [None]
        only = share is not None and deeper and not any(x is not None for x in deeper)
        labelled[f"{name}, layer 0" if only else name] = by_distance

    def recall(label: str) -> float:
        share = labelled[label].get("1", {"at": {}})["at"].get(str(found["top_k"]))
        return share or 0.0

    return {label: labelled[label] for label in sorted(labelled, key=recall, reverse=True)}


def _by_layer(title: str, rows: dict[str, list[float | None]]) -> "Table":
    """Return the means over groups of layers, of rows that have a number for each layer."""
    table = _table(title, "layers")
    table.padding = (0, 0, 0, 1)  # nine numbers beside a name, in 80 columns
    layers = max(map(len, rows.values()), default=0)
    borders = sorted({0, 1, *(round(layers * eighth / 8) for eighth in range(1, 9))})
    groups = [(a, b) for a, b in pairwise(borders) if a < layers]
    for first, end in groups:
        name = str(first) if end == first + 1 else f"{first}-{end - 1}"
        table.add_column(name, justify="right")
    for label, by_layer in rows.items():
        means = []
        for first, end in groups:
            known = [value for value in by_layer[first:end] if value is not None]
            means.append(sum(known) / len(known) if known else None)
        table.add_row(label, *map(_text, means))
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
