"""What a run is about, from names and texts: trace, workload, model, machine and budget."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import msgspec

from moesim.costs import Costs
from moesim.errors import InputError, ModelError
from moesim.model import (
    ModelSpec,
    expert_bytes,
    expert_params,
    first_layers,
    kv_bytes_per_token,
    load_model,
    model_names,
    normalised,
    spec_from_dict,
    total_params,
)
from moesim.policies.registry import Chosen
from moesim.profile import HardwareProfile, load_profile, with_overrides
from moesim.run import Prepared, prepare
from moesim.sizes import parse_size, size_in_words
from moesim.traces.bundled import example_path
from moesim.traces.edit import take
from moesim.traces.format import Trace
from moesim.traces.importers import load_trace
from moesim.traces.workload import Workload, cut

RESERVE_BYTES = 1 << 30
"""What the default budget leaves on the GPU for activations and the runtime."""
MOST_OF_ALL = 3, 2
"""The default budget is at most so much of all experts: room to stage some beside them."""
MAX_CONTEXT = 1 << 24
"""The most tokens that a sequence may have before its prompt."""


class Inputs(NamedTuple):
    """Everything of a run but its policy, loaded."""

    trace: Trace
    workload: Workload
    model: ModelSpec
    profile: HardwareProfile
    budget_bytes: int
    bits: int
    notices: tuple[str, ...]
    """What was chosen for whoever did not."""

    @classmethod
    def load(
        cls, trace: Trace | Path | str | None = None, *, model: ModelSpec | str | None = None,
        hardware: HardwareProfile | str | None = None, settings: Mapping[str, str] | None = None,
        budget: int | str | None = None, cache_ratio: float | None = None, bits: int | str = 16,
        batch: int = 1, prompt: int | None = None, generate: int | None = None, start: int = 0,
        layers: int | None = None, repeat: bool = False, room_bytes: int | None = None,
        context: int = 0,
    ) -> "Inputs":  # fmt: skip
        """Load what is named, and take what is given; see `moesim replay --help` for each.

        `trace` None is the one that ships with moesim, `model` None the trace's own, `hardware`
        None this machine's profile or else a preset. `budget` is in bytes, or a text such as 8GiB;
        `cache_ratio` is a share of all experts instead. Only the first `layers` MoE layers count
        or, with `room_bytes`, as many as have room there. Each sequence has `context` tokens before
        its prompt, which are attended to.

        Raises MoesimError for what does not exist or does not fit together.
        """
        if budget is not None and cache_ratio is not None:
            raise InputError("budget and cache ratio exclude each other")
        if isinstance(hardware, HardwareProfile):
            profile, notice = hardware, ""
        else:
            profile, notice = load_profile(hardware)
        profile = with_overrides(profile, settings or {})
        spec = load_model(model) if isinstance(model, str) else model
        if isinstance(trace, Trace):
            routing = trace
        else:
            routing = load_trace(Path(trace) if trace else example_path(), spec=spec)
        if spec is None:
            spec = model_of(routing)
        said_layers = ""
        if layers is None and room_bytes is not None:
            layers, said_layers = layers_in(spec, int(bits), room_bytes)
        if layers is not None:
            spec = first_layers(spec, layers)
            routing = take(routing, layers=(0, int(routing.layer_ids[:layers][-1]) + 1))
        if not 0 <= context <= MAX_CONTEXT:
            raise InputError(f"context {context} is not in 0..{MAX_CONTEXT}")
        workload = msgspec.structs.replace(
            cut(routing, batch, prompt, generate, start, repeat), earlier=context
        )
        size, said = budget_of(spec, profile, workload, budget, cache_ratio, int(bits))
        notices = tuple(filter(None, (notice, said_layers, said)))
        return cls(routing, workload, spec, profile, size, int(bits), notices)

    def prepare(self, chosen: Chosen, seed: int = 0, costs: Costs | None = None) -> Prepared:
        """Return a run of a policy on these inputs; `costs` replace those of the machine."""
        return prepare(
            self.trace, self.workload, self.model, self.profile, chosen,
            budget_bytes=self.budget_bytes, bits=self.bits, seed=seed, costs=costs,
        )  # fmt: skip


def model_of(trace: Trace) -> ModelSpec:
    """Return the model that a trace was recorded from; raise InputError if that is not known."""
    if "spec" in trace.meta:
        try:
            return spec_from_dict(trace.meta["spec"])
        except ModelError as error:
            raise InputError(f"the trace's meta.spec: {error}; use --model") from None
    names = model_names()
    recorded = trace.meta.get("model")
    if not isinstance(recorded, str):
        raise InputError(
            f"the trace does not say what model it is of; use --model, there are: "
            f"{', '.join(names)}, or the path of a config.json"
        )
    # Compared as a name only: what a trace says must not lead to a file or folder.
    plain = normalised(recorded)
    if plain not in names:
        raise InputError(
            f"the trace is of model {recorded!r}, which is unknown; use --model, there are: "
            f"{', '.join(names)}, or the path of a config.json"
        )
    return load_model(plain)


def layers_in(spec: ModelSpec, bits: int, room_bytes: int) -> tuple[int, str]:
    """Return how many MoE layers' experts have room, and a note if it is not all."""
    layer_bytes = spec.experts * expert_bytes(spec, bits)
    count = min(spec.layers, room_bytes // layer_bytes)
    if count < 1:
        raise InputError(
            f"the experts of one layer of {spec.name} take {layer_bytes / 2**30:.1f} GiB, and there"
            f" is room for {room_bytes / 2**30:.1f} GiB"
        )
    said = (
        f"the first {count} of {spec.layers} MoE layers: the host has room for their experts"
        if count < spec.layers
        else ""
    )
    return count, said


def size_bytes(size: int | str) -> int:
    """Return a size such as 8GiB, 24GB or 1000000 in bytes; raise InputError for anything else."""
    found = size if isinstance(size, int) else parse_size(size)
    if found is None:
        raise InputError(f"budget {size}: write a size of 0 or more, as 8GiB, 24GB or 1000000")
    return found


def check_ratio(ratio: float) -> None:
    """Raise InputError for what is no share of all experts."""
    if not 0 <= ratio <= 1:  # nor nan
        raise InputError(f"cache ratio {ratio} is not in 0..1")


def left_bytes(spec: ModelSpec, profile: HardwareProfile, tokens: int) -> tuple[int, int, int]:
    """Return what a GPU has left for experts, and what the others take, all in bytes.

    Those are all other weights in 16 bit, and keys and values of so many tokens. What is left may
    be negative: it is what is missing.
    """
    experts = spec.layers * spec.experts
    other = 2 * (total_params(spec) - experts * expert_params(spec))
    kept = tokens * sum(kv_bytes_per_token(spec))
    return profile.gpu.memory_bytes - other - kept - RESERVE_BYTES, other, kept


def budget_of(
    spec: ModelSpec, profile: HardwareProfile, workload: Workload, budget: int | str | None,
    ratio: float | None, bits: int,
) -> tuple[int, str]:  # fmt: skip
    """Return the bytes for experts on the GPU, and a note where the user did not choose them.

    By default what the GPU has left beside everything else of the model in 16 bit, the keys and
    values of the whole workload, and a reserve; at most `MOST_OF_ALL` experts.
    """
    experts = spec.layers * spec.experts
    one = expert_bytes(spec, bits)
    if budget is not None:
        return size_bytes(budget), ""
    if ratio is not None:
        check_ratio(ratio)
        return int(ratio * experts * one), ""
    left, other, kept = left_bytes(spec, profile, workload.kv_tokens)
    if left < one:
        raise InputError(
            f"{profile.gpu.name} has no room for an expert beside {other / 2**30:.1f} GiB of other "
            f"weights and {kept / 2**30:.1f} GiB of keys and values; say --budget"
        )
    left = min(left, experts * one * MOST_OF_ALL[0] // MOST_OF_ALL[1])
    share = min(1.0, left / (experts * one))
    said = f"budget {size_in_words(left)}, {share:.0%} of all experts: what {profile.gpu.name} has"
    if share == 1:
        return left, f"{said}; policies differ where experts do not fit: try --cache-ratio 0.25"
    return left, f"{said} left"
