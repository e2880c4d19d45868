"""`moesim trace export`: a trace as engines, cache simulators and tables want it."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import click

from moesim.cli.common import check_output

if TYPE_CHECKING:
    from moesim.model import ModelSpec
    from moesim.traces.format import Trace


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="TRACE")
@click.option(
    "--to",
    "target",
    type=click.Choice(["sglang", "libcachesim", "csv", "parquet"]),
    required=True,
    help="sglang: counts per layer and expert, for KTransformers too. libcachesim: its "
    "oracleGeneral. csv, parquet: a row per token, layer and rank.",
)
@click.option(
    *("--output", "-o"),
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The file to write; for sglang .json, or .pt, which KTransformers needs.",
)
@click.option("--model", metavar="NAME|PATH", help="Name or config.json.  [default: the trace's]")
@click.option(
    "--bits",
    type=click.Choice(["16", "8", "4"]),
    help="libcachesim: precision of the experts, which decides their size.  [default: 16]",
)
@click.option(
    "--layer",
    type=click.IntRange(0),
    help="libcachesim: one layer alone, by the model's own number.  [default: all]",
)
def command(
    path: Path, target: str, output: Path, model: str | None, bits: str | None, layer: int | None
) -> None:
    """Write a trace in the form of another program."""
    from moesim.errors import InputError
    from moesim.model import load_model
    from moesim.traces.exporters import export_libcachesim, export_sglang, export_table
    from moesim.traces.importers import load_trace

    check_output(output)
    if output.resolve() == path.resolve():
        raise InputError(f"--output {output} is the trace itself; name another file")
    for option, value in (("--bits", bits), ("--layer", layer)):
        if value is not None and target != "libcachesim":
            raise InputError(f"{option} {value} is for --to libcachesim, not for {target}")
    trace = load_trace(path, spec=None if model is None else load_model(model))
    if target == "sglang":
        spec = _spec(model, trace)
        lines = export_sglang(trace, output, spec)
        layers = trace.layers if spec is None else spec.hidden_layers
        click.echo(f"{output}: counts of {trace.tokens} tokens in {layers} layers, for")
        click.echo("\n".join(lines))
    elif target == "libcachesim":
        spec = _spec(model, trace)
        count = export_libcachesim(trace, output, spec, bits=int(bits or 16), layer=layer)
        sizes = "1" if spec is None else f"those of {spec.name}"
        click.echo(
            f"{output}: {count} accesses to objects layer x {trace.n_experts} + expert, sizes are "
            f"{sizes}, for"
        )
        click.echo(f"cachesim {shlex.quote(str(output))} oracleGeneral lru SIZE")
    else:
        rows = export_table(trace, output, target)
        click.echo(f"{output}: {rows} rows, {output.stat().st_size} bytes")


def _spec(name: str | None, trace: "Trace") -> "ModelSpec | None":
    """Return the model asked for, else the trace's own, None if it names none that is known."""
    from moesim.answers.inputs import model_of
    from moesim.model import load_model, model_names, normalised

    if name is not None:
        return load_model(name)
    recorded = trace.meta.get("model")
    known = isinstance(recorded, str) and normalised(recorded) in model_names()
    if "spec" not in trace.meta and not known:
        return None
    return model_of(trace)
