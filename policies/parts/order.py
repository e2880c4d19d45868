"""Sorting experts, which hooks may do without allocating memory."""

import numpy as np

from moesim.jit import compiled_as
from moesim.types import IntArray


def sort_compiled(items: IntArray, n: int, keys: IntArray, sign: int) -> None:
    """Do what `sort_by` does by insertion: experts are few, and often in order already."""
    for i in range(1, n):
        item = items[i]
        key = sign * keys[item]
        at = i
        while at > 0:
            before = items[at - 1]
            other = sign * keys[before]
            if other < key or (other == key and before < item):
                break
            items[at] = before
            at -= 1
        items[at] = item


@compiled_as(sort_compiled)
def sort_by(items: IntArray, n: int, keys: IntArray, sign: int) -> None:
    """Sort the first `n` items by `sign * keys[item]`, the smallest first, equal ones by id."""
    chosen = items[:n]
    items[:n] = chosen[np.lexsort((chosen, sign * keys[chosen]))]
