"""`moesim replay`: one policy, one trace, one machine: how fast, and why."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import SHARE, check_output, print_json, setting_pairs, write_rows

if TYPE_CHECKING:
    from moesim.sim.replay import Replayed

REFERENCES = ("on-demand", "oracle")
"""The policies that stand for 0 % and 100 % of what can be gained."""


MACHINE_OPTIONS = (
    click.option(
        "--hardware",
        metavar="NAME|PATH",
        help="Name or YAML file.  [default: this machine's profile, else a preset]",
    ),
    click.option(
        "--budget",
        metavar="SIZE",
        help="GPU memory for experts, staging included, as 8GiB.  [default: what is left]",
    ),
    click.option("--cache-ratio", type=SHARE, help="The budget as a share of all experts."),
    click.option(
        "--bits",
        type=click.Choice(["16", "8", "4"]),
        default="16",
        show_default=True,
        help="Precision of the experts, stored and copied.",
    ),
)
"""Machine and budget, without `SETTINGS`."""

SETTINGS = click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    callback=lambda _context, _parameter, value: setting_pairs(value),
    help="Change a number of the hardware profile, as link.h2d.bytes_per_s=55e9.",
)

RUN_OPTIONS = (
    click.argument("trace", required=False, type=click.Path(path_type=Path)),
    click.option(
        "--model", metavar="NAME|PATH", help="Name or config.json.  [default: the trace's]"
    ),
    *MACHINE_OPTIONS,
    click.option(
        "--batch",
        type=click.IntRange(1),
        default=1,
        show_default=True,
        help="Sequences in all; a policy may split them into batches.",
    ),
    click.option("--prompt", type=click.IntRange(1), help="Tokens of each prompt."),
    click.option(
        "--generate",
        type=click.IntRange(1),
        help="Tokens to generate; the prompt's own step gives the first.",
    ),
    click.option(
        "--start",
        type=click.IntRange(0),
        default=0,
        show_default=True,
        help="Skip so many sequences, or windows, of the trace.",
    ),
    click.option("--layers", type=click.IntRange(1), help="Run the first so many MoE layers only."),
    click.option("--repeat", is_flag=True, help="Let tokens of the trace serve several sequences."),
    SETTINGS,
)
"""What is run: trace, model, machine, budget and workload; `answers.inputs` loads them."""


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of RUN_OPTIONS."""
    for option in reversed(RUN_OPTIONS):
        function = option(function)
    return function


