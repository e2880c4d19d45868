"""Work for all cores of this machine, in processes of joblib's."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from threading import Thread
from typing import TypeVar

from moesim.real.devices import usable_cores

Item = TypeVar("Item")
Value = TypeVar("Value")

WORTH = 4
"""Fewer items than so many per process are done in this one: starting another takes a second."""
WATCH_S = 0.5
"""How often a process looks whether its parent is still there."""


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
    work, parent = delayed(numbered), os.getpid()
    yield from pool(work(function, index, item, parent) for index, item in enumerate(items))


def processes(items: int, jobs: int | None = None) -> int:
    """Return how many processes so many items are worth, of `jobs` or else one for each core."""
    return min(usable_cores() if jobs is None else jobs, -(-items // WORTH))


def numbered(
    function: Callable[[Item], Value], index: int, item: Item, parent: int
) -> tuple[int, Value]:
    """Return an item's index and what a function returns for it, in a process of `parent`'s."""
    end_with(parent)
    return index, function(item)


@cache
def end_with(parent: int) -> None:
    """End this process soon after its parent.

    Processes of joblib's know nothing of a parent that was killed: they finish what they were
    given, and wait five minutes for more.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_S)
        os._exit(1)

    Thread(target=watch, daemon=True).start()
