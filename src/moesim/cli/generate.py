"""`moesim generate`: text from a real model whose experts a policy offloads."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import check_output, print_json
from moesim.cli.real import DEVICE_HELP
from moesim.cli.replay import MACHINE_OPTIONS, SETTINGS, show

if TYPE_CHECKING:
    from moesim.answers.inputs import Inputs
    from moesim.real.generate import Observed, Request
    from moesim.real.modules import Parts


def machine_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the options of a machine and a budget."""
    for option in reversed((*MACHINE_OPTIONS, SETTINGS)):
        function = option(function)
    return function


@click.command()
@click.argument("model", metavar="MODEL")
@click.option(
    "--policy",
    default="dali",
    show_default=True,
    metavar="NAME[:KEY=VALUE,...]",
    help="A policy and its parameters; `moesim policies` lists them.",
)
@click.option("--prompt", "texts", multiple=True, help="Several are one batch of sequences.")
@click.option(
    "--prompts",
    "file",
    type=click.Path(path_type=Path),
    help="A prompt per line; or .jsonl: strings, or objects with prompt or messages.",
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(1),
    default=64,
    show_default=True,
    help="Of each prompt; the model may end before.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Of the sampling; 0 takes the likeliest token.",
)
@machine_options
@click.option("--device", metavar="DEVICE[:KEY=VALUE,...]", help=DEVICE_HELP)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "auto"]),
    default="bfloat16",
    show_default=True,
    help="Of all but the experts, which are in bfloat16 or fewer bits; auto: as it is stored.",
)
@click.option(
    "--profile-trace",
    type=click.Path(path_type=Path),
    help="Routing of other text, for policies that learn beforehand.",
)
@click.option(
    "--residuals",
    type=click.Path(path_type=Path),
    help="The .npy of `moesim record --save-residuals`, for predictors residual1, residual2, ...",
)
@click.option("--seed", type=click.IntRange(0, (1 << 31) - 1), default=0, show_default=True)
@click.option(
    "--trace",
    "output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the routing, as `moesim record` does.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def command(
    model: str, policy: str, texts: tuple[str, ...], file: Path | None, max_new_tokens: int,
    temperature: float, hardware: str | None, budget: str | None, cache_ratio: float | None,
    bits: str, settings: Mapping[str, str], device: str | None, dtype: str,
    profile_trace: Path | None, residuals: Path | None, seed: int, output: Path | None,
    as_json: bool,
) -> None:  # fmt: skip
    """Generate text with a Hugging Face MoE, its experts offloaded by a policy.

    MODEL is a folder, a config.json (random weights), or a name on the hub. Routed experts are
    where the policy has them, on the host or the device; all else is on the device, as are keys and
    values. Prompts of different lengths are not padded, but computed one after the other in each
    layer. Text goes to stdout, numbers to stderr. Needs moesim[torch].
    """
    from moesim.errors import InputError
    from moesim.policies.registry import choose
    from moesim.real.devices import open_runner
    from moesim.real.generate import Observed, Request, changes, generate
    from moesim.real.modules import parts_of
    from moesim.sim.metrics import summarize
    from moesim.traces.format import write_trace
    from moesim.traces.importers import load_trace
    from moesim.traces.recorder import prompts as recording

    chosen = choose(policy)
    if not math.isfinite(temperature):
        raise InputError(f"--temperature is {temperature}; legal are numbers from 0")
    if bool(texts) == (file is not None):
        raise InputError("say either --prompt, once or more often, or --prompts")
    if output is not None:
        check_output(output)
        if output.resolve() in {p.resolve() for p in (file, profile_trace, residuals) if p}:
            raise InputError("--trace must be another file than what is read")
    asked = [recording.Prompt(text) for text in texts] if file is None else []
    asked += recording.read_prompts(file) if file is not None else []
    means = None if residuals is None else recording.read_residuals(residuals)
    runner = open_runner(device)
    try:
        net, tokenizer, notes = recording.load_model(model, dtype=dtype, seed=seed)
        ids = recording.encode(asked, net, tokenizer)
        _, stop = recording.special_ids(net.generation_config)
        request = Request(ids, max_new_tokens, stop or (), temperature, seed)
        parts = parts_of(net)
        profile = None if profile_trace is None else load_trace(profile_trace, spec=parts.spec)
        observed = Observed(profile, means)
        given = inputs(parts, request, observed, hardware, settings, budget, cache_ratio, int(bits))
        for line in (*notes, *given.notices):
            click.echo(f"note: {line}", err=True)
        spoken = Spoken(tokenizer, len(ids), quiet=as_json)
        done = generate(
            parts, runner,
            lambda trace, work: given._replace(trace=trace, workload=work).prepare(chosen, seed),
            request, observed=observed, on_token=spoken.hear,
        )  # fmt: skip
    finally:
        runner.close()
    if output is not None:
        write_trace(done.trace, output)
    result = summarize(done.run)
    changed = changes(done.run)
    if as_json:
        sequences = zip(ids, done.tokens, spoken.texts, strict=True)
        result["texts"] = [
            {"prompt_tokens": len(prompt), "tokens": list(tokens), "text": text}
            for prompt, tokens, text in sequences
        ]
        result["changes"] = changed
        print_json(result)
        return
    for line in (
        *done.run.prepared.notices,
        *(f"{line}: the text is not the model's" for line in changed),
    ):
        click.echo(f"note: {line}", err=True)
    show(result, done.run, stderr=True)