policy_option = click.option(
    "--policy",
    default="dali",
    show_default=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="A policy and its parameters; `moesim policies` lists them.",
)
policies_with_parameters = click.option(
    "--policy",
    "specs",
    multiple=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="A policy and its parameters; may be repeated, and is added to --policies.",
)
OUTPUT_OPTIONS = (
    click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout."),
    click.option(
        "--timeline",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write a Chrome trace for Perfetto (.json or .json.gz).",
    ),
    click.option(
        "--csv",
        "csv_path",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Write one row per step.",
    ),
    click.option(
        "--plot",
        type=click.Path(dir_okay=False, path_type=Path),
        help="Draw where the time went, and a few layers of one step (.png, .svg or .pdf).",
    ),
)
"""Where the results of one run go; see `check_outputs` and `write_outputs`."""


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of OUTPUT_OPTIONS."""
    for option in reversed(OUTPUT_OPTIONS):
        function = option(function)
    return function


@click.command()
@policy_option
@run_options
@click.option(
    "--machine",
    type=click.Choice(["auto", "simpy", "compiled"]),
    default="auto",
    show_default=True,
    help="What simulates: both give the same results, compiled is many times as fast once it is "
    "compiled, and auto takes it if that pays.",
)
@click.option(
    "--jitter",
    type=SHARE,
    default=0.0,
    show_default=True,
    help="Stretch each operation at random by up to this share.",
)
@click.option("--seed", type=click.IntRange(0, (1 << 31) - 1), default=0, show_default=True)
@click.option(
    "--share",
    is_flag=True,
    help="Replay on-demand and oracle, too, and say how far from one to the other the policy gets.",
)
@output_options
def command(
    policy: str,
    machine: str,
    jitter: float,
    seed: int,
    share: bool,
    as_json: bool,
    timeline: Path | None,
    csv_path: Path | None,
    plot: Path | None,
    **inputs: Any,
) -> None:
    """Replay a routing trace through a policy on a simulated machine.

    Without TRACE, the example that ships with moesim.
    """
    from moesim.answers.inputs import Inputs
    from moesim.policies.registry import choose
    from moesim.sim.engine import machine_for
    from moesim.sim.metrics import share_of_gain, summarize
    from moesim.sim.replay import replay

    chosen = choose(policy)
    check_outputs(inputs["trace"], timeline, csv_path, plot)
    given = Inputs.load(**inputs)
    prepared = given.prepare(chosen, seed)
    for line in (*given.notices, *prepared.notices):
        click.echo(f"note: {line}", err=True)
    references = [given.prepare(choose(name), seed) for name in REFERENCES if share]
    wanted, stretch = machine, round(jitter * 1024)
    machine = machine_for(prepared, wanted, lambda line: click.echo(f"note: {line}", err=True))
    run = with_progress(
        lambda progress: replay(
            prepared, machine=machine, seed=seed, jitter=stretch,
            record=timeline is not None or plot is not None, progress=progress,
        )
    )  # fmt: skip
    others = [
        replay(other, machine=machine_for(other, wanted, lambda _: None), seed=seed, jitter=stretch)
        for other in references
    ]
    write_outputs(run, timeline, csv_path, plot)
    result = summarize(run)
    if share:
        on_demand_ns, oracle_ns = (other.heads[-1].now_ns for other in others)
        result["gain"] = {
            "share": share_of_gain(result["makespan_ns"], on_demand_ns, oracle_ns),
            "on_demand_ns": on_demand_ns,
            "oracle_ns": oracle_ns,
        }
    if as_json:
        print_json(result)
    else:
        show(result, run)


def with_progress(work: Any, what: str = "replaying") -> "Replayed":
    """Do the work, with a progress bar if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    run: Replayed
    if not console.is_terminal:
        run = work(None)
        return run
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        run = work(lambda done, total: bar.update(task, completed=done, total=total))
    return run


def check_outputs(
    trace: Path | None, timeline: Path | None, csv_path: Path | None, plot: Path | None
) -> None:
    """Raise InputError for files that cannot be written, or that are the same one."""
    from moesim.errors import InputError

    outputs = [path for path in (timeline, csv_path, plot) if path is not None]
    for path in outputs:
        check_output(path)
    if plot is not None:
        from moesim.real.plots import check_picture

        check_picture(plot)
    taken = [path.resolve() for path in (*outputs, *filter(None, [trace]))]
    if len(set(taken)) < len(taken):
        raise InputError("TRACE, --plot, --timeline and --csv must be different files")


def write_outputs(
    run: "Replayed", timeline: Path | None, csv_path: Path | None, plot: Path | None
) -> None:
    """Write the files that were asked for."""
    if timeline is not None:
        from moesim.sim.timeline import write_timeline

        write_timeline(run, timeline)
    if csv_path is not None:
        from moesim.sim.metrics import by_step

        write_rows(by_step(run), csv_path)
    if plot is not None:
        from moesim.answers.plots import draw_run

        draw_run(run, plot)


def gain_in_words(result: dict[str, Any]) -> str:
    """Return how far a policy gets from on-demand to oracle, which are given in tokens/s."""
    gain, tokens = result["gain"], result["output_tokens"]
    slow, fast = (tokens * 1e9 / gain[f"{name}_ns"] for name in ("on_demand", "oracle"))
    between = f"from on-demand ({slow:.2f} tokens/s) to oracle ({fast:.2f})"
    if gain["share"] is None:
        return f"Nothing is to be gained {between}"
    return f"{gain['share']:.1%} of the time that is to be gained {between}"


LINK_NAMES = {
    "kv_in": "KV in",
    "kv_out": "KV out",
    "activations_out": "to CPU",
    "activations_in": "from CPU",
}


