"""The log of a run: what every machine writes down, and all that an audit may look at."""

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from moesim.types import IntArray

OPERATION = np.dtype(
    [
        ("ticket", np.int64),  # 1, 2, 3 ... in order of submission
        ("amount", np.int64),  # tokens (HEAD: sequences) or bytes, by kind
        (
            "context",
            np.int64,
        ),  # ATTENTION: tokens attended to; expert and COPY_IN: first part, of 1024
        ("duration_ns", np.int64),  # alone on the machine, jitter included
        ("submit_ns", np.int64),
        ("promote_ns", np.int64),  # when it went from the background to the urgent queue; else -1
        ("cancel_ns", np.int64),  # when it was taken back; it then never starts; else -1
        ("after", np.int64, (3,)),  # tickets it waits for; 0: nothing
        ("step", np.int32),
        (
            "slot",
            np.int32,
        ),  # GPU slot that a COPY_IN or MOVE fills, an EXPERT_GPU reads, a RESIZE changes; else -1
        ("layer", np.int16),
        ("expert", np.int16),
        ("batch", np.int16),  # of the group; -1: all batches at once
        ("part", np.int16),  # of 1024: how much of the expert
        ("queue", np.uint8),  # as submitted
        ("kind", np.uint8),
        ("precision", np.uint8),
        ("cause", np.uint8),
    ]
)
"""One submitted operation. For EXPERT_CPU, context 1 means that its result is deferred to the next
layer. For RETURN, context 1 means that it carries deferred results. For MOVE, `after` names what it
waits for and `context` is 0."""

SEGMENT = np.dtype(
    [
        ("ticket", np.int64),
        ("start_ns", np.int64),
        ("end_ns", np.int64),
        ("done", np.uint8),  # 0: preempted here, goes on in a later segment
    ]
)
"""One stretch in which a lane worked on an operation; a preempted copy has several. Host pauses are
not operations: they have ticket 0."""


class Contents(NamedTuple):
    """Weights that a slot holds before the first step."""

    layer: int
    expert: int
    slot: int
    part: int
    precision: int


class Log(NamedTuple):
    """What was submitted, when lanes worked on it, and the rules that the run had to obey."""

    operations: npt.NDArray[Any]
    """`OPERATION` rows in ticket order."""
    segments: npt.NDArray[Any]
    """`SEGMENT` rows in order of their end."""
    initial: tuple[Contents, ...]
    slot_bytes: IntArray
    """(slots,): size of every GPU slot."""
    budget_bytes: int
    loads: IntArray
    """(steps, layers, batches, experts): tokens routed, counted from the trace itself."""
    batch_tokens: IntArray
    """(steps, batches): new tokens."""
    expert_bytes: IntArray
    """(layers, precisions): bytes of a whole expert."""
    kv_on_host: bool
    """Keys and values are copied in before each attention and out after it."""
    dense_on_host: bool
    """Weights outside the experts are copied in before each layer's first attention."""
    on_disk: IntArray
    """(layers, experts): 1 where an expert must be read from disk in each step that uses it."""
    fifo_link: bool
    """All copies to the GPU are in one queue, never preempted."""
    chunk_bytes: int
    rates: IntArray
    """(32, lanes): progress in 1/1024 of each lane while the lanes of a bit set are busy."""
    exact: bool
    """A simulated machine: operations start at the first possible instant. False for a real one."""
    attention_on_cpu: bool = False
    """After step 0, which computes the prompts, the CPU attends to the keys and values."""
    sync_batches: bool = False
    """The host waits for everything after the attention of each batch and after each layer."""