def inputs(
    parts: "Parts", request: "Request", observed: "Observed", hardware: str | None,
    settings: Mapping[str, str], budget: str | None, cache_ratio: float | None, bits: int,
) -> "Inputs":  # fmt: skip
    """Return what is run, as for a trace; raise InputError for what does not exist or fit."""
    from moesim.answers.inputs import Inputs, budget_of
    from moesim.errors import InputError
    from moesim.profile import load_profile, with_overrides
    from moesim.real.generate import unrouted

    if budget is not None and cache_ratio is not None:
        raise InputError("budget and cache ratio exclude each other")
    profile, notice = load_profile(hardware)
    profile = with_overrides(profile, settings)
    trace, workload = unrouted(parts.spec, request, observed)
    size, said = budget_of(parts.spec, profile, workload, budget, cache_ratio, bits)
    kept = "" if parts.bfloat16 else "experts are rounded to bfloat16"
    notices = tuple(filter(None, (notice, said, kept)))
    return Inputs(trace, workload, parts.spec, profile, size, bits, notices)


class Spoken:
    """Writes the texts of sequences to stdout as they come, the first one first."""

    def __init__(self, tokenizer: Any, sequences: int, quiet: bool) -> None:
        self.tokenizer = tokenizer
        self.quiet = quiet
        self.tokens: list[list[int]] = [[] for _ in range(sequences)]
        self.texts = [""] * sequences
        self.over = [False] * sequences
        self.front = 0
        self.shown = 0

    def hear(self, sequence: int, token: int, over: bool) -> None:
        """Take a sequence's next token; what is no whole character yet is held back."""
        self.tokens[sequence].append(token)
        self.over[sequence] = over
        text = self.decoded(self.tokens[sequence])
        if over or not text.endswith("\ufffd"):
            self.texts[sequence] = text
        while self.front < len(self.texts):
            text = self.texts[self.front]
            self.write(text[self.shown :])
            self.shown = len(text)
            if not self.over[self.front]:
                return
            self.write("\n")
            self.front, self.shown = self.front + 1, 0

    def decoded(self, tokens: list[int]) -> str:
        """Return the text of tokens: their numbers, without a tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        text: str = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return text

    def write(self, text: str) -> None:
        """Write at once."""
        if text and not self.quiet:
            click.echo(text, nl=False)