def show(result: dict[str, Any], run: "Replayed", stderr: bool = False) -> None:
    """Print what the user came for first, then where the time went."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.table import Table

    from moesim.sim.metrics import explain
    from moesim.sizes import size_in_words
    from moesim.types import BITS, NONE

    console = Console(highlight=False, markup=False, stderr=stderr)
    about = result["run"]
    count = result["sequences"]
    tpot, p99 = result["tpot_ms"], result["itl_ms"]["p99"]
    later = f"{tpot:.2f} ms (p99 {p99:.2f} ms)" if tpot else "- (nothing decoded)"
    console.print(
        f"{result['tokens_per_s']:.2f} tokens/s{' in all' if count > 1 else ''}   "
        f"TTFT {result['ttft_ms']:.1f} ms   TPOT {later}",
        style="bold green",
    )
    console.print(f"{explain(result)}")
    if "gain" in result:
        console.print(gain_in_words(result), soft_wrap=True)
    console.print()
    experts = run.prepared.setting.layers * run.prepared.setting.experts
    precision = run.prepared.placement.cached_precision
    cached = about["bits"] if precision == NONE else BITS[precision]
    console.print(
        f"policy     {result['policy']}\n"
        f"hardware   {about['hardware']}\n"
        f"model      {about['model']}, experts in {about['bits']} bit"
        f"{f', cached in {cached}' if cached != about['bits'] else ''}\n"
        f"budget     {size_in_words(about['budget_bytes'])}, room for "
        f"{min(run.prepared.setting.slots, experts)} of {experts} experts\n"
        f"workload   {count} sequence{'s' if count > 1 else ''}, "
        f"{result['prompt_tokens']} prompt + {result['output_tokens']} generated tokens"
        f"{' in all' if count > 1 else ''}\n",
        soft_wrap=True,
    )

    def table(title: str, amounts: dict[str, int], unit: float, name: str, digits: int) -> Table:
        total = sum(amounts.values())
        grid = Table(
            title=f"{title} {total / unit:.{digits}f} {name}", title_justify="left",
            box=None, header_style="dim", pad_edge=False,
        )  # fmt: skip
        grid.add_column("", no_wrap=True)
        grid.add_column(name, justify="right", no_wrap=True)
        grid.add_column("%", justify="right", no_wrap=True)
        for key, amount in amounts.items():
            if amount:
                shown = LINK_NAMES.get(key, key.replace("_", " "))
                grid.add_row(shown, f"{amount / unit:.{digits}f}", f"{100 * amount / total:.1f}")
        return grid

    link_unit = (1e9, "GB", 2) if sum(result["link_bytes"].values()) >= 1e9 else (1e6, "MB", 1)
    outcomes = {key: n for key, n in result["activations"].items() if key != "total"}
    tables = [
        table("Time", result["time_ns"], 1e6, "ms", 1),
        table("Experts run", outcomes, 1, "times", 0),
        table("Link", result["link_bytes"], *link_unit),
    ]
    console.print(Columns(tables, padding=(0, 3)))
    lines = ["", "Busy: " + ", ".join(f"{k} {v:.1%}" for k, v in result["lanes"].items() if v)]
    if result["hit_rate"] is not None:
        lines.append(
            f"Weights were there in time for {result['hit_rate']:.1%} of experts in decode"
        )
    prefetch = result["prefetch"]
    for name, recall in zip(prefetch["predictors"], prefetch["recall"], strict=True):
        if recall is not None:
            lines.append(f"Predictor {name} names {recall:.1%} of the experts that are needed")
    if prefetch["fetched"]:
        lines.append(f"{prefetch['precision']:.1%} of {prefetch['fetched']} prefetches were used")
    sources = [f"{share:.0%} {name}" for name, share in result["provenance"].items() if share]
    lines.append(f"The durations rest on {', '.join(sources)} numbers")
    console.print("\n".join(lines))
    console.print(
        f"{about['layer_steps']} layer steps, {about['operations']} operations on machine "
        f"{about['machine']} in {about['wall_s']:.2f} s",
        style="dim",
    )
