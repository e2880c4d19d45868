"""`moesim validate`: the same workload real and simulated, and how far the simulator is off."""

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.calibrate import DEFAULT_BASE, Bar, check_writable, in_words
from moesim.cli.common import check_output, print_json
from moesim.cli.real import DEVICE_HELP
from moesim.cli.replay import policies_with_parameters, run_options

if TYPE_CHECKING:
    from rich.console import Console

    from moesim.answers.inputs import Inputs
    from moesim.calibrate.facts import Facts
    from moesim.model import ModelSpec
    from moesim.policies.registry import Chosen
    from moesim.profile import HardwareProfile
    from moesim.real.device import Device
    from moesim.real.validate import Compared

DEFAULT_POLICIES = "static,lru,dali"
EMULATED = "emulated"
"""Device, and how the names of its profiles begin."""
WORTH = 0.01
"""Of the makespan: what is printed of an error's parts."""


@click.command()
@click.option(
    "--policies",
    metavar="NAME,NAME...",
    help=f"Policies with their default parameters.  [default: {DEFAULT_POLICIES}]",
)
@policies_with_parameters
@run_options
@click.option("--device", metavar="DEVICE[:KEY=VALUE,...]", help=DEVICE_HELP)
@click.option(
    "--repeats",
    type=click.IntRange(1),
    default=3,
    show_default=True,
    help="Measure each policy so often.",
)
@click.option(
    "--quick", is_flag=True, help="Calibrate with fewer points and repetitions: a first look."
)
@click.option("--seed", type=click.IntRange(0, (1 << 31) - 1), default=0, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
@click.option(
    "--plot",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Draw measured against simulated time per token (.png, .svg or .pdf).",
)
@click.option(
    "--timelines",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the first policy's two runs as a Chrome trace for Perfetto (.json or .json.gz).",
)
@click.option(
    "--evidence",
    type=click.Path(file_okay=False, path_type=Path),
    help="Write everything into this folder: table, JSON, picture, profile, the machine's facts.",
)
def command(
    policies: str | None, specs: tuple[str, ...], device: str | None,
    repeats: int, quick: bool, seed: int, as_json: bool, plot: Path | None,
    timelines: Path | None, evidence: Path | None, **inputs: Any,
) -> None:  # fmt: skip
    """Run policies on this machine and in the simulator, and say how far the simulator is off.

    Both get the same workload, and one hardware profile: that of --hardware or, without it, what
    `moesim calibrate` has measured of this device for the trace's model; what is missing is
    measured first. Let nothing else run meanwhile. Needs moesim[torch].
    """
    from rich.console import Console

    from moesim.answers.inputs import Inputs
    from moesim.calibrate.facts import machine_facts
    from moesim.errors import InputError
    from moesim.real.devices import host_room_bytes, open_runner
    from moesim.real.plots import check_picture

    chosen = chosen_of(policies, specs)
    if plot is not None:
        check_picture(plot)
    outputs = [path for path in (plot, timelines) if path is not None]
    for path in outputs:
        check_output(path)
    taken = [path.resolve() for path in (*outputs, *filter(None, [inputs["trace"]]))]
    if len(set(taken)) < len(taken):
        raise InputError("TRACE, --plot and --timelines must be different files")
    if evidence is not None:
        check_writable(evidence, "--evidence")

    room = host_room_bytes()
    opened = open_runner(device)
    console = Console(stderr=True)
    before = machine_facts()
    with closing(opened):
        if inputs["hardware"] is None:
            # The profile comes later, and with it what fits: whatever else is wrong is said now.
            asked = inputs["budget"] is not None or inputs["cache_ratio"] is not None
            first = Inputs.load(**inputs | ({} if asked else {"cache_ratio": 1.0}), room_bytes=room)
            precisions = precisions_of(first, chosen, seed)
            with calibrated(opened, first.model, precisions, quick, console) as path:
                given = Inputs.load(**inputs | {"hardware": str(path)}, room_bytes=room)
        else:
            given = Inputs.load(**inputs, room_bytes=room)
            check_profile(given.profile, opened)
        notices = dict.fromkeys(given.notices)
        for one in chosen:
            notices |= dict.fromkeys(given.prepare(one, seed).notices)
        if before.busy:
            notices[
                f"the machine is busy (load {before.load:.1f} on {before.threads} threads): what is"
                " measured is a loaded machine"
            ] = None
        for line in notices:
            click.echo(f"note: {line}", err=True)
        compared = measured(opened, given, chosen, repeats, seed, console)
    result = result_of(compared, given, opened, repeats, before, machine_facts(), list(notices))
    write(result, compared, given, plot, timelines, evidence)
    if as_json:
        print_json(result)
    else:
        show(Console(highlight=False, markup=False), result)


for parameter in command.params:
    if parameter.name == "hardware" and isinstance(parameter, click.Option):
        parameter.help = "Name or YAML file.  [default: what is calibrated of the device]"


def chosen_of(policies: str | None, specs: Sequence[str]) -> list["Chosen"]:
    """Return the policies that are named, each once; raise InputError for one that is not there."""
    from moesim.errors import InputError
    from moesim.policies.registry import choose

    if policies is None and not specs:
        policies = DEFAULT_POLICIES
    plain = [name.strip() for name in (policies or "").split(",") if name.strip()]
    for name in plain:
        if "=" in name or ":" in name:
            raise InputError(
                f"--policies {policies}: takes names alone; --policy {name.partition(':')[0]}:..."
                " takes parameters, once per policy"
            )
    found = {one.spec: one for one in map(choose, (*plain, *specs))}
    if not found:
        raise InputError(f"--policies {policies!r}: names no policy; write {DEFAULT_POLICIES}")
    return list(found.values())


def check_profile(profile: "HardwareProfile", device: "Device") -> None:
    """Raise InputError for the profile of another kind of device."""
    from moesim.errors import InputError

    emulated = profile.name.startswith(EMULATED)
    if emulated != (device.label == EMULATED):
        raise InputError(
            f"--hardware {profile.name} is {'an' if emulated else 'no'} emulated device's, and"
            f" {device.label} runs; `moesim calibrate --device {device.label}` makes its profile"
        )


def precisions_of(given: "Inputs", chosen: Sequence["Chosen"], seed: int) -> list[str]:
    """Return the precisions of experts that these policies run, as calibration calls them."""
    from moesim.real.engine import demands

    bits = {b for one in chosen for b in demands(given.prepare(one, seed)).precisions}
    return ["bf16", *(f"packed{b}" for b in sorted(bits, reverse=True) if b < 16)]


@contextmanager
def calibrated(
    device: "Device", model: "ModelSpec", precisions: Sequence[str], quick: bool,
    console: "Console",
) -> Iterator[Path]:  # fmt: skip
    """Measure what is missing, and give the profile as a file, which is there meanwhile."""
    from moesim.calibrate.assembly import assemble, profile_text
    from moesim.calibrate.calibration import count_kept, run_tasks, state_folder
    from moesim.calibrate.series import Bench
    from moesim.calibrate.tasks import QUICK, tasks_of
    from moesim.calibrate.timing import DEFAULT
    from moesim.profile import load_profile

    bench = Bench(device, QUICK if quick else DEFAULT, quick)
    tasks = tasks_of(bench, [model], precisions)
    check_writable(state_folder(), "MOESIM_CACHE_DIR")
    missing = len(tasks) - count_kept(tasks, bench)
    if missing:
        click.echo(f"calibrating: {missing} of {len(tasks)} series are missing", err=True)
    with Bar(console, len(tasks)) as bar:
        found = run_tasks(tasks, bench, progress=bar.show)
    for outcome in found.outcomes:
        if outcome.error:
            click.echo(f"note: not measured: {outcome.task}: {outcome.error}", err=True)
    made = assemble(found, [model], load_profile(DEFAULT_BASE)[0])
    with tempfile.TemporaryDirectory(prefix="moesim-") as folder:
        path = Path(folder) / "hardware.yaml"
        path.write_text(profile_text(made.profile), encoding="utf-8")
        yield path


def measured(
    device: "Device", given: "Inputs", chosen: Sequence["Chosen"], repeats: int, seed: int,
    console: "Console",
) -> "Compared":  # fmt: skip
    """Run everything, with a bar that shows the time left."""
    from moesim.calibrate.disk import usual_folder
    from moesim.real.engine import Engine
    from moesim.real.validate import validate

    by_spec = {one.spec: one for one in chosen}
    runs = len(chosen) * repeats
    shown = console.is_terminal
    done = 0
    began = time.monotonic()
    engine = Engine(device, seed=seed, folder=usual_folder())
    with Bar(console, runs) as bar:

        def left_s(share: float) -> float:
            """Return about how long the rest takes; `share` is that of the run under way."""
            over = done + share
            return (time.monotonic() - began) / over * (runs - over) if over else 0.0

        def tell(spec: str, share: float) -> None:
            if shown:
                what = f"running {spec}" if share else f"preparing {spec}"
                bar.show(done, runs, left_s(share), what)

        def make(spec: str) -> Callable[[], Any]:
            return lambda: given.prepare(by_spec[spec], seed)

        def run(spec: str) -> Any:
            nonlocal done
            tell(spec, 0.0)
            found = engine.run(
                make(spec),
                progress=(lambda step, steps: tell(spec, step / steps)) if shown else None,
            )
            done += 1
            if done == 1 and runs > 1 and not shown:
                click.echo(f"{runs - 1} more runs, about {in_words(left_s(0.0))}", err=True)
            return found

        try:
            return validate({spec: make(spec) for spec in by_spec}, run, repeats)
        finally:
            engine.forget()


def result_of(
    compared: "Compared", given: "Inputs", device: "Device", repeats: int, before: "Facts",
    after: "Facts", notices: list[str],
) -> dict[str, Any]:  # fmt: skip
    """Return everything that is found, as JSON has it."""
    import msgspec

    from moesim.calibrate.facts import versions
    from moesim.sim.metrics import summarize

    simulated = summarize(compared.simulated)
    about = simulated["run"]
    return {
        "policies": list(compared.rows),
        **compared.ranking,
        "device": device.label,
        "device_name": device.name,
        "hardware": given.profile.name,
        "hardware_digest": about["hardware_digest"],
        "provenance": simulated["provenance"],
        "model": given.model.name,
        "workload": {
            "trace": about["trace"],
            "sequences": simulated["sequences"],
            "prompt_tokens": simulated["prompt_tokens"],
            "output_tokens": simulated["output_tokens"],
            "layers": given.model.layers,
            "experts": given.model.experts,
            "budget_bytes": given.budget_bytes,
            "bits": given.bits,
            "seed": about["seed"],
        },
        "repeats": repeats,
        "machine": {
            "before": msgspec.to_builtins(before),
            "after": msgspec.to_builtins(after),
            "busy": before.busy,
            "versions": versions(),
        },
        "notices": notices,
    }


def write(
    result: Mapping[str, Any], compared: "Compared", given: "Inputs", plot: Path | None,
    timelines: Path | None, evidence: Path | None,
) -> None:  # fmt: skip
    """Write the files that are asked for."""
    from moesim.calibrate.assembly import profile_text
    from moesim.calibrate.calibration import write_text
    from moesim.errors import InputError
    from moesim.real import validate
    from moesim.real.plots import check_picture, draw_validation
    from moesim.sim.timeline import write_trace

    if plot is not None:
        draw_validation(result, plot)
    if timelines is not None:
        write_trace(validate.timelines(compared.measured, compared.simulated), timelines)
    if evidence is None:
        return
    texts = {
        "table.md": markdown(result),
        "result.json": json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        "profile.yaml": profile_text(given.profile),
        "machine.json": json.dumps(result["machine"], indent=2) + "\n",
    }
    for name, text in texts.items():
        write_text(evidence / name, text)
    picture = evidence / "tpot.png"
    try:
        check_picture(picture)
    except InputError as error:
        click.echo(f"note: no picture: {error}", err=True)
    else:
        draw_validation(result, picture)


COLUMNS = (
    "policy", "TPOT ms\nmeasured", "\nsimulated", "\nerror", "\nspread", "TTFT ms\nmeasured",
    "\nerror", "tokens/s\nmeasured", "\nerror",
)  # fmt: skip


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a policy's row of the table."""
    tpot, ttft, speed = row["tpot_ms"], row["ttft_ms"], row["tokens_per_s"]
    return [
        row["policy"],
        number(tpot["measured"]),
        number(tpot["simulated"]),
        signed(row["tpot_error"]),
        "-" if tpot["spread"] is None else f"{tpot['spread']:.1%}",
        number(ttft["measured"]),
        signed(row["ttft_error"]),
        number(speed["measured"]),
        signed(row["tokens_per_s_error"]),
    ]


def number(value: float | None) -> str:
    """Return a number of the table to four digits; `-` for none."""
    return "-" if value is None else f"{value:.4g}"


def signed(error: float | None) -> str:
    """Return an error in per cent; `-` for none."""
    return "-" if error is None else f"{error:+.1%}"


def show(console: "Console", result: Mapping[str, Any]) -> None:
    """Print the errors, then the order of the policies, then where the errors come from."""
    from rich.table import Table

    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0), pad_edge=False)
    for at, title in enumerate(COLUMNS):
        table.add_column(title, justify="right" if at else "left", no_wrap=at > 0)
    for row in result["policies"]:
        table.add_row(*cells(row))
    console.print(table)
    console.print()
    for line in (*order_in_words(result), "", *reasons(result), "", *about(result)):
        console.print(line, soft_wrap=True)


