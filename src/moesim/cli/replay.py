"""`moesim replay`: one policy, one trace, one machine: how fast, and why."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import print_json, setting_pairs, size_bytes

if TYPE_CHECKING:
    from moesim.model import ModelSpec
    from moesim.profile import HardwareProfile
    from moesim.sim.replay import Replayed
    from moesim.traces.format import Trace
    from moesim.traces.workload import Workload

RESERVE_BYTES = 1 << 30
"""What the default budget leaves on the GPU for activations and the runtime."""


@click.command()
@click.argument("trace", required=False, type=click.Path(path_type=Path))
@click.option(
    "--policy",
    default="dali",
    show_default=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="A policy and its parameters; `moesim policies` lists them.",
)
@click.option("--model", metavar="NAME|PATH", help="Name or config.json.  [default: the trace's]")
@click.option(
    "--hardware",
    metavar="NAME|PATH",
    help="Name or YAML file.  [default: this machine's profile, else a preset]",
)
@click.option(
    "--budget",
    metavar="SIZE",
    help="GPU memory for experts, staging included, as 8GiB.  [default: what is left]",
)
@click.option(
    "--cache-ratio", type=click.FloatRange(0, 1), help="The budget as a share of all experts."
)
@click.option(
    "--bits",
    type=click.Choice(["16", "8", "4"]),
    default="16",
    show_default=True,
    help="Precision of the experts, stored and copied.",
)
@click.option(
    "--batch",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Sequences in all; a policy may split them into batches.",
)
@click.option("--prompt", type=click.IntRange(1), help="Tokens of each prompt.")
@click.option(
    "--generate",
    type=click.IntRange(1),
    help="Tokens to generate; the prompt's own step gives the first.",
)
@click.option(
    "--start",
    type=click.IntRange(0),
    default=0,
    show_default=True,
    help="Skip so many sequences, or windows, of the trace.",
)
@click.option("--repeat", is_flag=True, help="Let tokens of the trace serve several sequences.")
@click.option(
    "--machine",
    type=click.Choice(["simpy"]),
    default="simpy",
    show_default=True,
    help="What simulates the machine.",
)
@click.option(
    "--jitter",
    type=click.FloatRange(0, 1),
    default=0.0,
    show_default=True,
    help="Stretch each operation at random by up to this share.",
)
@click.option("--seed", type=click.IntRange(0, (1 << 31) - 1), default=0, show_default=True)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Change a number of the hardware profile, as link.h2d.bytes_per_s=55e9.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
@click.option(
    "--timeline",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a Chrome trace for Perfetto (.json or .json.gz).",
)
@click.option(
    "--csv",
    "csv_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write one row per step.",
)
def command(  # fmt: skip
    trace: Path | None,
    policy: str,
    model: str | None,
    hardware: str | None,
    budget: str | None,
    cache_ratio: float | None,
    bits: str,
    batch: int,
    prompt: int | None,
    generate: int | None,
    start: int,
    repeat: bool,
    machine: str,
    jitter: float,
    seed: int,
    settings: tuple[str, ...],
    as_json: bool,
    timeline: Path | None,
    csv_path: Path | None,
) -> None:
    """Replay a routing trace through a policy on a simulated machine.

    Without TRACE, the example that ships with moesim.
    """
    from moesim.errors import InputError
    from moesim.policies.registry import choose
    from moesim.profile import load_profile, with_overrides
    from moesim.run import prepare
    from moesim.sim.metrics import summarize
    from moesim.sim.replay import replay
    from moesim.traces.bundled import example_path
    from moesim.traces.format import read_trace
    from moesim.traces.workload import cut

    if budget is not None and cache_ratio is not None:
        raise InputError("--budget and --cache-ratio exclude each other")
    chosen = choose(policy)
    profile, notice = load_profile(hardware)
    profile = with_overrides(profile, setting_pairs(settings))
    for path in (timeline, csv_path):
        if path is not None and not path.absolute().parent.is_dir():
            raise InputError(f"{path}: there is no folder {path.absolute().parent}")
    routing = read_trace(trace or example_path())
    spec = model_of(model, routing)
    workload = cut(routing, batch, prompt, generate, start, repeat)
    size, said = budget_of(spec, profile, workload, budget, cache_ratio, int(bits))
    prepared = prepare(
        routing, workload, spec, profile, chosen, budget_bytes=size, bits=int(bits), seed=seed
    )
    for line in filter(None, (notice, said, *prepared.notices)):
        click.echo(f"note: {line}", err=True)
    run = with_progress(
        lambda progress: replay(
            prepared, seed=seed, jitter=round(jitter * 1024), record=timeline is not None,
            progress=progress,
        )
    )  # fmt: skip
    if timeline is not None:
        from moesim.sim.timeline import write_timeline

        write_timeline(run, timeline)
    if csv_path is not None:
        write_csv(run, csv_path)
    result = summarize(run)
    if as_json:
        print_json(result)
    else:
        show(result, run)


def model_of(name: str | None, trace: "Trace") -> "ModelSpec":
    """Return the model asked for, else the one that the trace was recorded from."""
    from moesim.errors import InputError, ModelError
    from moesim.model import load_model, spec_from_dict

    if name is not None:
        return load_model(name)
    if "spec" in trace.meta:
        return spec_from_dict(trace.meta["spec"])
    recorded = trace.meta.get("model")
    if not isinstance(recorded, str):
        raise InputError("the trace does not say what model it is of; use --model")
    try:
        return load_model(recorded)
    except ModelError as error:
        raise InputError(f"the trace is of model {recorded!r}: {error}; use --model") from None


def budget_of(
    spec: "ModelSpec", profile: "HardwareProfile", workload: "Workload", budget: str | None,
    ratio: float | None, bits: int,
) -> tuple[int, str]:  # fmt: skip
    """Return the bytes for experts on the GPU, and a note where the user did not choose them.

    By default what the GPU has left beside everything else of the model in 16 bit, the keys and
    values of the whole workload, and a reserve; at most one and a half times all experts.
    """
    import numpy as np

    from moesim.errors import InputError
    from moesim.model import expert_bytes, expert_params, kv_bytes_per_token, total_params

    experts = spec.layers * spec.experts
    one = expert_bytes(spec, bits)
    if budget is not None:
        return size_bytes(budget), ""
    if ratio is not None:
        return int(ratio * experts * one), ""
    other = 2 * (total_params(spec) - experts * expert_params(spec))
    tokens = int(np.diff(workload.starts).sum())
    kept = tokens * sum(kv_bytes_per_token(spec))
    left = profile.gpu.memory_bytes - other - kept - RESERVE_BYTES
    if left < one:
        raise InputError(
            f"{profile.gpu.name} has no room for an expert beside {other / 2**30:.1f} GiB of other "
            f"weights and {kept / 2**30:.1f} GiB of keys and values; say --budget"
        )
    left = min(left, experts * one * 3 // 2)
    share = min(1.0, left / (experts * one))
    return left, (
        f"budget {left / 2**30:.2f} GiB, {share:.0%} of all experts: what {profile.gpu.name} has left"
    )


def with_progress(work: Any) -> "Replayed":
    """Do the work, with a progress bar if stderr is a terminal."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    run: Replayed
    if not console.is_terminal:
        run = work(None)
        return run
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("replaying", total=None)
        run = work(lambda done, total: bar.update(task, completed=done, total=total))
    return run


