"""Run a calibration: tasks one after the other, each kept as soon as it is done.

A series is stored under a digest of everything that decides it, so that a calibration that was
interrupted, or is repeated, measures only what is missing.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import platformdirs

from moesim.calibrate.facts import Facts, load_average, machine_facts, versions
from moesim.calibrate.power import reading, watts
from moesim.calibrate.series import Bench, Series, Task
from moesim.errors import MoesimError

MAX_STORED_BYTES = 10_000_000
JUDGES = (
    "assembly.py",
    "calibration.py",
    "fit.py",
    "plausible.py",
    "plots.py",
    "sections.py",
    "tables.py",
)
"""Files of `calibrate` that do not measure."""
LANES = (
    "caches.py",
    "cuda.py",
    "devices.py",
    "emulated.py",
    "exchange.py",
    "lanes.py",
    "operations.py",
    "routing.py",
    "sequences.py",
    "stream.py",
    "torch_machine.py",
    "weights.py",
)
"""Files of `real` on which something is measured."""
WALKED = ("host.py", "residency.py", "forecast.py", "state.py", "costs.py")
"""Files of the host program."""

Progress = Callable[[int, int, float, str], None]
"""Called with tasks done, all tasks, about how many seconds are left, and the task that begins;
its name is empty at the end."""


class Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A series as it is stored."""

    series: Series
    date: str
    seconds: float
    load: float
    """Of the machine just before; see `facts.Facts`."""
    versions: dict[str, str]
    busy: bool = False
    """Whether others were at work before that calibration began."""
    watts: dict[str, float] = {}
    """Mean power of the whole task by source, as far as the machine tells it; see `power`."""


