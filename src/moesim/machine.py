"""The verbs by which the host program knows a machine: lanes of work, and a clock it never reads.

They are free functions over a machine value, so that the host may be compiled with other functions
under the same names. Written in Python they call the method of the same name, and whatever has
these methods is a machine: SimPy lanes, compiled lanes, torch lanes.
"""

from typing import Any, Protocol

from moesim.types import FloatArray, IntArray


class Machine(Protocol):
    """Lanes `gpu, cpu, h2d, d2h, disk`, each doing one operation at a time in order of submission.

    An operation starts when its lane is free and all that it waits for is done; a blocked head of a
    queue blocks that queue only. `h2d` has two queues: a ready urgent copy goes before background
    ones, and preempts one at its next chunk border.
    """

    def begin(self, step: int, phase: int) -> None:
        """Start a step: one forward pass."""

    def submit(
        self, queue: int, kind: int, layer: int, expert: int, batch: int, amount: int, context: int,
        part: int, precision: int, slot: int, cause: int, after0: int, after1: int, after2: int,
    ) -> int:  # fmt: skip
        """Queue one operation and return its ticket: 1, 2, 3 and so on. The host does not wait.

        `amount` is tokens or bytes, by kind; `context` the tokens attended to, or the first part of
        the expert; `slot` the GPU slot that a copy fills and an expert reads; tickets `after0..2`
        must be done before it starts (0: nothing). It starts before `submit` returns if it can.
        """

    def wait(self, ticket: int) -> None:
        """Block the host until the operation is done; raise DeadlockError if it never can be."""

    def done(self, ticket: int) -> bool:
        """Say whether the operation is done. Tickets of long ago, and 0, are."""

    def pause(self, ns: int) -> None:
        """Let the host be busy itself for so long; `pause(0)` settles the present instant."""

    def cancel(self, ticket: int) -> bool:
        """Take back what has not started and what nothing submitted waits for; say if it did."""

    def promote(self, ticket: int) -> bool:
        """Put a queued or preempted background copy behind the urgent ones; say if it did.

        There is no effect with a FIFO link, on a copy under way, on one that waits for something,
        nor while an urgent copy does: background copies pass that one anyway, and behind it a copy
        that it waits for would never run.
        """

    def route(
        self, step: int, layer: int, batch: int, first: int, ids: IntArray, weights: FloatArray
    ) -> int:
        """Write what the router chose into rows `first...` of `ids` and `weights`, best first.

        Both are `(tokens, top_k)`. Returns the number of tokens. Legal once the batch's GATE is
        done.
        """

    def predict(self, guess: int, step: int, layer: int, ids: IntArray, scores: FloatArray) -> int:
        """Write a guess for a target layer of a step into `ids[guess]` and `scores[guess]`.

        Both are `(guesses, tokens, width)`, best first; an id of -1 is no guess. Returns the number
        of tokens. Legal once the PREDICT is done.
        """


def begin(machine: Machine, step: int, phase: int) -> None:
    """See `Machine.begin`."""
    machine.begin(step, phase)


def submit(machine: Machine, *operation: Any) -> int:
    """See `Machine.submit`."""
    return machine.submit(*operation)


def wait(machine: Machine, ticket: int) -> None:
    """See `Machine.wait`."""
    machine.wait(ticket)


def done(machine: Machine, ticket: int) -> bool:
    """See `Machine.done`."""
    return machine.done(ticket)


def pause(machine: Machine, ns: int) -> None:
    """See `Machine.pause`."""
    machine.pause(ns)


def cancel(machine: Machine, ticket: int) -> bool:
    """See `Machine.cancel`."""
    return machine.cancel(ticket)


def promote(machine: Machine, ticket: int) -> bool:
    """See `Machine.promote`."""
    return machine.promote(ticket)


def route(
    machine: Machine,
    step: int,
    layer: int,
    batch: int,
    first: int,
    ids: IntArray,
    weights: FloatArray,
) -> int:
    """See `Machine.route`."""
    return machine.route(step, layer, batch, first, ids, weights)


def predict(
    machine: Machine, guess: int, step: int, layer: int, ids: IntArray, scores: FloatArray
) -> int:
    """See `Machine.predict`."""
    return machine.predict(guess, step, layer, ids, scores)