def write_csv(run: "Replayed", path: Path) -> None:
    """Write one row per step."""
    import csv

    from moesim.sim.metrics import by_step

    rows = by_step(run)
    unfinished = path.with_name(path.name + ".part")
    with unfinished.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    unfinished.replace(path)


def show(result: dict[str, Any], run: "Replayed") -> None:
    """Print what the user came for first, then where the time went."""
    from rich.columns import Columns
    from rich.console import Console
    from rich.table import Table

    from moesim.sim.metrics import explain

    console = Console(highlight=False)
    about = result["run"]
    experts = run.prepared.setting.layers * run.prepared.setting.experts
    held = run.prepared.setting.slots
    console.print(f"[bold]{result['policy']}[/] on {about['hardware']}")
    console.print(
        f"{about['model']}, experts in {about['bits']} bit, {about['budget_bytes'] / 2**30:.2f} GiB "
        f"for {min(held, experts)} of {experts}; {result['sequences']} x "
        f"{result['prompt_tokens'] // result['sequences']} prompt + "
        f"{result['output_tokens'] // result['sequences']} generated tokens"
    )
    tpot = result["tpot_ms"]
    p99 = result["itl_ms"]["p99"]
    console.print(
        f"\n[bold green]{result['tokens_per_s']:.2f} tokens/s[/]   TTFT "
        f"[bold]{result['ttft_ms']:.1f} ms[/]   TPOT "
        + (f"[bold]{tpot:.2f} ms[/] (p99 {p99:.2f})" if tpot else "- (nothing decoded)")
    )
    console.print(f"{explain(result)}\n")

    def table(title: str, rows: dict[str, int], unit: float, total: int, form: str) -> Table:
        grid = Table(title=title, box=None, header_style="dim", title_justify="left")
        for heading, justify in (("", "left"), (form.partition(" ")[2], "right"), ("%", "right")):
            grid.add_column(heading, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for name, amount in rows.items():
            if amount:
                number = form.partition(" ")[0] % (amount / unit)
                grid.add_row(name.replace("_", " "), number, f"{amount / max(1, total):.1%}")
        return grid

    makespan = result["makespan_ns"]
    outcomes = {k: v for k, v in result["activations"].items() if k != "total"}
    moved = result["link_bytes"]
    lanes = Table(title="Lanes busy", box=None, header_style="dim", title_justify="left")
    lanes.add_column("")
    lanes.add_column("%", justify="right")
    for name, share in result["lanes"].items():
        lanes.add_row(name, f"{share:.1%}")
    console.print(
        Columns(
            [
                table(
                    f"Time {makespan / 1e6:.1f} ms", result["time_ns"], 1e6, makespan, "%.1f ms"
                ),
                table(
                    f"Experts used {sum(outcomes.values())}", outcomes, 1, sum(outcomes.values()),
                    "%d times",
                ),
                table("Link", moved, 1e6, sum(moved.values()), "%.1f MB"),
                lanes,
            ],
            padding=(0, 3),
        )
    )  # fmt: skip
    prefetch = result["prefetch"]
    hit_rate = result["hit_rate"]
    console.print("Hit rate in decode:", "-" if hit_rate is None else f"{hit_rate:.1%}", end="")
    for name, recall in zip(prefetch["predictors"], prefetch["recall"], strict=True):
        console.print(f"   predictor {name}, recall {recall or 0:.1%}", end="")
    if prefetch["fetched"]:
        console.print(
            f"   prefetches used {prefetch['precision']:.1%} of {prefetch['fetched']}", end=""
        )
    sources = [f"{share:.0%} {name}" for name, share in result["provenance"].items() if share]
    console.print(f"\nThe durations rest on: {', '.join(sources)} numbers")
    console.print(
        f"[dim]{about['layer_steps']} layer steps, {about['operations']} operations on machine "
        f"{about['machine']} in {about['wall_s']:.2f} s[/]"
    )
