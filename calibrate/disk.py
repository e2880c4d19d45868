"""Sequential reads of a file past the page cache.

The file is made for the purpose, has no name any more once it is open, and so disappears with the
process however that ends. A virtual machine's host may have a cache of its own, which nothing here
can pass by; the facts say so.
"""

import itertools
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from moesim.calibrate.memory import is_virtual
from moesim.calibrate.series import Bench, Series, Task, point
from moesim.calibrate.sweeps import PASSES, merged, sweep_seconds
from moesim.calibrate.timing import Timed, measure
from moesim.errors import CalibrationError
from moesim.real.lanes import Lane, Work

FILE_BYTES = 1 << 30
QUICK_FILE_BYTES = 128 << 20
SIZES = (64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20)
HELD_OUT = (512 << 10, 8 << 20)
HUGE_PAGE_BYTES = 2 << 20
SPARE = 2
"""Free space must be so many times what is written: filling a disk would harm others."""
IN_MEMORY = ("tmpfs", "ramfs")


class Opened(NamedTuple):
    """A file to read."""

    handle: int
    size_bytes: int
    way: str
    """`O_DIRECT`, or `posix_fadvise` where the file system has no such thing."""


def file_system(folder: Path, table: str | None = None) -> str:
    """Return the kind of file system that a folder is on, empty where it is not told.

    `table` has the form of /proc/mounts.
    """
    if table is None:
        try:
            table = Path("/proc/mounts").read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""
    found = Path(), ""
    for line in table.splitlines():
        fields = line.split()
        if len(fields) < 3:
            continue
        mount = Path(fields[1].replace("\\040", " "))
        if folder.resolve().is_relative_to(mount) and len(mount.parts) >= len(found[0].parts):
            found = mount, fields[2]
    return found[1]


def usual_folder(candidates: Sequence[str] = ("/var/tmp",)) -> Path:
    """Return where large temporary files go: /tmp is in memory on many systems."""
    for name in candidates:
        folder = Path(name)
        if os.access(folder, os.W_OK) and file_system(folder) not in IN_MEMORY:
            return folder
    return Path(tempfile.gettempdir())


def check_folder(folder: Path, size_bytes: int) -> None:
    """Raise CalibrationError where a file of this size cannot be made or is not on a disk."""
    if not folder.is_dir():
        raise CalibrationError(f"disk: {folder} is no folder")
    kind = file_system(folder)
    if kind in IN_MEMORY:
        raise CalibrationError(f"disk: {folder} is in memory ({kind}); a folder on a disk is legal")
    if not hasattr(os, "posix_fadvise"):
        raise CalibrationError("disk: this system has no way past its page cache; Linux has")
    free = shutil.disk_usage(folder).free
    if free < SPARE * size_bytes:
        raise CalibrationError(
            f"disk: {folder} has {free} bytes free; {SPARE * size_bytes} are needed to read a file "
            f"of {size_bytes}"
        )


@contextmanager
def temporary_file(folder: Path, size_bytes: int) -> Iterator[Opened]:
    """Give a file of random bytes that is on the disk and in no cache of this system.

    Raises CalibrationError if it cannot be written.
    """
    check_folder(folder, size_bytes)
    handles: list[int] = []
    try:
        handle, name = tempfile.mkstemp(prefix="moesim-disk-", dir=folder)
        handles.append(handle)
        way = "O_DIRECT"
        try:
            with suppress(OSError):
                handles.append(os.open(name, os.O_RDONLY | os.O_DIRECT))
        finally:
            os.unlink(name)
        if len(handles) == 1:
            way = "posix_fadvise"
        fill(handle, size_bytes)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        yield Opened(handles[-1], size_bytes, way)
    except OSError as error:
        raise CalibrationError(f"disk: a file in {folder}: {error.strerror}") from None
    finally:
        for handle in handles:
            os.close(handle)


def fill(handle: int, size_bytes: int) -> None:
    """Write random bytes, which no disk compresses."""
    rng = np.random.default_rng(0)
    left = size_bytes
    while left > 0:
        block = memoryview(rng.bytes(min(left, 4 << 20)))
        while block:
            done = os.write(handle, block)
            block, left = block[done:], left - done


