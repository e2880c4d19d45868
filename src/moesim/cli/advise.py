"""`moesim advise`: for a model on a machine, which policy, how fast, and what limits it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import print_json
from moesim.cli.replay import SETTINGS, policies_with_parameters, with_progress

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

SECTIONS_IN_WORDS = {
    "gpu": "the GPU",
    "cpu": "the CPU and its memory",
    "link": "PCIe",
    "host": "the host program",
}
MEMORY_IN_WORDS = {
    "other_weights": "weights outside the experts",
    "kv_cache": "keys and values",
    "reserve": "activations, runtime",
    "experts": "experts",
    "free": "left over",
}
GIB = 1 << 30


@click.command()
@click.argument("model")
@click.option(
    "--hardware",
    metavar="NAME|PATH",
    help="Name or YAML file.  [default: this machine's profile, else a preset]",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path),
    help="Routing of your own prompts.  [default: made up after statistics]",
)
@click.option(
    "--context",
    type=click.IntRange(1),
    default=4096,
    show_default=True,
    help="Tokens of each sequence, prompt included.",
)
@click.option(
    "--bits",
    type=click.Choice(["16", "8", "4"]),
    default="16",
    show_default=True,
    help="Precision of the experts.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences at once."
)
@SETTINGS
@click.option(
    "--policies",
    metavar="NAME,NAME...|all",
    help="Compare these, with their default parameters.  [default: those that tend to be fast]",
)
@policies_with_parameters
@click.option(
    "--allow-changes",
    is_flag=True,
    help="Recommend policies that change the model's results, too.",
)
@click.option("--jobs", type=click.IntRange(1), help="Processes.  [default: one per core]")
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def command(
    model: str,
    bits: str,
    policies: str | None,
    specs: tuple[str, ...],
    as_json: bool,
    **options: Any,
) -> None:
    """Say which policy and settings are fastest for MODEL here, what limits it, what would help.

    MODEL is a name, or the path of a config.json. Every number is that of a simulation.
    """
    from moesim.answers.advise import advise
    from moesim.answers.compare import names_in

    named = [*(names_in(policies) if policies is not None else ()), *specs]
    found: Any = with_progress(
        lambda progress: advise(
            model, bits=int(bits), policies=named or None, progress=progress, **options
        ),
        "simulating",
    )
    for line in found.data["notices"]:
        click.echo(f"note: {line}", err=True)
    if as_json:
        print_json(found.data)
    else:
        show(found.data)


def show(data: dict[str, Any]) -> None:
    """Print the answer first, then what it rests on."""
    from rich.console import Console

    from moesim.answers.advise import headline
    from moesim.answers.memory import ways_out

    console = Console(highlight=False, markup=False)
    good = data["recommended"] is not None
    console.print(headline(data), style="bold green" if good else "bold red", soft_wrap=True)
    if good:
        show_policies(console, data)
    else:
        for line in ways_out(data):
            console.print(line, soft_wrap=True)
    show_memory(console, data)
    if good:
        show_limits(console, data)
        show_upgrades(console, data)
        show_engines(console, data)


def table(*columns: str) -> "Table":
    """Return an empty table whose first and last columns are texts."""
    from rich.table import Table

    grid = Table(box=None, header_style="dim", pad_edge=False)
    for at, name in enumerate(columns):
        text = at in (0, len(columns) - 1)
        grid.add_column(name, justify="left" if text else "right", no_wrap=at == 0)
    return grid


def show_policies(console: "Console", data: dict[str, Any]) -> None:
    """Print how fast each policy is."""
    best = data["recommended"]
    prefill = (
        f"Prefill {best['prefill_tokens_per_s']:.0f} tokens/s ({best['prefill_low']:.0f}-"
        f"{best['prefill_high']:.0f})"
    )
    exact = [row for row in data["candidates"] if not row["changes"] or best["changes"]]
    other = max(exact, key=lambda row: float(row["prefill_tokens_per_s"]))
    if other["prefill_tokens_per_s"] > best["prefill_tokens_per_s"]:
        prefill += f"; {other['policy']} prefills faster, {other['prefill_tokens_per_s']:.0f}"
    console.print(f"{prefill}\n{best['why']}\n", soft_wrap=True)
    grid = table("tokens/s by policy", "decode", "prefill", "")
    for row in data["candidates"]:
        said = [changes_in_words(row["changes"])] if row["changes"] else []
        said += ["recommended"] if row["policy"] == best["policy"] else []
        said += ["decodes as --n-cpu-moe"] if row["policy"] == "static" else []
        grid.add_row(
            row["policy"],
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['prefill_tokens_per_s']:.0f}",
            "; ".join(said),
        )
    console.print(grid)
    for row in data["refused"]:
        console.print(f"{row['policy']} cannot run: {row['error']}", soft_wrap=True)


def changes_in_words(changes: str) -> str:
    """Return why a policy is not recommended by itself."""
    from moesim.answers.verdict import FUTURE

    return changes if changes == FUTURE else f"not exact: {changes}"


def show_memory(console: "Console", data: dict[str, Any]) -> None:
    """Print who gets the memory."""
    from moesim.answers.memory import each_of

    memory = data["memory"]
    console.print(f"\nGPU memory {memory['gpu_bytes'] / GIB:.1f} GiB", style="bold")
    lines = []
    for name, size in memory["gpu"].items():
        said = ""
        if name == "experts":
            said = (
                f"  {memory['experts']} of {memory['all_experts']} ({memory['share']:.0%}) in "
                f"{data['bits']} bit"
            )
        elif name == "kv_cache":
            said = f"  {data['context']} tokens{each_of(data['batch'])}"
        what = "missing" if size < 0 else MEMORY_IN_WORDS[name]
        lines.append(f"{size / GIB:8.2f} GiB  {what}{said}")
    if data["fits"] != "wholly":
        shares = ", ".join(f"{one['share']:.0%} at {one['bits']} bit" for one in memory["by_bits"])
        lines.append(
            f"Room for experts: {shares}; host memory {memory['host_bytes'] / GIB:.0f} GiB"
        )
    console.print("\n".join(lines), soft_wrap=True)
    longest = memory["most_context_wholly"] if data["fits"] == "wholly" else memory["most_context"]
    if data["fits"] != "no" and longest:
        console.print(
            f"Longest context: {longest} tokens{each_of(data['batch'])}"
            + (
                " with all experts on the GPU"
                if data["fits"] == "wholly"
                else ", which leaves no room for experts"
            ),
            soft_wrap=True,
        )


def show_limits(console: "Console", data: dict[str, Any]) -> None:
    """Print what the decode speed hangs on, and what pure bandwidth would say."""
    limits, naive = data["limits"], data["naive"]
    console.print(f"\nLimit: {SECTIONS_IN_WORDS[limits['section']]}", style="bold")
    costs = ", ".join(
        f"{SECTIONS_IN_WORDS[name]} {cost:+.1%}"
        for name, cost in sorted(limits["slower_by_10_percent"].items(), key=lambda one: -one[1])
    )
    busy = ", ".join(f"{name} {share:.0%}" for name, share in limits["lanes"].items())
    console.print(f"Time per token if this took 10 % longer: {costs}\nBusy: {busy}", soft_wrap=True)
    console.print(
        f"Pure bandwidth would say {naive['dram_tokens_per_s']:.1f} tokens/s (all active experts "
        f"from DRAM) or {naive['link_tokens_per_s']:.1f} (all over PCIe)"
        f"{' for one sequence' * (data['batch'] > 1)}",
        soft_wrap=True,
    )


def show_upgrades(console: "Console", data: dict[str, Any]) -> None:
    """Print what a better machine would bring."""
    console.print()
    grid = table("Upgrade", "decode", "gain", "with")
    for row in data["upgrades"]:
        grid.add_row(
            row["upgrade"],
            f"{row['decode_tokens_per_s']:.1f}",
            f"{row['gain']:+.0%}",
            row["policy"],
        )
    console.print(grid)


def show_engines(console: "Console", data: dict[str, Any]) -> None:
    """Print flags to paste, and what to expect of them."""
    for row in data["engines"]:
        late = f", not exact: {row['changes']}" if row["changes"] else ""
        console.print(
            f"\n{row['engine']}: {row['decode_tokens_per_s']:.1f} tokens/s, prefill "
            f"{row['prefill_tokens_per_s']:.0f}{late}",
            style="bold",
            soft_wrap=True,
        )
        console.print(f"  {row['flags']}", soft_wrap=True)
        for note in row["notes"]:
            console.print(f"  {note}", style="dim", soft_wrap=True)
