"""Which tokens are computed together: sequences of a batch that are alike, in every step."""

from typing import NamedTuple

import numpy as np

from moesim.traces.workload import Steps
from moesim.types import PREFILL, IntArray


class Group(NamedTuple):
    """Sequences of a batch with prompts of one length that generate equally many tokens.

    They take part in the same steps with the same past, so that one call computes them and one
    tensor holds their keys and values.
    """

    batch: int
    sequences: IntArray
    prompt: int
    length: int
    """Tokens of each that are computed in all."""


class Share(NamedTuple):
    """What is to be computed of a group in a step."""

    group: int
    rows: slice | IntArray
    """Of the step's tokens, one sequence after the other; a slice where they are neighbours."""
    sequences: int
    """How many."""
    new: int
    """Tokens of each."""
    past: int
    """Tokens of each that are in the caches already."""


class Now(NamedTuple):
    """A step's tokens."""

    step: int
    phase: int
    rows: slice
    """Of all rows of `Steps`."""
    bounds: tuple[int, ...]
    """(batches + 1,): where each batch begins among the step's tokens."""
    shares: tuple[tuple[Share, ...], ...]
    """By batch."""
    last: slice | IntArray
    """Row of each sequence's last token."""

    @property
    def tokens(self) -> int:
        """How many there are."""
        return self.bounds[-1]

    def rows_of(self, batch: int) -> slice:
        """Return a batch's rows among them."""
        return slice(*self.bounds[batch : batch + 2])

    @property
    def filled(self) -> tuple[int, ...]:
        """The batches that take part."""
        return tuple(batch for batch, shares in enumerate(self.shares) if shares)


def groups_of(steps: Steps) -> tuple[Group, ...]:
    """Return the groups of all batches, in order of their first sequences."""
    prefilled = slice(steps.offset[0, 0], steps.offset[0, -1])
    most = int(steps.sequence.max()) + 1
    prompts = np.bincount(steps.sequence[prefilled], minlength=most)
    lengths = np.bincount(steps.sequence, minlength=most)
    alike: dict[tuple[int, int, int], list[int]] = {}
    for batch in range(steps.offset.shape[1] - 1):
        own = steps.sequence[steps.offset[0, batch] : steps.offset[0, batch + 1]]
        for sequence in np.unique(own).tolist():
            key = (batch, int(prompts[sequence]), int(lengths[sequence]))
            alike.setdefault(key, []).append(sequence)
    return tuple(
        Group(batch, np.array(sequences, np.int64), prompt, length)
        for (batch, prompt, length), sequences in alike.items()
    )


def now_of(steps: Steps, groups: tuple[Group, ...], step: int) -> Now:
    """Return a step's tokens."""
    offset = steps.offset[step]
    sequence = steps.sequence[offset[0] : offset[-1]]
    prefills = steps.phase[step] == PREFILL
    shares: list[list[Share]] = [[] for _ in range(len(offset) - 1)]
    for number, group in enumerate(groups):
        if not prefills and group.prompt + step > group.length:
            continue
        rows = np.flatnonzero(np.isin(sequence, group.sequences))
        new = group.prompt if prefills else 1
        past = 0 if prefills else group.prompt + step - 1
        share = Share(number, neighbours(rows), len(group.sequences), new, past)
        shares[group.batch].append(share)
    return Now(
        step=step,
        phase=int(steps.phase[step]),
        rows=slice(int(offset[0]), int(offset[-1])),
        bounds=tuple((offset - offset[0]).tolist()),
        shares=tuple(map(tuple, shares)),
        last=neighbours(np.flatnonzero(np.diff(sequence, append=-1))),
    )


def neighbours(rows: IntArray) -> slice | IntArray:
    """Return ascending rows as a slice if none is left out between them."""
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first + 1 == len(rows) else rows
