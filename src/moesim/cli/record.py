"""`moesim record`: what the routers of a real model decide."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import check_output

if TYPE_CHECKING:
    from rich.progress import Progress


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    required=True,
    help="A prompt per line; or .jsonl: strings, or objects with prompt or messages, and topic.",
)
@click.option(
    *("--output", "-o"),
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="The npz file to write.",
)
@click.option(
    "--generate",
    type=click.IntRange(0),
    default=64,
    show_default=True,
    help="Tokens per prompt; 0 reads the prompts only.",
)
@click.option(
    "--batch", type=click.IntRange(1), default=1, show_default=True, help="Prompts at once."
)
@click.option("--truncate", type=click.IntRange(1), help="Tokens of a prompt that are read.")
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Of the sampling; 0 takes the most likely token.",
)
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True)
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of the weights; auto: as they are stored.",
)
@click.option("--device", default="cpu", show_default=True, help="As PyTorch names it.")
@click.option(
    "--ahead",
    type=click.IntRange(0),
    default=3,
    show_default=True,
    help="Guesses recorded: gate1, gate2, ... so many layers ahead.",
)
@click.option(
    "--width", type=click.IntRange(1), help="Candidates kept per guess.  [default: 3 x top-k]"
)
@click.option(
    "--calibrate",
    type=click.IntRange(0),
    default=4096,
    show_default=True,
    help="Tokens read before, for the residuals of residual1, residual2, ...; 0: without these.",
)
@click.option(
    "--calibration-prompts",
    type=click.Path(path_type=Path),
    help="Where those tokens come from.  [default: --prompts]",
)
@click.option(
    "--residuals",
    type=click.Path(path_type=Path),
    help="A .npy with the mean router inputs (layers, hidden), instead of calibrating.",
)
@click.option(
    "--save-residuals",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write those that were used.",
)
@click.option("--guess-scores", is_flag=True, help="Keep the scores of the guesses, too.")
@click.option("--no-token-ids", is_flag=True, help="Do not keep what was read and generated.")
def command(
    model: str, prompts: Path, output: Path, generate: int, batch: int, truncate: int | None,
    temperature: float, seed: int, dtype: str, device: str, ahead: int, width: int | None,
    calibrate: int, calibration_prompts: Path | None, residuals: Path | None,
    save_residuals: Path | None, guess_scores: bool, no_token_ids: bool,
) -> None:  # fmt: skip
    """Record which experts a Hugging Face MoE model chooses while it generates.

    MODEL is a folder, a config.json (random weights), or a name on the hub. Interrupted, it keeps
    what is done; the same command goes on.
    """
    from rich.console import Console
    from rich.progress import Progress

    from moesim.errors import RecordError
    from moesim.traces.recorder import prompts as recording

    check_files((output, save_residuals), (prompts, calibration_prompts, residuals), Path(model))
    if not math.isfinite(temperature):
        raise RecordError(f"--temperature is {temperature}; legal are numbers from 0")
    texts = recording.read_prompts(prompts)
    others = recording.read_prompts(calibration_prompts) if calibration_prompts else None
    known = recording.read_residuals(residuals) if residuals is not None else None
    net, tokenizer, notes = recording.load_model(model, dtype=dtype, device=device, seed=seed)
    for line in notes:
        click.echo(f"note: {line}", err=True)
    ids = recording.encode(texts, net, tokenizer, truncate)
    run = recording.Run(generate, batch, temperature, seed)
    topics = [prompt.topic for prompt in texts]
    meta: dict[str, Any] = {"data": prompts.name}
    if any(topics):
        meta["topics"] = topics
    done = recording.recorded_prompts(output)
    if done:
        click.echo(f"note: going on after {done} of {len(ids)} prompts", err=True)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        if residuals is not None:
            meta["residuals"] = f"from {residuals.name}"
        elif calibrate and ahead:
            meta["residuals"] = f"{calibrate} tokens of {(calibration_prompts or prompts).name}"
            known = recording.kept_residuals(output)
        if known is None and "residuals" in meta:
            source = ids if others is None else recording.encode(others, net, tokenizer, truncate)
            on_rows = counter(progress, "calibrating", min(calibrate, sum(map(len, source))))
            known = recording.measure_residuals(net, source, calibrate, batch, on_rows)
        if save_residuals is not None:
            if known is None:
                raise RecordError("--save-residuals: there are none without --calibrate")
            write_residuals(known, save_residuals)
        tokens = sum(map(len, ids)) + len(ids) * max(generate - 1, 0)
        try:
            read, made = recording.record_prompts(
                net, ids, output, run, meta=meta, on_rows=counter(progress, "recording", tokens),
                ahead=ahead, width=width, residuals=known, guess_scores=guess_scores,
                token_ids=not no_token_ids,
            )  # fmt: skip
        except KeyboardInterrupt:
            done = recording.recorded_prompts(output)
            click.echo(
                f"note: {done} of {len(ids)} prompts are done"
                + (f" and in {output}" if done else "")
                + "; the same command goes on from there",
                err=True,
            )
            raise
    click.echo(
        f"{output}: {read + made} tokens ({read} prefill, {made} decode) in {len(ids)} sequences, "
        f"{output.stat().st_size} bytes; `moesim trace info {output}` says more"
    )


def check_files(
    outputs: tuple[Path | None, ...], inputs: tuple[Path | None, ...], model: Path
) -> None:
    """Raise InputError if an output cannot be written, or would replace anything that is read."""
    from moesim.errors import InputError

    written = [path for path in outputs if path is not None]
    for path in written:
        check_output(path)
    taken = {path.resolve() for path in written}
    if len(taken) < len(written) or taken & {path.resolve() for path in inputs if path is not None}:
        raise InputError("what is written must be other files than what is read")
    for path in taken:
        ours = path.suffix in (".npz", ".npy")
        if path.exists() and not ours and {model.resolve()} & {path, *path.parents}:
            raise InputError(f"{path}: is part of the model")


def counter(progress: "Progress", what: str, total: int) -> Any:
    """Return a function that shows how many rows of a total there are."""
    task = progress.add_task(what, total=total)
    return lambda rows: progress.update(task, completed=rows)


def write_residuals(mean_inputs: Any, path: Path) -> None:
    """Write mean router inputs (layers, hidden) as a .npy under exactly that name."""
    import numpy as np

    with path.open("wb") as file:
        np.save(file, mean_inputs, allow_pickle=False)
