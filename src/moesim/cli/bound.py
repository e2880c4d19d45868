"""`moesim bound`: how fast any policy could be at most, and what stands in its way."""

from typing import TYPE_CHECKING, Any

import click

from moesim.cli.common import print_json
from moesim.cli.replay import run_options

if TYPE_CHECKING:
    from moesim.run import Prepared
    from moesim.sim.bound import Bound


@click.command()
@run_options
@click.option(
    "--allow-bits",
    type=click.Choice(["8", "4", "2"]),
    multiple=True,
    help="Let a policy compute in this precision on the GPU, too.",
)
@click.option(
    "--allow-deferral",
    is_flag=True,
    help="Let a policy add results of the CPU one layer later than the model does.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON and nothing else on stdout.")
def command(
    allow_bits: tuple[str, ...], allow_deferral: bool, as_json: bool, **inputs: Any
) -> None:
    """Say what no policy can beat with this budget, model, machine and workload.

    Without TRACE, the example that ships with moesim. A bound is no promise: nothing says that a
    policy comes close. Policies that change results are allowed more, by the --allow options.
    """
    from moesim.answers.inputs import Inputs
    from moesim.policies.registry import choose
    from moesim.sim.bound import bound

    given = Inputs.load(**inputs)
    # The bound looks at what any policy must do; this one is prepared for every budget.
    prepared = given.prepare(choose("static"))
    for line in (*given.notices, *prepared.notices):
        click.echo(f"note: {line}", err=True)
    found = bound(prepared, bits=tuple(map(int, allow_bits)), deferral=allow_deferral)
    if as_json:
        print_json(result(found, prepared))
    else:
        show(found, prepared)


def result(found: "Bound", prepared: "Prepared") -> dict[str, Any]:
    """Return the bound and what it is about, ready for JSON."""
    from moesim import __version__
    from moesim.model import model_digest
    from moesim.profile import profile_digest
    from moesim.types import BITS

    return {
        "makespan_ns": found.makespan_ns,
        "tokens_per_s": found.tokens_per_s,
        "terms_ns": terms(found),
        "binds": found.binds,
        "allowed": {"bits": list(found.bits), "deferral": found.deferral},
        "run": {
            "moesim": __version__,
            "trace": prepared.trace_digest,
            "model": prepared.model.name,
            "model_digest": model_digest(prepared.model),
            "hardware": prepared.profile.name,
            "hardware_digest": profile_digest(prepared.profile),
            "budget_bytes": prepared.setting.budget_bytes,
            "bits": BITS[prepared.setting.precision],
            "sequences": prepared.workload.sequences,
            "output_tokens": int(prepared.workload.generated.sum()),
        },
    }


TERMS = {
    "fixed": "attention, gates, combining, head, and the host between them",
    "experts": "computing experts on GPU and CPU, all weights being where they are needed",
    "weights": "weights that the budget does not hold: on the link, or computed on the CPU",
}


def terms(found: "Bound") -> dict[str, int]:
    """Return what the bound is made of, in ns."""
    return {"fixed": found.fixed_ns, "experts": found.experts_ns, "weights": found.weights_ns}


def show(found: "Bound", prepared: "Prepared") -> None:
    """Print the bound first, then what it is made of."""
    from rich.console import Console

    from moesim.types import BITS

    console = Console(highlight=False, markup=False)
    console.print(
        f"No policy can be faster than {found.tokens_per_s:.2f} tokens/s: "
        f"{found.makespan_ns / 1e6:.1f} ms for {int(prepared.workload.generated.sum())} tokens",
        style="bold green",
        soft_wrap=True,
    )
    console.print(f"What binds most: {TERMS[found.binds]}\n", soft_wrap=True)
    for name, ns in terms(found).items():
        share = ns / found.makespan_ns if found.makespan_ns else 0.0
        console.print(f"{ns / 1e6:12.1f} ms {share:6.1%}  {TERMS[name]}", soft_wrap=True)
    stored = BITS[prepared.setting.precision]
    also = [f"{bits} bit" for bits in found.bits if bits != stored]
    also += ["deferral"] * found.deferral
    if also:
        console.print(f"\nAllowed, though it changes results: {', '.join(also)}")
