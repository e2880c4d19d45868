"""`moesim real`: run a policy on this machine, with weights, kernels and copies that take time."""

from pathlib import Path
from typing import Any

import click

from moesim.cli.common import check_output, print_json
from moesim.cli.replay import Inputs, run_options, show, with_progress, write_csv

DEVICE_HELP = (
    "What computes: cuda, or emulated, the processor in the place of a GPU; with options, as "
    "emulated:bandwidth=8e9.  [default: cuda if there is one, else emulated]"
)


@click.command()
@click.option(
    "--policy",
    default="dali",
    show_default=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="A policy and its parameters; `moesim policies` lists them.",
)
@run_options
@click.option("--device", metavar="DEVICE[:KEY=VALUE,...]", help=DEVICE_HELP)
@click.option("--seed", type=click.IntRange(0, (1 << 31) - 1), default=0, show_default=True)
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
def command(
    policy: str, device: str | None, seed: int, as_json: bool,
    timeline: Path | None, csv_path: Path | None, **inputs: Any,
) -> None:  # fmt: skip
    """Run a policy on this machine, on the routing of a trace, and time it.

    Weights have the model's shapes and random values; which experts tokens go to, the trace says.
    Without --layers, as many run as the host has memory for. The policy decides from the hardware
    profile, as it does in `moesim replay`. Needs moesim[torch].
    """
    from moesim.calibrate.disk import usual_folder
    from moesim.errors import InputError
    from moesim.policies.registry import choose
    from moesim.real.devices import host_room_bytes, open_runner
    from moesim.real.engine import Engine
    from moesim.sim.metrics import summarize

    chosen = choose(policy)
    outputs = [path for path in (timeline, csv_path) if path is not None]
    for path in outputs:
        check_output(path)
    taken = [path.resolve() for path in (*outputs, *filter(None, [inputs["trace"]]))]
    if len(set(taken)) < len(taken):
        raise InputError("TRACE, --timeline and --csv must be different files")
    given = Inputs.load(**inputs, room_bytes=host_room_bytes())
    for line in (*given.notices, *given.prepare(chosen, seed).notices):
        click.echo(f"note: {line}", err=True)
    opened = open_runner(device)
    if opened.name not in given.profile.gpu.name:
        click.echo(
            f"note: the policy decides by the profile of {given.profile.gpu.name}, and"
            f" {opened.name} runs it; `moesim calibrate` makes a profile of this machine",
            err=True,
        )
    engine = Engine(opened, seed=seed, folder=usual_folder())
    try:
        run = with_progress(
            lambda progress: engine.run(lambda: given.prepare(chosen, seed), progress=progress),
            "running",
        )
    finally:
        engine.close()
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
