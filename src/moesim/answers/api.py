"""The functions of `import moesim as ms`."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from moesim.answers.inputs import Inputs
from moesim.answers.result import Result
from moesim.errors import InputError
from moesim.model import ModelSpec
from moesim.policies.registry import choose
from moesim.profile import HardwareProfile
from moesim.sim import replay as simulation
from moesim.sim.engine import machine_for
from moesim.traces.format import Trace


def replay(
    trace: Trace | Path | str | None = None, *, policy: str = "dali",
    model: ModelSpec | str | None = None, hardware: HardwareProfile | str | None = None,
    settings: Mapping[str, Any] | None = None, budget: int | str | None = None,
    cache_ratio: float | None = None, bits: int = 16, batch: int = 1, prompt: int | None = None,
    generate: int | None = None, start: int = 0, layers: int | None = None, repeat: bool = False,
    machine: str = "auto", jitter: float = 0.0, seed: int = 0, record: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Result:  # fmt: skip
    """Replay a routing trace through a policy on a simulated machine: `moesim replay`.

    `trace`, `model` and `hardware` may be given by name or path, or loaded; None is the trace that
    ships with moesim, the trace's own model, and this machine or else a preset. `budget` is GPU
    memory for experts in bytes or as a text such as "8GiB", `cache_ratio` instead a share of all
    experts, None what the GPU has left. `settings` change numbers of the hardware profile.
    Without `prompt` and `generate` the trace's own sequences are served. `record` keeps the log,
    for `Result.timeline`; `progress` is called with the steps done and the steps in all.

    Raises MoesimError, in one line, for anything that is not there, not legal or does not fit.
    """
    if not 0 <= jitter <= 1:
        raise InputError(f"jitter {jitter} is not in 0..1")
    chosen = choose(policy)
    texts = {key: str(value) for key, value in (settings or {}).items()}
    given = Inputs.load(
        trace, model=model, hardware=hardware, settings=texts, budget=budget,
        cache_ratio=cache_ratio, bits=bits, batch=batch, prompt=prompt, generate=generate,
        start=start, layers=layers, repeat=repeat,
    )  # fmt: skip
    prepared = given.prepare(chosen, seed)
    machine = machine_for(prepared, machine, lambda _: None)
    return Result(
        simulation.replay(
            prepared, machine=machine, seed=seed, jitter=round(jitter * 1024), record=record,
            progress=progress,
        )
    )  # fmt: skip