class Stored(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A file: a series, and a digest of its bytes, which tells whether they are as written."""

    sha256: str
    kept: msgspec.Raw


class Outcome(NamedTuple):
    """What became of a task: either `kept` is there or `error` says why not."""

    task: str
    kept: Kept | None
    error: str
    reused: bool
    """Whether it was measured by an earlier calibration."""


class Calibration(NamedTuple):
    """Everything that was measured, and where."""

    outcomes: tuple[Outcome, ...]
    device: dict[str, Any]
    """See `description`."""
    before: Facts
    after: Facts
    quick: bool

    @property
    def series(self) -> tuple[Series, ...]:
        """What was measured, in the order of the tasks."""
        return tuple(outcome.kept.series for outcome in self.outcomes if outcome.kept is not None)


def state_folder() -> Path:
    """Return where series are kept: below MOESIM_CACHE_DIR, or the user's cache folder."""
    chosen = os.environ.get("MOESIM_CACHE_DIR")
    return (Path(chosen) if chosen else platformdirs.user_cache_path("moesim")) / "calibration"


def run_tasks(
    tasks: Sequence[Task],
    bench: Bench,
    *,
    fresh: bool = False,
    folder: Path | None = None,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Calibration:
    """Measure what the tasks say, but for what is kept already (all of it if `fresh`).

    A task that fails is recorded with its error, and tried again next time; the others go on. What
    interrupts it (KeyboardInterrupt) passes through: everything that was done until then is kept.
    """
    folder = state_folder() if folder is None else folder
    before = machine_facts()
    outcomes: list[Outcome] = []
    files = [folder / f"{digest(task, bench, before)}.json" for task in tasks]
    found = [None if fresh else load(file, task) for file, task in zip(files, tasks, strict=True)]
    expected = sum(task.seconds for task, kept in zip(tasks, found, strict=True) if kept is None)
    spent = planned = 0.0
    for index, (task, file, kept) in enumerate(zip(tasks, files, found, strict=True)):
        if progress is not None:
            # The first tasks alone would say little about the others.
            trust = expected / 10
            pace = (spent + trust) / (planned + trust) if expected else 1.0
            progress(index, len(tasks), (expected - planned) * pace, task.name)
        if kept is not None:
            outcomes.append(Outcome(task.name, kept, "", True))
            continue
        start, load_now, counted = clock(), load_average(), reading(bench.device)
        try:
            series = task.run(bench)
            if series.name != task.name:
                raise MoesimError(f"task {task.name} measured {series.name}")
            made = Kept(
                series=series,
                date=datetime.now(UTC).date().isoformat(),
                seconds=clock() - start,
                load=load_now,
                busy=before.busy,
                versions=versions(),
                watts=watts(counted, reading(bench.device)),
            )
            store(made, file)
            outcomes.append(Outcome(task.name, made, "", False))
        except Exception as error:
            outcomes.append(Outcome(task.name, None, explained(error), False))
        finally:
            bench.device.free_all()
        spent, planned = spent + clock() - start, planned + task.seconds
    if progress is not None:
        progress(len(tasks), len(tasks), 0.0, "")
    return Calibration(tuple(outcomes), description(bench), before, machine_facts(), bench.quick)


def count_kept(tasks: Sequence[Task], bench: Bench, folder: Path | None = None) -> int:
    """Count the tasks that need not be measured any more."""
    folder = state_folder() if folder is None else folder
    facts = machine_facts()
    return sum(
        load(folder / f"{digest(task, bench, facts)}.json", task) is not None for task in tasks
    )


def explained(error: Exception) -> str:
    """Return an error in one line, with its kind if it is not one of ours."""
    text = " ".join(str(error).split())
    return text if isinstance(error, MoesimError) else f"{type(error).__name__}: {text}"


def description(bench: Bench) -> dict[str, Any]:
    """Return what a device is, as far as results depend on it."""
    device = bench.device
    found: dict[str, Any] = {
        "label": device.label,
        "name": device.name,
        "memory_bytes": device.memory_bytes,
        "threads": {name: lane.threads for name, lane in device.lanes.items()},
    }
    link = getattr(device, "link", None)
    if link is not None:
        found["link"] = {"latency_ns": link.latency_ns, "bytes_per_s": link.bytes_per_s}
    return found


def digest(task: Task, bench: Bench, facts: Facts) -> str:
    """Return 24 hex digits that change with whatever decides what a task measures."""
    what = {
        "task": task.name,
        "device": description(bench),
        "host": [facts.cpu, facts.threads, facts.memory_bytes],
        "limits": list(bench.limits),
        "quick": bench.quick,
        "versions": versions(),
        "code": code_digest(),
    }
    if task.name.startswith("host/"):
        what["walked"] = walked_digest()
    text = json.dumps(what, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


@cache
def code_digest() -> str:
    """Return a digest of the files that measure: a version's number does not change with them."""
    import moesim.calibrate
    import moesim.real

    found = hashlib.sha256()
    own, real = (Path(next(iter(p.__path__))) for p in (moesim.calibrate, moesim.real))
    measuring = [path for path in sorted(own.glob("*.py")) if path.name not in JUDGES]
    for path in (*measuring, *(real / name for name in LANES)):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


@cache
def walked_digest() -> str:
    """Return a digest of the host program and the policies, whose own times are measured, too."""
    import moesim
    import moesim.policies

    found = hashlib.sha256()
    own, policies = (Path(next(iter(p.__path__))) for p in (moesim, moesim.policies))
    for path in (*(own / name for name in WALKED), *sorted(policies.rglob("*.py"))):
        found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()


def store(kept: Kept, file: Path) -> None:
    """Write a series; it appears whole or not at all."""
    text = msgspec.json.encode(kept)
    stored = Stored(sha256=hashlib.sha256(text).hexdigest(), kept=msgspec.Raw(text))
    write_text(file, msgspec.json.encode(stored).decode())


def write_text(file: Path, text: str) -> None:
    """Write a file under a temporary name and rename it; make its folder if there is none."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    finally:
        with suppress(OSError):
            unfinished.unlink()


def load(file: Path, task: Task) -> Kept | None:
    """Return what was kept of a task, or None if there is nothing that can be used."""
    try:
        if file.stat().st_size > MAX_STORED_BYTES:
            return None
        stored = msgspec.json.decode(file.read_bytes(), type=Stored)
        if hashlib.sha256(stored.kept).hexdigest() != stored.sha256:
            return None
        kept = msgspec.json.decode(stored.kept, type=Kept)
    except (OSError, msgspec.DecodeError):
        return None
    return kept if kept.series.name == task.name else None
