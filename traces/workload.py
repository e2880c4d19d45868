"""What a run serves: sequences cut from a trace, and the forward passes that compute them."""

from collections.abc import Iterator
from itertools import cycle, islice, pairwise
from typing import NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from moesim.errors import TraceError
from moesim.traces.format import Trace, rows_by_sequence
from moesim.types import DECODE, PREFILL, IntArray


class Workload(msgspec.Struct, frozen=True, eq=False, kw_only=True):
    """The sequences of a run, as rows of a trace.

    Sequence i is `rows[starts[i]:starts[i + 1]]`; its first `prompts[i]` rows are the prompt, the
    others are forwarded one by one while generating. The prompt's step gives the first token and
    the last token is never forwarded, so n decode rows generate n + 1 tokens.
    """

    rows: IntArray
    starts: IntArray
    prompts: IntArray
    notices: tuple[str, ...] = ()
    earlier: int = 0
    """Tokens that each sequence has keys and values of before its first row: a context that is
    attended to, but not computed."""

    @property
    def sequences(self) -> int:
        """How many sequences are served."""
        return len(self.prompts)

    @property
    def generated(self) -> IntArray:
        """Tokens that each sequence generates (sequences,)."""
        return np.diff(self.starts) - self.prompts + 1

    @property
    def step_tokens(self) -> int:
        """The most tokens of a step: all prompts together, or one of each sequence."""
        return max(int(self.prompts.sum()), self.sequences)

    @property
    def kv_tokens(self) -> int:
        """The most tokens that have keys and values at once: all of all sequences."""
        return len(self.rows) + self.sequences * self.earlier

    def prompt_rows(self, sequence: int) -> IntArray:
        """Return the trace rows of a sequence's prompt."""
        start = self.starts[sequence]
        return self.rows[start : start + self.prompts[sequence]]

    def decode_rows(self, sequence: int) -> IntArray:
        """Return the trace rows that a sequence forwards one by one after its prompt."""
        return self.rows[self.starts[sequence] + self.prompts[sequence] : self.starts[sequence + 1]]

    def unused_rows(self, trace: Trace) -> npt.NDArray[np.bool_]:
        """Return which rows of the trace a profile may learn from (tokens,).

        Those of the sequences of which nothing is served: what follows in one that is cut off
        would know the future. If all are served, what is left of them.
        """
        unused = ~np.isin(trace.sequence, trace.sequence[self.rows])
        if not unused.any():
            unused[:] = True
            unused[self.rows] = False
        return unused


def cut(
    trace: Trace,
    batch: int = 1,
    prompt: int | None = None,
    generate: int | None = None,
    start: int = 0,
    repeat: bool = False,
) -> Workload:
    """Return `batch` sequences of a trace, beginning with its candidate number `start`.

    Neither prompt nor generate: the trace's own sequences and phases. With `generate` alone, its
    own sequences cut after that many tokens, those that hold fewer being left out. With `prompt`
    (and generate, by default 1: the prefill alone), windows of prompt + generate - 1 rows: the
    first window of every sequence in file order, then the second of those long enough, and so on;
    what is longer than every sequence is joined from whole consecutive ones, with a notice.

    No token serves two sequences, unless `repeat` lets the candidates start again.
    Raises TraceError if the trace does not hold that much, or does not say what its prompts are.
    """
    limits = (("batch", batch, 1), ("prompt", prompt, 1), ("generate", generate, 1))
    for name, value, least in (*limits, ("start", start, 0)):
        if value is not None and value < least:
            raise TraceError(f"{name} is {value}; it must be at least {least}")
    rows, starts = rows_by_sequence(trace)
    sequences = [rows[a:b] for a, b in pairwise(starts)]
    notices: list[str] = []
    if prompt is None:
        found = list(_own(trace, sequences, generate, notices))
        what = "sequences" if generate is None else f"sequences that generate {generate} tokens"
    else:
        length = prompt + (generate or 1) - 1
        found = [(window, prompt) for window in _windows(sequences, length, notices)]
        what = f"windows of {length} tokens (prompt {prompt}, generate {generate or 1})"
    held = len(found)
    if start + batch > held and not (repeat and held):
        raise TraceError(
            f"a batch of {batch} from start {start} is more than the trace holds: {held} {what}"
        )
    chosen = list(islice(cycle(found), start, start + batch))
    if start + batch > held:
        notices.append(f"the trace holds {held} {what}, some of which are served repeatedly")
    return Workload(
        rows=np.concatenate([window for window, _ in chosen]),
        starts=np.cumsum([0, *(len(window) for window, _ in chosen)], dtype=np.int64),
        prompts=np.array([length for _, length in chosen], np.int64),
        notices=tuple(notices),
    )


