"""What a step's tokens are, and how experts read them and add to them, wherever they run.

An expert reads rows of the normed stream of its layer, from `inputs` on the device or `cpu_inputs`
on the host, and what it returns is taken by `put` or `cpu_put`. A method is called by the thread of
the lane that its docstring names, when everything that the host program lets the operation wait
for is over. How long a buffer must last decides how many there are of it:

* an EXPERT_CPU whose result is deferred may run until COMBINE of the next layer, so that what SEND
  brought, the routing and the sums on the host are two each, by parity of the layer. SEND of the
  layer after next is behind its attention, and that is behind this COMBINE;
* SEND may still read the normed stream while the next layer attends: two, by parity of the layer;
* a RETURN is added up before the next one of its sort comes: one buffer on the device for each;
* the routing on the device is used up by COMBINE: one.
"""

from typing import Any

from moesim.real.device import Device
from moesim.real.exchange import Exchange
from moesim.real.routing import Choices
from moesim.real.sequences import Now, groups_of, now_of
from moesim.traces.workload import Steps
from moesim.types import NONE, FloatArray, IntArray


class Stream:
    """The tokens of the step under way; `experts` is what a layer has, `hidden` a row.

    `weights_dtype` is what router weights are multiplied in; that of the activations by default.
    """

    def __init__(
        self, device: Device, steps: Steps, hidden: int, top_k: int, experts: int, dtype: Any,
        weights_dtype: Any = None,
    ) -> None:  # fmt: skip
        """Take the memory; the lanes of the device must be idle."""
        self.device = device
        self.steps = steps
        self.hidden = hidden
        self.groups = groups_of(steps)
        self.nows = [now_of(steps, self.groups, step) for step in range(len(steps.phase))]
        self.now: Now = self.nows[0]
        """The step under way."""
        self.residual: Any = None
        """(tokens, hidden): the stream; behind COMBINE, what a layer leaves behind."""
        self.choice: dict[int, tuple[Any, Any]] = {}
        """By batch: ids and weights (tokens, top_k) that the router chose, on the device."""
        self.logits: Any = None
        """(sequences, vocabulary) of the last HEAD, on the device."""
        self.tokens: Any = None
        """(sequences,): the next ones."""
        tokens = int((steps.offset[:, -1] - steps.offset[:, 0]).max())
        self.exchange = Exchange(device, tokens, hidden, dtype)
        self.choices = Choices(device, tokens, top_k, experts, weights_dtype or dtype)
        self._stream = device.empty(tokens, hidden, dtype=dtype)
        self._normed_rooms = [device.empty(tokens, hidden, dtype=dtype) for _ in range(2)]
        self._normed = list(self._normed_rooms)
        self._results = device.empty(tokens, top_k, hidden, dtype=dtype)
        # What no expert writes is multiplied by 0, and must be finite.
        device.lanes["gpu"].submit(self._results.zero_).wait()
        self._written: dict[int, set[int]] = {}
        self._indices: dict[bytes, Any] = {}
        for now in self.nows:
            for rows in (now.last, *(share.rows for shares in now.shares for share in shares)):
                self._place_rows(rows)

    def on_device(self, rows: slice | IntArray) -> Any:
        """Return rows of a step, a group's or the last ones, as an index on the device."""
        return rows if isinstance(rows, slice) else self._indices[rows.tobytes()]

    def normed(self, layer: int) -> Any:
        """Return what a layer's router and experts read (tokens, hidden); lane `gpu`."""
        return self._normed[layer % 2][: self.now.tokens]

    def route(self, layer: int, batch: int, ids: IntArray, weights: FloatArray | None) -> None:
        """Take the choice that counts, (tokens, top_k) of a batch; any thread, behind the GATE.

        Other ids than those of experts are no choice; no weights are equal ones. The experts' rows
        are known once all batches of the step have come.
        """
        self.choices.take(self.now, layer, batch, ids, weights)

    def inputs(self, layer: int, expert: int, batch: int = NONE) -> Any:
        """Return an expert's rows (its tokens, hidden); lane `gpu`."""
        _, rows, _ = self.choices.on_device(layer)
        own = rows[self.choices.of(layer).span(expert, batch)]
        return self._normed[layer % 2].index_select(0, own)

    def put(self, layer: int, expert: int, batch: int, result: Any) -> None:
        """Take an expert's result (its tokens, hidden), or a further piece of it; lane `gpu`."""
        places, _, _ = self.choices.on_device(layer)
        own = places[self.choices.of(layer).span(expert, batch)]
        results = self._results.view(-1, self.hidden)
        batches = self._written.setdefault(expert, set())
        if batch in batches:
            results.index_add_(0, own, result)
        else:
            results.index_copy_(0, own, result)
            batches.add(batch)

    def take_results(self, layer: int) -> tuple[Any, Any]:
        """Return results (tokens, top_k, hidden) and weights (tokens, top_k), 0 where the CPU has
        computed; lane `gpu`, once for each layer."""
        _, _, weights = self.choices.on_device(layer)
        routing = self.choices.of(layer)
        elsewhere = [expert for expert in routing.active if expert not in self._written]
        if elsewhere:
            self.choices.silence(elsewhere)
        self._written = {}
        return self._results[: self.now.tokens], weights

    def returned(self, layer: int) -> list[Any]:
        """Return what came back from the CPU (tokens, hidden) for a layer's COMBINE: its own, and
        what the last one deferred; lane `gpu`."""
        return self.exchange.returned((self.now.step, layer), self.now.tokens)

    def send(self, layer: int, batch: int = NONE) -> None:
        """Copy the normed stream of all tokens to the host; lane `d2h`."""
        self.exchange.send(layer, self.normed(layer))

    def cpu_inputs(self, layer: int, expert: int) -> Any:
        """Return an expert's rows (its tokens, hidden), as sent; lane `cpu`."""
        routing = self.choices.of(layer)
        rows = routing.rows[routing.span(expert)]
        return self.exchange.sent(layer, self.now.tokens).index_select(0, rows)

    def cpu_put(self, layer: int, expert: int, result: Any, deferred: bool = False) -> None:
        """Take an expert's result (its tokens, hidden), weigh it and add it up; lane `cpu`."""
        routing = self.choices.of(layer)
        span = routing.span(expert)
        weights = routing.weights.view(-1)[routing.places[span]]
        moment = (self.now.step, layer)
        self.exchange.add(moment, self.now.tokens, routing.rows[span], result, weights, deferred)

    def return_(self, layer: int, batch: int = NONE, deferred: bool = False) -> None:
        """Copy to the device what the CPU added up; lane `h2d`.

        `layer` is the one whose experts were computed, the last one's where they are deferred.
        """
        self.exchange.bring_back((self.now.step, layer), self.now.tokens, deferred)

    def _place_rows(self, rows: slice | IntArray) -> None:
        """Copy rows that are no slice to the device, once."""
        import torch

        if isinstance(rows, slice) or rows.tobytes() in self._indices:
            return
        index = self.device.empty(len(rows), dtype=torch.int64)
        source = torch.from_numpy(rows)
        self.device.lanes["h2d"].submit(lambda: self.device.copy(index, source)).wait()
        self._indices[rows.tobytes()] = index

    def _leave(self, layer: int, rows: Any, residual: Any, normed: Any) -> None:
        """Write what attention left to its rows."""
        parity = layer % 2
        self.residual = written(self.residual, rows, residual)
        room = self._normed_rooms[parity][: self.now.tokens]
        self._normed[parity] = written(room, rows, normed)


def written(target: Any, rows: Any, values: Any) -> Any:
    """Return a tensor with some of its rows replaced: the values themselves if these are all."""
    if len(values) == len(target):
        return values
    target[rows] = values
    return target
