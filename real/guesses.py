"""What predictors guess while a model runs, made of its hidden states and of what it has chosen."""

import copy
import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np

from moesim.errors import InputError
from moesim.policies.api import Prediction
from moesim.real.lanes import Work
from moesim.real.model_forward import ModelForward
from moesim.real.torch_machine import Operation
from moesim.run import Feed
from moesim.traces.predictors import rows_before
from moesim.traces.recorder.hooks import MeanInputs
from moesim.types import CPU, NONE

PREVIOUS = "previous"
LIVE = re.compile(r"(gate|residual)\d+")


def check_live(policy: str, names: Sequence[str]) -> None:
    """Raise InputError for a predictor that cannot be asked while a model runs."""
    for name in names:
        if name != PREVIOUS and not LIVE.fullmatch(name):
            raise InputError(
                f"policy {policy} asks predictor {name}, which only guesses in a trace; while a "
                f"model runs there are {PREVIOUS}, gate1, gate2, ... and, if mean router inputs are"
                " given, residual1, ..."
            )


class Guesses:
    """The predictions of a run by their predictors' names.

    `gate<n>`: the router of the layer guessed, on what this layer's router reads; where predictions
    wrap, the first layers' routers guess the next token from what the last layers read of this one.
    `residual<n>`: likewise, on that plus what it grows by on average until there, of `mean_inputs`
    (layers, hidden). `previous`: what was chosen for the token before. Router modules are on the
    device when this is made.
    """

    def __init__(
        self, forward: ModelForward, predictions: Sequence[Prediction], names: Sequence[str],
        feed: Feed, mean_inputs: MeanInputs | None = None,
    ) -> None:  # fmt: skip
        """Take the parts of a run; `feed` holds what was chosen so far."""
        self.forward = forward
        self.predictions = predictions
        self.names = names
        self.feed = feed
        self.mean_inputs = mean_inputs
        self.found: dict[int, tuple[Any, Any]] = {}
        """By prediction: candidates and scores (tokens, width), not on the host yet."""
        self._before = rows_before(feed.steps)
        self._moment = (NONE, NONE)
        self._due: Iterator[int] = iter(())
        self._on_host: list[Any] = []
        if any(one.lane == CPU for one in predictions):
            for router in forward.parts.routers:
                own = copy.copy(router)
                own.module = copy.deepcopy(router.module).to("cpu")
                self._on_host.append(own)

    def work(self, o: Operation) -> Work:
        """Return the work of a PREDICT; those before the gate are submitted first."""
        if (o.step, o.layer) != self._moment:
            self._moment = o.step, o.layer
            self._due = iter(self.made_in(o.step, o.layer))
        return partial(self.make, next(self._due), o.layer, o.queue == CPU)

    def made_in(self, step: int, layer: int) -> list[int]:
        """Return the predictions that are made in a layer step: not beyond the last step."""
        layers, steps = self.forward.parts.spec.layers, len(self.feed.steps.phase)
        order = sorted(range(len(self.predictions)), key=lambda p: self.predictions[p].after_gate)
        return [p for p in order if step + (layer + self.predictions[p].distance) // layers < steps]

    def make(self, p: int, layer: int, on_cpu: bool) -> None:
        """Ask the router of the layer guessed; lane `gpu` or `cpu`."""
        self.found.pop(p, None)
        one, parts, forward = self.predictions[p], self.forward.parts, self.forward
        target = layer + one.distance
        if self.names[p] == PREVIOUS or (target >= parts.spec.layers and not one.wraps):
            return
        rows = forward.exchange.sent(layer, forward.now.tokens) if on_cpu else forward.normed(layer)
        if target >= parts.spec.layers:
            last = forward.now.last
            rows = rows[last if on_cpu else forward.on_device(last)]
        elif self.names[p].startswith("residual"):
            rows = rows + self.growth(layer, target).to(rows.device, rows.dtype)
        routers = self._on_host if on_cpu else parts.routers
        top_k = parts.spec.top_k
        router = routers[target % parts.spec.layers]
        choice = router.apply(rows, max(one.width, top_k), top_k)
        self.found[p] = choice.candidates, choice.scores

    def growth(self, layer: int, target: int) -> Any:
        """Return what router inputs grow by on average from a layer to another (hidden,)."""
        import torch

        assert self.mean_inputs is not None
        return torch.from_numpy(self.mean_inputs[target] - self.mean_inputs[layer])

    def of(self, p: int, layer: int) -> tuple[Any, Any] | None:
        """Return ids and scores (tokens, width) of the layer guessed, or None for none."""
        if self.names[p] == PREVIOUS:
            step, source = self._moment
            offset = self.feed.steps.offset[step + (layer <= source)]
            before = self._before[offset[0] : offset[-1]]
            return np.where((before < 0)[:, None], NONE, self.feed.chosen[before, layer]), None
        if p not in self.found:
            return None
        ids, scores = self.found[p]
        return ids.cpu().numpy(), scores.cpu().numpy()