def _own(
    trace: Trace, sequences: list[IntArray], generate: int | None, notices: list[str]
) -> Iterator[tuple[IntArray, int]]:
    """Yield rows and prompt length of the trace's own sequences that are long enough."""
    if generate is not None and not (trace.phase == DECODE).any():
        raise TraceError("the trace has no decode rows and so no prompts of its own: give a prompt")
    short = 0
    for number, rows in enumerate(sequences):
        phase = trace.phase[rows]
        prompt = int((phase == PREFILL).sum())
        if prompt == 0 or (phase[:prompt] == DECODE).any():
            raise TraceError(
                f"sequence number {number} is no prompt followed by decode rows: give a prompt"
            )
        if generate is None:
            yield rows, prompt
        elif len(rows) - prompt + 1 >= generate:
            yield rows[: prompt + generate - 1], prompt
        else:
            short += 1
    if short:
        notices.append(f"{short} sequences generate fewer than {generate} tokens and are left out")


def _windows(sequences: list[IntArray], length: int, notices: list[str]) -> Iterator[IntArray]:
    longest = max(len(rows) for rows in sequences)
    if length <= longest:
        for first in range(0, longest - length + 1, length):
            for rows in sequences:
                if len(rows) >= first + length:
                    yield rows[first : first + length]
        return
    notices.append(
        f"a window of {length} tokens is longer than any sequence of the trace ({longest}): "
        "following sequences are joined in file order"
    )
    joined: list[IntArray] = []
    for rows in sequences:
        joined.append(rows)
        if sum(len(part) for part in joined) >= length:
            yield np.concatenate(joined)[:length]
            joined = []


class Steps(NamedTuple):
    """The forward passes of a workload: step 0 prefills all prompts, step s decodes token s.

    phase: (steps,). rows: trace rows (R,), step by step, batch by batch, sequence by sequence;
    batch b of step s is `rows[offset[s, b]:offset[s, b + 1]]`, offset being (steps, batches + 1).
    Per (steps, batches): context, the tokens attended to, summed over the new tokens (each sees
    itself and all before it); kept, the tokens already in the KV cache of the sequences taking
    part; sequences, how many take part. sequence: the served sequence of each row (R,).
    """

    phase: IntArray
    rows: IntArray
    offset: IntArray
    context: IntArray
    kept: IntArray
    sequences: IntArray
    sequence: IntArray


def steps_of(workload: Workload, batches: int = 1) -> Steps:
    """Return the forward passes that serve a workload in `batches` consecutive batches.

    Batches are equal; where that is impossible, the first ones hold one sequence more.
    Raises TraceError if there are fewer sequences than batches.
    """
    n = workload.sequences
    if not 1 <= batches <= n:
        raise TraceError(f"{batches} batches cannot be made of {n} sequences; legal are 1..{n}")
    lengths = np.diff(workload.starts)
    sequence = np.repeat(np.arange(n), lengths)
    row = np.arange(len(sequence)) - workload.starts[sequence]
    step = np.maximum(row - workload.prompts[sequence] + 1, 0)
    position = row + workload.earlier
    order = np.lexsort((position, sequence, step))
    sequence, position, step = sequence[order], position[order], step[order]

    steps = int(step.max()) + 1
    sizes = n // batches + (np.arange(batches) < n % batches)
    cell = step * batches + np.repeat(np.arange(batches), sizes)[sequence]

    def per_cell(values: IntArray) -> IntArray:
        summed = np.zeros(steps * batches, np.int64)
        np.add.at(summed, cell, values)
        return summed.reshape(steps, batches)

    tokens = per_cell(np.ones_like(cell))
    ends = np.cumsum(tokens).reshape(steps, batches)
    # A sequence's first new token of the step.
    opens = (step > 0) | (position == workload.earlier)
    return Steps(
        phase=np.where(np.arange(steps) == 0, PREFILL, DECODE).astype(np.int64),
        rows=workload.rows[order],
        offset=np.concatenate([ends[:, :1] - tokens[:, :1], ends], axis=1),
        context=per_cell(position + 1),
        kept=per_cell(np.where(opens, position, 0)),
        sequences=per_cell(opens.astype(np.int64)),
        sequence=sequence.astype(np.int64),
    )
