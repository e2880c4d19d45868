"""Who gets the memory of a machine that is asked about a model, and what would fit there."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from moesim.answers.inputs import MAX_CONTEXT, RESERVE_BYTES, left_bytes
from moesim.model import ModelSpec, expert_bytes, kv_bytes_per_token
from moesim.profile import HardwareProfile
from moesim.sizes import size_in_words

PRECISIONS = (16, 8, 4)
"""Bits of experts that people choose from."""
LEAST_CONTEXT = 88
"""Tokens of the shortest context that is simulated."""


class Question(NamedTuple):
    """What is asked, loaded."""

    spec: ModelSpec
    profile: HardwareProfile
    context: int
    bits: int
    batch: int

    @property
    def expert_bytes(self) -> int:
        """Of one expert."""
        return expert_bytes(self.spec, self.bits)

    @property
    def all_bytes(self) -> int:
        """Of all experts."""
        return self.spec.layers * self.spec.experts * self.expert_bytes


def memory_of(asked: Question) -> dict[str, Any]:
    """Return who gets the GPU's memory and the host's, in bytes, and what would fit.

    `gpu` sums to the GPU's memory; `missing` is what it lacks for everything but experts.
    """
    spec, profile, bits = asked.spec, asked.profile, asked.bits
    tokens, experts = asked.context * asked.batch, spec.layers * spec.experts
    left, other, kept = left_bytes(spec, profile, tokens)
    one, everything = asked.expert_bytes, asked.all_bytes
    budget = min(max(0, left), everything)
    budget -= budget % one
    per_token = sum(kv_bytes_per_token(spec)) * asked.batch
    room = left + kept  # without keys and values
    on_host = everything if budget < everything else 0
    return {
        "gpu": {
            "other_weights": other,
            "kv_cache": kept,
            "reserve": RESERVE_BYTES,
            "experts": budget,
            "free": left - budget,
        },
        "gpu_bytes": profile.gpu.memory_bytes,
        "host_bytes": profile.cpu.memory_bytes,
        "host_experts": on_host,
        "budget_bytes": budget,
        "experts": budget // one,
        "all_experts": experts,
        "share": budget / everything,
        "missing": max(0, -left),
        "host_missing": max(0, on_host - profile.cpu.memory_bytes),
        "most_context": max(0, room // per_token) if per_token else MAX_CONTEXT,
        "most_context_wholly": max(0, (room - everything) // per_token) if per_token else None,
        "by_bits": [
            {
                "bits": each,
                "all_bytes": experts * size,
                "share": min(experts, max(0, left) // size) / experts,
                "host_fits": experts * size <= profile.cpu.memory_bytes,
            }
            for each in PRECISIONS
            for size in [expert_bytes(spec, each)]
        ],
        "bits": bits,
    }


def fits(memory: Mapping[str, Any]) -> str:
    """Return `wholly`, `partly` (some experts stay with the host) or `no`."""
    if memory["missing"] or memory["host_missing"]:
        return "no"
    return "wholly" if memory["experts"] == memory["all_experts"] else "partly"


def naive_of(asked: Question) -> dict[str, float]:
    """Return what pure bandwidth says, the formula of many calculators, in tokens/s.

    Bytes per second over the bytes of the experts that one token activates: of one sequence.
    """
    active = asked.spec.layers * asked.spec.top_k * asked.expert_bytes
    return {
        "active_bytes": float(active),
        "dram_tokens_per_s": asked.profile.cpu.memory_bytes_per_s / active,
        "link_tokens_per_s": asked.profile.link.h2d.bytes_per_s / active,
    }


def lacks(memory: Mapping[str, Any]) -> list[str]:
    """Say what is missing."""
    said = []
    if memory["missing"]:
        said.append(f"the GPU lacks {size_in_words(memory['missing'])}")
    if memory["host_missing"]:
        said.append(f"the host lacks {size_in_words(memory['host_missing'])} to keep all experts")
    return said


def each_of(batch: int) -> str:
    """Return what to say behind the context of one of several sequences."""
    return f" x {batch} sequences" if batch > 1 else ""


def ways_out(data: Mapping[str, Any]) -> list[str]:
    """Say what would fit, in one line each."""
    memory = data["memory"]
    said = []
    if memory["missing"]:
        most = memory["most_context"]
        said.append(
            f"with a context of at most {most} tokens{each_of(data['batch'])} the rest fits"
            if most >= LEAST_CONTEXT
            else f"not even {LEAST_CONTEXT} tokens, the least context that is simulated, have room"
            " beside the weights outside the experts"
        )
    if memory["host_missing"]:
        fewer = [
            one for one in memory["by_bits"] if one["host_fits"] and one["bits"] < data["bits"]
        ]
        said.append(
            f"in {fewer[0]['bits']} bit the experts take {size_in_words(fewer[0]['all_bytes'])}"
            if fewer
            else "even in 4 bit the experts take "
            f"{size_in_words(memory['by_bits'][-1]['all_bytes'])}; a disk is not simulated here"
        )
    return said
