"""`moesim real`: run a policy on this machine, with weights, kernels and copies that take time."""

from pathlib import Path
from typing import Any

import click

from moesim.cli.common import print_json
from moesim.cli.replay import (
    check_outputs,
    output_options,
    policy_option,
    run_options,
    show,
    with_progress,
    write_outputs,
)

DEVICE_HELP = (
    "What computes: cuda, or emulated, the processor in the place of a GPU; with options, as "
    "emulated:bandwidth=8e9.  [default: cuda if there is one, else emulated]"
)


@click.command()
@policy_option
@run_options
@click.option("--device", metavar="DEVICE[:KEY=VALUE,...]", help=DEVICE_HELP)
@click.option("--seed", type=click.IntRange(0, (1 << 31) - 1), default=0, show_default=True)
@output_options
def command(
    policy: str, device: str | None, seed: int, as_json: bool,
    timeline: Path | None, csv_path: Path | None, plot: Path | None, **inputs: Any,
) -> None:  # fmt: skip
    """Run a policy on this machine, on the routing of a trace, and time it.

    Weights have the model's shapes and random values; which experts tokens go to, the trace says.
    Without --layers, as many run as the host has memory for. The policy decides from the hardware
    profile, as it does in `moesim replay`. Needs moesim[torch].
    """
    from moesim.answers.inputs import Inputs
    from moesim.calibrate.disk import usual_folder
    from moesim.policies.registry import choose
    from moesim.real.devices import host_room_bytes, open_runner
    from moesim.real.engine import Engine
    from moesim.sim.metrics import summarize

    chosen = choose(policy)
    check_outputs(inputs["trace"], timeline, csv_path, plot)
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
    write_outputs(run, timeline, csv_path, plot)
    result = summarize(run)
    if as_json:
        print_json(result)
    else:
        show(result, run)
