"""`moesim compile`: make the fast machine ahead of time, or clear what was made."""

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from moesim.policies.registry import Chosen
    from moesim.run import Prepared


@click.command()
@click.argument("policies", nargs=-1, metavar="[POLICY]...")
@click.option("--clear", is_flag=True, help="Delete everything that was compiled, and stop.")
@click.option("--list", "listing", is_flag=True, help="Show what was compiled, and stop.")
def command(policies: tuple[str, ...], clear: bool, listing: bool) -> None:
    """Compile the simulator and policies once, so that later runs are fast from the start.

    Without POLICY, all that are installed. What is compiled is kept in the user's cache folder
    (MOESIM_CACHE_DIR is another one) and made anew when moesim, a policy, Numba or the processor
    changes.
    """
    from moesim.errors import InputError
    from moesim.jit import store
    from moesim.policies.registry import choose, names

    if clear and (listing or policies):
        raise InputError("--clear deletes everything, and goes with nothing else")
    if clear:
        count = store.clear()
        click.echo(f"{count} modules deleted from {store.folder()}")
        return
    if listing:
        for path, record in store.records():
            what = (
                f"does not compile: {record.error}" if record.error else f"{record.seconds:.1f} s"
            )
            click.echo(f"{path.stem}  {what}")
        click.echo(f"in {store.folder()}")
        return
    failed = [
        chosen.name
        for chosen in [choose(spec) for spec in policies or names()]
        if not compile_policy(chosen)
    ]
    if failed:
        raise InputError(f"these run on SimPy only: {', '.join(failed)}")


def compile_policy(chosen: "Chosen") -> bool:
    """Compile what a policy needs, with a line before and after; say whether it compiles."""
    import time

    from moesim.errors import InputError
    from moesim.jit.flatten import NotCompilableError
    from moesim.sim.engine import choose_machine, compile_for

    prepared = any_run(chosen)
    began = time.perf_counter()
    try:
        click.echo(f"{chosen.name}: {choose_machine('compiled', prepared, 0).why}", err=True)
        compile_for(prepared)
    except (InputError, NotCompilableError) as error:
        click.echo(f"{chosen.name}: {error}", err=True)
        return False
    click.echo(f"{chosen.name}: ready after {time.perf_counter() - began:.1f} s")
    return True


def any_run(chosen: "Chosen") -> "Prepared":
    """Return a run through a policy: compiled code is the same for all models and machines."""
    from moesim.model import expert_bytes, spec_from_dict
    from moesim.profile import load_profile
    from moesim.run import prepare
    from moesim.traces.bundled import example_path
    from moesim.traces.format import read_trace
    from moesim.traces.workload import cut

    trace = read_trace(example_path())
    model = spec_from_dict(trace.meta["spec"])
    budget_bytes = model.layers * model.experts * expert_bytes(model, 16)
    return prepare(
        trace, cut(trace, 1, prompt=1, generate=1), model, load_profile(None)[0], chosen,
        budget_bytes=budget_bytes,
    )  # fmt: skip