def order_in_words(result: Mapping[str, Any]) -> Iterator[str]:
    """Give lines that say whether the simulator puts the policies into the right order."""
    tau, by_repeat = result["kendall_tau"], result["kendall_tau_by_repeat"]
    swapped = result["swapped"]
    if tau is None:
        yield "Two policies or more are needed to compare orders"
        return
    known = [one for one in by_repeat if one is not None]
    varies = f", {min(known):.2f} to {max(known):.2f} by repeat" if known else ""
    verdict = "the same" if not swapped and tau > 0.999 else "not the same"
    yield f"The order of the policies is {verdict}: Kendall's tau {tau:.2f}{varies}"
    unit = 1e6 if result["ranked_by"] == "makespan_ns" else 1
    for pair in swapped:
        mine, theirs = (
            " and ".join(f"{value / unit:.2f}" for value in pair[run])
            for run in ("measured", "simulated")
        )
        close = "; their repeats overlap" if pair["within_spread"] else ""
        yield (
            f"Swapped: {pair['faster']} is faster than {pair['slower']} ({mine} ms), simulated"
            f" slower ({theirs} ms){close}"
        )


def reasons(result: Mapping[str, Any]) -> Iterator[str]:
    """Give a line per policy: what its error consists of, and what should be equal and is not."""
    for row in result["policies"]:
        yield f"{row['policy']}: {row['explains']}"
        causes = parts_in_words(row["time_ns"])
        if causes:
            yield f"  by what the GPU did: {causes}"
        kinds = parts_in_words(row["kinds"])
        if kinds:
            yield f"  by the length of operations: {kinds}"
        for one in row["differences"]:
            if not one["timing"]:
                found = ", ".join(map(str, sorted(set(one["measured"]))))
                yield f"  differs: {one['what']}: measured {found}, simulated {one['simulated']}"
        timely = [one["what"] for one in row["differences"] if one["timing"]]
        if timely:
            yield f"  differ as copies arrive earlier or later: {', '.join(timely)}"


