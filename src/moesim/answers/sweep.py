"""Run all points of a grid, on all cores or a cluster, and go on where it was left.

A point that is finished is never run again; see `store`. What cannot run is noted with the reason
and stops nothing else.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from moesim.answers.grid import Grid, grid_of, read_grid
from moesim.answers.parallel import processes
from moesim.answers.points import digest
from moesim.answers.runners import Say, Task, run_here, run_there, with_machines
from moesim.answers.store import Store, held, imported, write_table
from moesim.answers.swept import Swept
from moesim.errors import InputError

Progress = Callable[[int, int], None]


class Plan(NamedTuple):
    """What there is to do."""

    grid: Grid
    store: Store
    digests: list[str]
    """Of every point of the grid, in its order; "" for one that is the same as one before."""
    tasks: list[Task]
    """What is left; traces, models and machines that are the same come one after another."""
    done: int
    """Points that are finished, those that failed included."""
    failed: int
    seconds: float | None
    """What a finished point took, the mean; None if there is none."""

    @property
    def points(self) -> int:
        """Different points in all."""
        return self.done + len(self.tasks)

    def left_s(self, jobs: int | None = None) -> float | None:
        """Return about how long the rest takes; None if nothing is known."""
        if self.seconds is None:
            return None
        return self.seconds * len(self.tasks) / max(1, processes(len(self.tasks), jobs))


def sweep(
    grid: Path | str | Mapping[str, Any], output: Path | str | None = None,
    jobs: int | None = None, scheduler: str | None = None, progress: Progress | None = None, *,
    retry_failed: bool = False, say: Say = lambda _: None,
) -> Swept:  # fmt: skip
    """Run all points of a grid, and return their results: `moesim sweep`.

    `grid` is a YAML file, or what it says: see `answers.grid`. `output` is the Parquet file, beside
    which finished points are kept in a folder; those that are there are not run again. `jobs`
    processes run, by default one for each core, or the workers of a Dask `scheduler` at its
    address: they load files by the same paths as this machine. `progress` is called with the
    points done and the points in all, `say` with a line about what takes time before that.

    What a point cannot do is in its row's `error`. Raises MoesimError, in one line, for a bad grid
    and an output that cannot be written.
    """
    if jobs is not None and scheduler is not None:
        raise InputError("jobs and scheduler exclude each other: the cluster has its own workers")
    imported("pyarrow.parquet")
    read = load_grid(grid)
    path = None if output is None else checked(Path(output))
    if path is None:
        folder = Path(tempfile.mkdtemp(prefix="moesim-"))
        try:
            swept = swept_in(
                Store(folder), None, read, jobs, scheduler, progress, retry_failed, say
            )
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        weakref.finalize(swept, shutil.rmtree, folder, ignore_errors=True)
        return swept
    store = Store(folder_of(path))
    return swept_in(store, path, read, jobs, scheduler, progress, retry_failed, say)


def swept_in(
    store: Store, table: Path | None, grid: Grid, jobs: int | None, scheduler: str | None,
    progress: Progress | None, retry_failed: bool, say: Say,
) -> Swept:  # fmt: skip
    """Run what a store lacks of a grid, write its table, and return everything; see `sweep`."""
    with held(store):
        begun = store.begun()
        store.forget_begun()
        plan = plan_of(grid, store, retry_failed)
        for task in plan.tasks:
            store.path(task.digest).unlink(missing_ok=True)
        running: Iterable[str] = ()
        if plan.tasks:
            tasks = with_machines(plan.tasks, jobs, say)
            running = (
                # What was begun may have killed its process, and would kill this one, too.
                run_here(tasks, store, jobs, any(task.digest in begun for task in tasks))
                if scheduler is None
                else run_there(tasks, store, scheduler)
            )
        for count, _ in enumerate(running, 1):
            if progress is not None:
                progress(plan.done + count, plan.points)
        swept = Swept(grid, store, plan.digests, plan.done)
        if table is not None:
            write_table(table, swept.kinds, swept.rows())
        return swept


def load_grid(grid: Path | str | Mapping[str, Any]) -> Grid:
    """Return a grid by its path, or by what its file says."""
    return grid_of(grid) if isinstance(grid, Mapping) else read_grid(Path(grid))


def checked(output: Path) -> Path:
    """Return where a table is written; raise InputError if it cannot be."""
    if output.suffix != ".parquet":
        raise InputError(f"{output}: the output is a Parquet file, as results.parquet")
    if not output.absolute().parent.is_dir():
        raise InputError(f"{output}: there is no folder {output.absolute().parent}")
    if output.exists() and not output.is_file():
        raise InputError(f"{output}: is no regular file")
    return output


def folder_of(output: Path) -> Path:
    """Return the folder of a table's finished points."""
    return output.absolute().with_name(output.name + ".points")


def plan_of(grid: Grid, store: Store, retry_failed: bool = False) -> Plan:
    """Return what is done and what is left; raise MoesimError for a file that is not there."""
    finished = store.finished()
    digests: list[str] = []
    seen: set[str] = set()
    tasks: list[Task] = []
    done = failed = 0
    seconds = 0.0
    for values in grid.swept():
        point = grid.point(values)
        name = digest(point)
        if name in seen:
            digests.append("")
            continue
        digests.append(name)
        seen.add(name)
        found = store.read(name) if name in finished else None
        if found is None or (found.error and retry_failed):
            tasks.append(Task(name, point))
            continue
        done += 1
        failed += bool(found.error)
        seconds += found.seconds
    tasks.sort(key=nearness)
    return Plan(grid, store, digests, tasks, done, failed, seconds / done if done else None)


def nearness(task: Task) -> tuple[str, ...]:
    """Return what tasks are sorted by, so that a process loads things once."""
    point = task.point
    made = sorted(point.synth.items())
    return point.trace or "", f"{made}", point.model or "", point.hardware or ""
