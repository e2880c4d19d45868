"""Work for all cores of this machine, in processes of joblib's."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from moesim.real.devices import usable_cores

Item = TypeVar("Item")
Value = TypeVar("Value")

WORTH = 4
"""Fewer items than so many per process are done in this one: starting another takes a second."""


def spread(
    function: Callable[[Item], Value], items: Sequence[Item], jobs: int | None = None,
    apart: bool = False,
) -> Iterator[tuple[int, Value]]:  # fmt: skip
    """Give what a function returns for each item, with the item's index, as soon as it is there.

    `jobs` processes do it, by default one for each core; 1 is this process. Function and items
    travel by pickle. With `apart` nothing is done in this process, however little there is to do.
    What the function raises ends everything, and so does the end of a process, by what
    `concurrent.futures` calls a BrokenProcessPool.
    """
    count = processes(len(items), jobs)
    if apart:
        count = max(2, count)  # joblib takes 1 to mean this process
    if count <= 1:
        for index, item in enumerate(items):
            yield index, function(item)
        return
    from joblib import Parallel, delayed

    pool = Parallel(count, return_as="generator_unordered", batch_size=1)
    yield from pool(delayed(numbered)(function, index, item) for index, item in enumerate(items))


def processes(items: int, jobs: int | None = None) -> int:
    """Return how many processes so many items are worth, of `jobs` or else one for each core."""
    return min(usable_cores() if jobs is None else jobs, -(-items // WORTH))


def numbered(function: Callable[[Item], Value], index: int, item: Item) -> tuple[int, Value]:
    """Return an item's index and what a function returns for it."""
    return index, function(item)
