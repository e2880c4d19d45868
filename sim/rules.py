"""What both simulated machines agree on: speeds, chunk borders, jitter, what time is spent on."""

from typing import NamedTuple

from moesim.types import (
    COPY_IN,
    DENSE_IN,
    DISK_READ,
    H2D_BACKGROUND,
    KINDS,
    KV_IN,
    KV_OUT,
    QUEUES,
    RESIZE,
    IntArray,
)

FULL_SPEED = 1024
"""Work is counted in ns x 1024, so that it may be done at `rate`/1024 of full speed."""

FINEST = 1 << 62
"""Work times chunks stays below this, so that 64 bits hold it: borders closer than that merge."""

WAITS = ("weights", "cpu", "host", "kv", "dense", "disk")
"""What the GPU may have to wait for."""
WAIT_WEIGHTS, WAIT_CPU, WAIT_HOST, WAIT_KV, WAIT_DENSE, WAIT_DISK = range(
    RESIZE + 1, RESIZE + 1 + len(WAITS)
)
TIMES = RESIZE + 1 + len(WAITS)
"""Time is split into the kinds of the GPU lane, 0..RESIZE, and these waits."""


class Totals(NamedTuple):
    """What a machine has added up at the end of a HEAD, or after draining."""

    now_ns: int
    time_ns: tuple[int, ...]
    """(TIMES,): what the GPU lane did or waited for; sums to `now_ns`."""
    busy_ns: tuple[int, ...]
    """(lanes,): work under way included up to now."""
    copied_bytes: IntArray
    """(kinds, causes): of operations that are done."""
    source_ns: tuple[int, ...]
    """(sources,): duration of operations that are done, by what their numbers rest on."""


def wait_of(kind: int) -> int:
    """Say what the GPU waits for when it waits for an operation of another lane."""
    if kind == COPY_IN:
        return WAIT_WEIGHTS
    if kind in (KV_IN, KV_OUT):
        return WAIT_KV
    if kind == DENSE_IN:
        return WAIT_DENSE
    return WAIT_DISK if kind == DISK_READ else WAIT_CPU


def jittered_ns(ns: int, jitter: int, seed: int, ticket: int) -> int:
    """Return a duration stretched at random by up to `jitter`/1024 of it, in whole ns.

    The draw is a 31-bit hash of seed and ticket alone. Its products stay below 2**63, so that
    Python and compiled code draw the same.
    """
    if jitter == 0:
        return ns
    x = ((seed & 0x7FFFFFFF) * 2654435 + ticket * 40503 + 12345) & 0x7FFFFFFF
    x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0x7FFFFFFF
    x = ((x ^ (x >> 16)) * 0x119DE1F3) & 0x7FFFFFFF
    x ^= x >> 15
    return ns + ns * (x % (jitter + 1)) // FULL_SPEED


def chunk_count(queue: int, amount: int, chunk_bytes: int, work: int) -> int:
    """Return into how many equal stretches a copy may be cut: background copies only."""
    if queue != H2D_BACKGROUND or chunk_bytes <= 0:
        return 1
    chunks = (amount + chunk_bytes - 1) // chunk_bytes
    return max(1, min(chunks, FINEST // max(1, work)))


def border_left(work: int, left: int, chunks: int, just_started: bool) -> int:
    """Return the work left at a copy's next chunk border; 0 if it ends before one.

    A copy of n chunks may be cut at equal n-ths of its work. A chunk that was just started, at the
    border before it, is carried out.
    """
    if work == 0:
        return 0
    reached = (work - left) * chunks
    border = reached // work + 1 if just_started else (reached + work - 1) // work
    return work - (border * work + chunks - 1) // chunks


def stuck(
    ticket: int, kind: int, layer: int, expert: int, queue: int, waits: list[int],
    head: tuple[int, int],
) -> str:  # fmt: skip
    """Say what a wait without end waits for; `head` is ticket and kind of its queue's first."""
    behind = f", behind ticket {head[0]} ({KINDS[head[1]]})" if head[0] != ticket else ""
    return (
        f"ticket {ticket} ({KINDS[kind]}, layer {layer}, expert {expert}) on queue "
        f"{QUEUES[queue]} can never end: it waits for tickets {waits}{behind}"
    )
