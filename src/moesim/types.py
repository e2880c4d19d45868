"""Codes, array types, and the trick that lets the same source run fast as Python and compiled.

Every code is a small `int`, so that hooks, host and machines may be compiled. Time is `int` ns,
size `int` bytes, a part of an expert is counted in 1/1024 of its bytes.
"""

from typing import TypeVar, cast

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

WHOLE = 1024
"""All of an expert; MoEpic's top segment of 40 % is part 410."""

NONE = -1
"""No slot, no expert, no layer. A ticket that names nothing is 0, which is always done."""

PREFILL, DECODE = 0, 1
PHASES = ("prefill", "decode")

GPU, CPU, H2D, D2H, DISK = 0, 1, 2, 3, 4
LANES = ("gpu", "cpu", "h2d", "d2h", "disk")

H2D_BACKGROUND = 5
"""The second queue of lane h2d. Queues 0..4 are the lanes' own, `h2d` being the urgent one."""
QUEUES = (*LANES, "h2d_background")
LANE_OF_QUEUE = (GPU, CPU, H2D, D2H, DISK, H2D)

(
    ATTENTION,
    GATE,
    PREDICT,
    SHARED,
    EXPERT_GPU,
    COMBINE,
    HEAD,
    MOVE,
    RESIZE,
    EXPERT_CPU,
    COPY_IN,
    RETURN,
    KV_IN,
    DENSE_IN,
    SEND,
    KV_OUT,
    DISK_READ,
    PAUSE,
    ATTENTION_CPU,
) = range(19)
KINDS = (
    "attention",
    "gate",
    "predict",
    "shared",
    "expert_gpu",
    "combine",
    "head",
    "move",
    "resize",
    "expert_cpu",
    "copy_in",
    "return",
    "kv_in",
    "dense_in",
    "send",
    "kv_out",
    "disk_read",
    "pause",
    "attention_cpu",
)
"""`move` shifts an admitted expert inside GPU memory, `resize` gives a slot another size; `pause`
is the host being busy itself; `attention_cpu` attends to what is in the cache, between the
projections on the GPU."""

NO_CAUSE, DEMAND, PREFETCH, SWAP = 0, 1, 2, 3
CAUSES = ("", "demand", "prefetch", "swap")
"""Why a COPY_IN was asked for: a run needed it, a guess, or a change of what is cached."""

MEASURED, INTERPOLATED, EXTRAPOLATED, DATASHEET = 0, 1, 2, 3
SOURCES = ("measured", "interpolated", "extrapolated", "datasheet")

BITS = (16, 8, 4, 2)
"""Bits per weight of precision codes 0..3."""

RESIDENT, ARRIVED, LATE, FETCHED, ON_CPU = 0, 1, 2, 3, 4
OUTCOMES = ("resident", "arrived", "late", "fetched", "cpu")
"""How an activation met its weights, judged when the router's choice is known to the host:
cached on the GPU | prefetched and there | prefetched and still on its way | copied on demand, in
whole or in part | computed on the CPU."""

Arrays = TypeVar("Arrays")


def as_scalars(arrays: Arrays) -> Arrays:
    """Return the same NamedTuple with memoryviews in place of its arrays, over the same memory.

    Plain Python reads an element of a memoryview in half the time and gets an `int`, whose
    arithmetic is three times as fast as that of an `np.int64`. Code that only reads and writes
    single elements cannot tell the difference; compiled code is given the arrays themselves.
    NamedTuples inside are converted too.
    """
    if isinstance(arrays, np.ndarray):
        return cast("Arrays", memoryview(cast("bytes", np.ascontiguousarray(arrays))))
    if isinstance(arrays, tuple) and hasattr(arrays, "_fields"):
        return cast("Arrays", type(arrays)(*(as_scalars(field) for field in arrays)))
    return arrays