def stretches(file: Opened, size_bytes: int) -> Iterator[tuple[Work, Work]]:
    """Give what drops a file's next stretch from the page cache, and what reads it, for ever.

    At the end it begins anew; all are read into the same memory. O_DIRECT leaves nothing to drop.
    """
    buffer = room(size_bytes)

    def drop(start: int) -> None:
        os.posix_fadvise(file.handle, start, size_bytes, os.POSIX_FADV_DONTNEED)

    def read(start: int) -> None:
        got = os.preadv(file.handle, [buffer], start)
        if got != size_bytes:
            raise CalibrationError(f"disk: {got} bytes were read instead of {size_bytes}")

    for start in itertools.cycle(range(0, file.size_bytes - size_bytes + 1, size_bytes)):
        yield partial(drop, start), partial(read, start)


def room(size_bytes: int) -> memoryview:
    """Return memory to read into, in huge pages where the system has them.

    How a system scatters small ones decides how many pieces a read is cut into: the same read then
    takes up to three times as long in one buffer as in another.
    """
    whole = (-(-size_bytes // HUGE_PAGE_BYTES) + 1) * HUGE_PAGE_BYTES
    memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            memory.madvise(mmap.MADV_HUGEPAGE)
    start = -np.frombuffer(memory, np.uint8).ctypes.data % HUGE_PAGE_BYTES
    buffer = memoryview(memory)[start : start + size_bytes]
    buffer[:] = bytes(size_bytes)
    return buffer


def reader(file: Opened, size_bytes: int, lane: Lane) -> Callable[[], int]:
    """Return an operation that reads the file's next stretch on a lane, and how long it took."""
    following = stretches(file, size_bytes)

    def once() -> int:
        drop, read = next(following)
        drop()
        return lane.submit(read).wait().ns

    return once


def read_job(file: Opened, size_bytes: int) -> Callable[[], Work]:
    """Return what gives the next read, to be queued behind others: it drops its stretch itself."""
    following = stretches(file, size_bytes)

    def job() -> Work:
        drop, read = next(following)
        return lambda: (drop(), read())

    return job


def file_bytes(bench: Bench) -> int:
    """Return how large a file to read from is."""
    return QUICK_FILE_BYTES if bench.quick else FILE_BYTES


def write_seconds(bench: Bench) -> float:
    """Return about how long it takes to write that file."""
    return 1 if bench.quick else 8


def described(file: Opened, folder: Path) -> dict[str, float | str]:
    """Return the facts of what is read."""
    virtual = "the host of this virtual machine may have it in memory"
    return {
        "past_page_cache_by": file.way,
        "file_bytes": file.size_bytes,
        "file_system": file_system(folder),
        "virtual": virtual if is_virtual() else "no",
    }


def disk_series(bench: Bench, folder: Path | None = None, size_bytes: int = 0) -> Series:
    """Return the times of reads by bytes, of a file in a folder, `usual_folder` if None.

    `size_bytes` is the file's, 0 being that of `file_bytes`. Sizes are gone through as often as in
    `sweeps.sweep`, which says why.
    """
    where = usual_folder() if folder is None else folder
    lane = bench.device.lanes["disk"]
    found: dict[int, Timed] = {}
    with temporary_file(where, size_bytes or file_bytes(bench)) as file:
        sizes = [size for size in sorted(SIZES + HELD_OUT) if size <= file.size_bytes]
        once = {size: reader(file, size, lane) for size in sizes}
        for size in PASSES * sizes:
            timed = measure(once[size], bench.limits)
            found[size] = merged(found[size], timed, bench.limits) if size in found else timed
    points = tuple(point(size, found[size], held_out=size in HELD_OUT) for size in sizes)
    return Series(name="disk/read", unit="bytes", points=points, facts=described(file, where))


def tasks(bench: Bench, folder: Path | None = None) -> list[Task]:
    """Return what is to be measured; `folder` is where the temporary file goes."""
    seconds = sweep_seconds(bench, len(SIZES + HELD_OUT)) + write_seconds(bench)
    return [Task("disk/read", seconds, partial(disk_series, folder=folder))]
