"""`moesim cache`: how often caches of each rule and size hit, without any notion of time."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import print_json

if TYPE_CHECKING:
    from moesim.sim.curves import Curves


@click.command()
@click.argument("trace", required=False, type=click.Path(path_type=Path))
@click.option(
    "--rule",
    default="lru,lfu,fifo,belady",
    show_default=True,
    metavar="RULE,...",
    help="Who leaves; belady knows the future.",
)
@click.option(
    "--sizes",
    metavar="N,...",
    help="Experts that a layer's cache holds.  [default: 1/16 to 3/4 of them]",
)
@click.option(
    "--clock",
    default="token",
    show_default=True,
    metavar="token|access",
    help="What LRU and Belady count; by access, all rules are libCacheSim's.",
)
@click.option(
    "--model", metavar="NAME|PATH", help="Whose trace it is, for files that do not say it."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def command(
    trace: Path | None, rule: str, sizes: str | None, clock: str, model: str | None, as_json: bool
) -> None:
    """Say how often caches of each rule and size hit, layer by layer.

    Without TRACE, the example that ships with moesim. Every token counts, prefill and decode. One
    cache per layer, empty at first; experts are looked up one by one and admitted at once.
    """
    from moesim.model import load_model
    from moesim.sim.curves import curves
    from moesim.traces.bundled import example_path
    from moesim.traces.importers import load_trace
    from moesim.traces.stats import cache_sizes

    rules = list(dict.fromkeys(name.strip() for name in rule.split(",")))
    wanted = None if sizes is None else numbers(sizes)
    routing = load_trace(
        trace or example_path(), spec=load_model(model) if model is not None else None
    )
    found = curves(
        routing, rules, wanted or cache_sizes(routing), clock,
        say=lambda line: click.echo(f"note: {line}", err=True),
    )  # fmt: skip
    about = {
        "model": routing.meta.get("model"),
        "digest": routing.digest(),
        "tokens": routing.tokens,
        "layers": routing.layers,
        "experts": routing.n_experts,
        "top_k": routing.top_k,
        "lookups": int(found.lookups.sum()),
        "clock": clock,
    }
    if as_json:
        print_json({**about, "curves": rows(found)})
    else:
        show(about, found)


def numbers(sizes: str) -> list[int]:
    """Return the sizes of a list, each once; raise InputError for what is no number."""
    from moesim.errors import InputError

    words = [word.strip() for word in sizes.split(",")]
    for word in words:
        if not re.fullmatch(r"-?[0-9]{1,9}", word):
            raise InputError(f"--sizes {word!r}: write whole numbers of experts, as 8,16,32")
    return sorted({int(word) for word in words})


def rows(found: "Curves") -> list[dict[str, Any]]:
    """Return one row per rule, size and layer, counted from 0; null where nothing is looked up."""
    by_rule = zip(found.rules, found.hit_rates().tolist(), strict=True)
    return [
        {"rule": rule, "size": size, "layer": layer, "hit_rate": rate if looked_up else None}
        for rule, by_size in by_rule
        for size, by_layer in zip(found.sizes, by_size, strict=True)
        for layer, (rate, looked_up) in enumerate(zip(by_layer, found.lookups > 0, strict=True))
    ]


def show(about: dict[str, Any], found: "Curves") -> None:
    """Print a row per size: of each rule the mean over layers, and the range."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    console.print(
        f"{about['model'] or 'unnamed model'}: {about['tokens']} tokens, {about['layers']} layers "
        f"of {about['experts']} experts, top-{about['top_k']}; {about['lookups']} lookups\n",
        soft_wrap=True,
    )
    table = Table(
        title="Hit rate in %, mean over layers (lowest to highest layer)", title_justify="left",
        box=None, header_style="dim", pad_edge=False,
    )  # fmt: skip
    table.add_column("experts per layer", no_wrap=True)
    for rule in found.rules:
        table.add_column(rule, justify="right", no_wrap=True)
    rates = found.hit_rates()[:, :, found.lookups > 0] * 100
    for i, size in enumerate(found.sizes):
        cells = [
            f"{by_layer.mean():.1f} ({by_layer.min():.0f}-{by_layer.max():.0f})"
            if by_layer.size
            else "-"
            for by_layer in rates[:, i]
        ]
        table.add_row(f"{size} ({size / about['experts']:.0%})", *cells)
    console.print(table)
    if "belady" in found.rules:
        console.print(f"\n{BOUND[about['clock']]}", soft_wrap=True)


BOUND = {
    "token": "belady knows which token uses an expert next; what others lack to it they lose by "
    "not knowing.",
    "access": "belady knows the future: no rule that admits what is absent hits more often.",
}
