"""`moesim trace import`: turn what an engine or tool recorded into a trace."""

from pathlib import Path
from typing import Any

import click

from moesim.cli.common import check_output


@click.command()
@click.argument("path", type=click.Path(path_type=Path), metavar="FILE")
@click.option(
    *("--output", "-o"),
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The npz file to write.",
)
@click.option(
    "--from",
    "kind",
    default="auto",
    show_default=True,
    metavar="KIND",
    help="What FILE must be; an unknown one is answered by the list.",
)
@click.option(
    "--model",
    metavar="NAME|PATH",
    help="Name or config.json: how many layers, and which of them have experts.",
)
@click.option("--experts", type=click.IntRange(1, 65534), help="Experts per layer.")
@click.option("--top-k", type=click.IntRange(1, 65534), help="Experts per token.")
@click.option("--prompt-tokens", type=click.IntRange(1, 2**31 - 1), help="Tokens of every prompt.")
@click.option(
    "--start",
    type=click.IntRange(0, 2**31 - 1),
    help="Positions left out before the first row, as the request asked.  [default: 0]",
)
@click.option(
    "--cached",
    type=click.Choice(["drop", "keep"]),
    help="Rows that a prefix cache served: ids of an earlier request.  [default: drop]",
)
@click.option(
    "--last-layer",
    type=click.Choice(["fill", "drop"]),
    help="Where llama.cpp computed it for the last tokens only.  [default: fill, as missing]",
)
@click.option(
    "--first-token",
    type=click.Choice(["keep", "drop"]),
    help="The first token of a window, which attracts all attention.  [default: keep]",
)
def command(path: Path, output: Path, kind: str, model: str | None, **options: Any) -> None:
    """Turn what an engine or tool recorded into a trace.

    FILE comes from vLLM (JSON, npy, npz), SGLang (JSON, pt), llama.cpp (CSV, binary) or is an npz
    of windows; what it is shows in its content. Options are for what FILE does not say.
    """
    from moesim.errors import InputError
    from moesim.model import load_model
    from moesim.traces.format import write_trace
    from moesim.traces.importers import import_trace
    from moesim.types import DECODE

    check_output(output)
    if path.resolve() == output.resolve():
        raise InputError("FILE and --output must be different files")
    spec = None if model is None else load_model(model)
    found, trace = import_trace(path, kind=kind, spec=spec, **options)
    write_trace(trace, output)
    decoded = int((trace.phase == DECODE).sum())
    sequences = len(set(trace.sequence.tolist()))
    click.echo(
        f"{output}: from {found}, {trace.tokens} tokens ({trace.tokens - decoded} prefill, "
        f"{decoded} decode), {sequences} sequence{'s' if sequences > 1 else ''}, {trace.layers} "
        f"layers, {trace.n_experts} experts, top-{trace.top_k}, {output.stat().st_size} bytes"
    )
