"""Evaluate points in processes of this machine or on a cluster, whatever happens to those.

What is finished is in the store before anybody is told.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import msgspec

from moesim import __version__
from moesim.answers.parallel import processes, spread
from moesim.answers.points import Point, digest, flat, inputs_of, run_point
from moesim.answers.store import Finished, Store
from moesim.errors import InputError, MoesimError
from moesim.jit.store import record_of
from moesim.policies.registry import choose
from moesim.run import Prepared
from moesim.sim.engine import choose_machine, engine_module, machine_for
from moesim.sim.metrics import explain, summarize

Say = Callable[[str], None]

MOST_DEATHS = 20
"""So often processes may be killed before the sweep gives up."""
ALONE = 2
"""So often a point is tried by itself after a process was killed over it."""
PREPARED = 3
"""Points of a policy that are tried to find out what it has to compile."""
WINDOW = 4
"""Points per thread that a cluster knows of: so many wait where the results come back."""
CLUSTER_S = 30
"""How long a cluster may take to answer, and to have a worker."""


class Task(NamedTuple):
    """A point that is to be evaluated."""

    digest: str
    point: Point


def with_machines(tasks: Sequence[Task], jobs: int | None, say: Say) -> list[Task]:
    """Return tasks with `auto` replaced by the machine that is sooner done with all of them.

    What it needs is compiled here, once, so that no two processes compile the same.
    """
    groups: dict[str, list[Task]] = defaultdict(list)
    for task in tasks:
        if task.point.machine == "auto":
            groups[task.point.policy].append(task)
    first = {policy: found for policy in groups if (found := prepared_one(groups[policy]))}
    share = max(1, processes(len(tasks), jobs))
    steps = {
        policy: len(run.host.steps.phase) * run.setting.layers * len(groups[policy]) // share
        for policy, run in first.items()
    }
    machines = {}
    for policy in sorted(steps, key=lambda policy: -steps[policy]):
        # Whoever comes first pays for the host program, which serves all.
        worth = steps[policy] if record_of(engine_module()) else sum(steps.values())
        choice = choose_machine("auto", first[policy], worth)
        machines[policy] = choice.machine
        if choice.compiles:
            say(f"compiling policy {policy} first, once")
            try:
                machine_for(first[policy], "compiled", lambda _: None)
            except InputError:
                machines[policy] = "simpy"
    return [
        task._replace(point=msgspec.structs.replace(task.point, machine=machines[policy]))
        if (policy := task.point.policy) in machines and task.point.machine == "auto"
        else task
        for task in tasks
    ]


def prepared_one(tasks: Sequence[Task]) -> Prepared | None:
    """Return one of the first points prepared; None if none of them can be."""
    for task in tasks[:PREPARED]:
        try:
            return inputs_of(task.point).prepare(choose(task.point.policy), task.point.seed)
        except Exception:  # whatever it is, the point itself will say it
            continue
    return None


def run_here(
    tasks: Sequence[Task], store: Store, jobs: int | None, apart: bool = False
) -> Iterator[str]:
    """Evaluate tasks in processes of this machine; give each one's digest when it is kept.

    With `apart` none of them is this one, in which few tasks are evaluated otherwise.

    Where a process is killed, what is left goes on in new ones. What it was at is then tried by
    itself, and kept as failed if that kills its process again. Raises InputError if processes are
    killed again and again.
    """
    left = list(tasks)
    for death in range(MOST_DEATHS):
        told = set()
        try:
            for at, _ in spread(partial(evaluate, store), left, jobs, apart=apart or death > 0):
                told.add(left[at].digest)
                yield left[at].digest
        except BrokenExecutor:
            suspects = store.begun()
            store.forget_begun()
            left = [task for task in left if task.digest not in told]
            for task in left:
                if task.digest in suspects and store.read(task.digest) is None:
                    evaluate_alone(store, task)
            finished = store.finished()
            yield from (task.digest for task in left if task.digest in finished)
            left = [task for task in left if task.digest not in finished]
        else:
            return
    raise InputError(
        f"processes were killed {MOST_DEATHS} times; {len(left)} points are left, and the same "
        "command goes on with them"
    )


def evaluate(store: Store, task: Task) -> None:
    """Evaluate a task and keep what became of it."""
    store.begin(task.digest)
    store.write(task.digest, finish(task))


def evaluate_alone(store: Store, task: Task) -> None:
    """Evaluate a task over which a process was killed; keep it as failed if another one is."""
    for _ in range(ALONE):
        try:
            for _ in spread(partial(evaluate, store), [task], apart=True):
                return
        except BrokenExecutor:
            store.forget_begun()
    error = f"its process was killed {1 + ALONE} times, also when it ran alone: too little memory?"
    store.write(task.digest, Finished(point=task.point, error=error, seconds=0.0))


def finish(task: Task) -> Finished:
    """Return what becomes of a point: its row, or why there is none.

    Raises InputError if what it names is not what it was when the sweep began, or other files lie
    where this runs: the result would be kept as that of something else.
    """
    began = time.perf_counter()
    point, row, error = task.point, None, ""
    if digest(point) != task.digest:
        raise InputError(
            "moesim's code or a file that the grid names has changed since the sweep began, or is "
            "another one where a worker runs; the same command goes on with what is there now"
        )
    try:
        result = summarize(run_point(point))
        row = {**flat(result), "why": explain(result)}
    except MoesimError as caught:
        error = f"{caught}"
    except MemoryError:
        error = "it needs more memory than there is"
    except (Exception, SystemExit) as caught:
        error = f"{type(caught).__name__}: {caught}"
    seconds = time.perf_counter() - began
    return Finished(point=point, row=row, error=" ".join(error.split()), seconds=seconds)


def run_there(tasks: Sequence[Task], store: Store, scheduler: str) -> Iterator[str]:
    """Evaluate tasks on the workers of a Dask scheduler; keep what comes back here.

    A worker that ends loses what it was at, which another one takes over; a point over which
    several did is kept as failed. Raises InputError for a cluster that does not answer.
    """
    try:
        from distributed import Client, as_completed
    except ImportError:
        raise InputError("a scheduler needs Dask: pip install 'moesim[cluster]'") from None
    try:
        client = Client(scheduler, timeout=CLUSTER_S, set_as_default=False)
    except (OSError, TimeoutError, ValueError) as error:
        raise InputError(f"no Dask scheduler answers at {scheduler}: {error}") from None
    with client:
        check_workers(client, scheduler)
        waiting = iter(tasks)
        under_way: dict[str, Task] = {}

        def submitted(task: Task, attempt: str = "") -> Any:
            key = f"moesim-{task.digest}{attempt}"
            under_way[key] = task
            return client.submit(finish, task, key=key, pure=False)

        # A scheduler that knows of all tasks would be slow.
        window = WINDOW * max(1, sum(client.nthreads().values()))
        first = [submitted(task) for task in islice(waiting, window)]
        running = as_completed(first, loop=client.loop)
        suspects = []
        for future in running:
            task = under_way.pop(future.key)
            found = result_of(future, scheduler)
            if found is None:
                suspects.append(task)
            else:
                store.write(task.digest, found)
                yield task.digest
            running.update([submitted(task) for task in islice(waiting, 1)])
        # One at a time, since all that wait at a worker are blamed for its end.
        for task in suspects:
            found = result_of(submitted(task, "-alone"), scheduler)
            said = "it ended several workers, also when it ran alone: too little memory?"
            missing = Finished(point=task.point, error=said, seconds=0.0)
            store.write(task.digest, found or missing)
            yield task.digest


def result_of(future: Any, scheduler: str) -> Finished | None:
    """Return what became of a task on a cluster; None if it ended workers.

    Raises InputError if the scheduler is gone.
    """
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError

    try:
        found: Finished = future.result()
    except KilledWorker:
        return None
    except FutureCancelledError:
        raise InputError(
            f"the scheduler at {scheduler} was lost; the same command goes on with what is left"
        ) from None
    return found


def check_workers(client: Any, scheduler: str) -> None:
    """Raise InputError unless a cluster has workers with this version of moesim."""
    try:
        client.wait_for_workers(1, timeout=CLUSTER_S)
        versions = set(client.run(version_here).values())
    except TimeoutError:
        raise InputError(f"the scheduler at {scheduler} has no workers") from None
    except Exception as error:  # of whatever kind a worker meets that has no moesim
        raise InputError(f"the workers of {scheduler} cannot run moesim: {error}") from None
    if versions != {__version__}:
        raise InputError(
            f"the workers of {scheduler} have moesim {', '.join(sorted(versions))}; this is "
            f"{__version__}"
        )


def version_here() -> str:
    """Return the version of moesim where this runs."""
    return __version__
