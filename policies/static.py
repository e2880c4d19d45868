"""Static split: some experts live on the GPU for good, the CPU computes all others."""

import json
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from moesim.errors import InputError
from moesim.policies.api import (
    Placement,
    Plan,
    Setting,
    View,
    layer_caches,
    run_on_cpu,
    run_on_gpu,
)
from moesim.policies.parts.placement import across_layers, by_popularity, resident
from moesim.types import IntArray


class Static(NamedTuple):
    """A fixed set of experts runs on the GPU, every other one on the CPU; no weights ever move.

    By layer and index: llama.cpp's `--n-cpu-moe N`, the experts of the first N layers on the CPU.
    By expert and index: KTransformers' `uniform`, equally many per layer. By expert and popularity:
    Fiddler's placement (arXiv 2402.07033), the most used (layer, expert) pairs in one global order,
    counted on the part of the trace that is not replayed.

    Attention and gates are on the GPU, unlike in the layers that llama.cpp's layer split leaves to
    the CPU, and a long prompt copies no weights either.
    """

    resident: IntArray
    """(layers, experts)."""

    @classmethod
    def new(
        cls,
        setting: Setting,
        by: Literal["layer", "expert"] = "layer",
        order: Literal["index", "popularity", "list"] = "index",
        file: str = "",
    ) -> "Static":
        """`file`, for order=list: JSON [[layer, expert], ...], or [layer, ...] by layer."""
        if file and order != "list":
            raise InputError(f"policy static: file={file} is read with order=list only")
        layers, experts = setting.layers, setting.experts
        if order == "list":
            pairs = read_list(file, by, (layers, experts))
            wanted = np.array([layer * experts + expert for layer, expert in pairs], np.int64)
        elif by == "layer":
            if order == "popularity":
                raise InputError("policy static: every layer is equally popular; use by=expert")
            wanted = np.arange(layers * experts).reshape(layers, experts)[::-1].ravel()
        elif order == "index":
            wanted = across_layers(setting)
        else:
            if not setting.popularity.any():
                raise InputError(
                    "policy static: order=popularity counts on the part of the trace that is not "
                    "replayed, and nothing is left of it; replay fewer sequences"
                )
            wanted = by_popularity(setting)
        fits = setting.slots
        if by == "layer":
            fits -= fits % experts
        return cls(resident(setting, wanted[:fits]))

    def place(self, setting: Setting) -> Placement:
        """Fill exactly the slots that are used."""
        slots = (self.resident > 0).sum(axis=1)
        return layer_caches(setting, cached=self.resident, slots=slots, staging_slots=0)

    def dispatch(self, view: View, plan: Plan) -> None:
        """Let the CPU begin, then run what is resident."""
        for i in range(view.n_active):
            if view.cached[view.layer, view.active[i]] == 0:
                run_on_cpu(plan, view.active[i])
        for i in range(view.n_active):
            if view.cached[view.layer, view.active[i]] > 0:
                run_on_gpu(plan, view.active[i])


def read_list(file: str, by: str, shape: tuple[int, int]) -> list[tuple[int, int]]:
    """Read (layer, expert) pairs in order of priority; raise InputError for anything else."""
    form = "[[layer, expert], ...]" if by == "expert" else "[layer, ...]"
    if not file:
        raise InputError(f"policy static: order=list needs file=FILE, a JSON list {form}")
    try:
        entries = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"policy static: cannot read file={file}: {error}") from None
    if not isinstance(entries, list):
        raise InputError(f"policy static: {file} is {entries!r:.60}; legal is {form}")
    layers, experts = shape
    pairs: list[tuple[int, int]] = []
    for entry in entries:
        match entry:
            case bool() | [_, bool()] | [bool(), _]:  # an int to Python
                legal = False
            case int():
                legal = by == "layer" and 0 <= entry < layers
            case [int() as layer, int() as expert]:
                legal = by == "expert" and 0 <= layer < layers and 0 <= expert < experts
            case _:
                legal = False
        if not legal:
            raise InputError(
                f"policy static: {file} has {entry!r:.60}; legal is {form} with layers "
                f"0..{layers - 1} and experts 0..{experts - 1}"
            )
        pairs += [(entry, e) for e in range(experts)] if by == "layer" else [tuple(entry)]
    if len(set(pairs)) < len(pairs):
        raise InputError(f"policy static: {file} names an expert twice")
    return pairs
