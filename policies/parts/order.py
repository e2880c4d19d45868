"""Sorting experts, which hooks may do without allocating memory."""

import numpy as np

from moesim.jit import compiled_as
from moesim.types import IntArray

IDS = 1 << 15
"""Ids are below this, as in traces; 48 bits are left for keys."""


def sort_compiled(items: IntArray, n: int, count: int, keys: IntArray, sign: int) -> None:
    """Do what `sort_by` does: key and id as one number, inserted among the smallest so far."""
    for i in range(n):
        items[i] += sign * keys[items[i]] * IDS
    for i in range(1, n):
        item = items[i]
        at = i
        if i >= count:
            at = count - 1
            if items[at] < item:
                continue
            items[i] = items[at]
        while at > 0 and items[at - 1] > item:
            items[at] = items[at - 1]
            at -= 1
        items[at] = item
    for i in range(n):
        items[i] %= IDS


@compiled_as(sort_compiled)
def sort_by(items: IntArray, n: int, count: int, keys: IntArray, sign: int) -> None:
    """Sort the first `n` items by `sign * keys[item]`, the smallest first, equal ones by id.

    Only the first `count` places (1 or more) need be right; the others may be in any order. Raises
    TypeError for keys that are no integers.
    """
    if keys.dtype != np.int64:
        raise TypeError(f"sort_by: keys of {keys.dtype}; they must be int64")
    chosen = items[:n]
    items[:n] = chosen[np.lexsort((chosen, sign * keys[chosen]))]