def parts_in_words(parts: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the parts of an error that are worth a word, the largest first; empty without any."""
    own = {name: one["part"] for name, one in parts.items() if abs(one["part"] or 0) >= WORTH}
    return ", ".join(
        f"{name.replace('_', ' ')} {own[name]:+.1%}"
        for name in sorted(own, key=lambda name: -abs(own[name]))
    )


def about(result: Mapping[str, Any]) -> Iterator[str]:
    """Give lines that say what was compared on what."""
    work, machine = result["workload"], result["machine"]
    device = result["device"]
    yield f"device     {device} ({result['device_name']})" + (
        ": the processor in the place of a GPU; nothing is said about any GPU"
        if device == EMULATED
        else ""
    )
    sources = [f"{share:.0%} {name}" for name, share in result["provenance"].items() if share]
    yield (
        f"hardware   {result['hardware']}; simulated durations rest on {', '.join(sources)} numbers"
    )
    yield (
        f"model      {result['model']}, {work['layers']} layers of {work['experts']} experts in"
        f" {work['bits']} bit, budget {work['budget_bytes'] / 2**20:.0f} MiB"
    )
    yield (
        f"workload   {work['sequences']} sequence{'s' if work['sequences'] > 1 else ''},"
        f" {work['prompt_tokens']} prompt + {work['output_tokens']} generated tokens"
    )
    load = f"load {machine['before']['load']:.1f} before, {machine['after']['load']:.1f} after"
    yield (
        f"measured   {result['repeats']} times each, interleaved; {load}"
        f" on {machine['before']['threads']} threads"
    )


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table and the lines below it as Markdown."""
    titles, group = [], ""
    for title in COLUMNS:
        above, _, below = title.partition("\n")
        group = above or group
        titles.append(f"{group} {below}".strip())
    rows = [titles, ["---", *["---:"] * (len(titles) - 1)], *map(cells, result["policies"])]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    facts = "\n".join(f"    {line}" for line in about(result))
    lines = "\n".join(
        f"  * {line.strip()}" if line.startswith(" ") else f"* {line}"
        for line in (*order_in_words(result), *reasons(result))
    )
    notes = "\n".join(f"* note: {line}" for line in result["notices"])
    return (
        "# Simulated against measured\n\nErrors are simulated / measured - 1; the spread is that of"
        f" the repeats.\n\n{table}\n\n{lines}\n{notes}\n\n{facts}\n"
    )
