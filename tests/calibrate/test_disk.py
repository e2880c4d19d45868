"""Reads of a temporary file: all of it, past the page cache, and nothing is left behind."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from moesim.calibrate import disk
from moesim.calibrate.disk import (
    check_folder,
    disk_series,
    file_system,
    read_job,
    reader,
    temporary_file,
    usual_folder,
)
from moesim.calibrate.series import Bench
from moesim.calibrate.timing import Limits
from moesim.errors import CalibrationError
from moesim.real.devices import Processor
from moesim.real.lanes import Lane

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="needs Linux")

MIB = 1 << 20
LIMITS = Limits(warm_ups=1, least=2, most=2, seconds=0.1)
MOUNTS = """\
/dev/vda / ext4 rw 0 0
tmpfs /run/fast tmpfs rw 0 0
/dev/vdb /run/fast/deep\\040er xfs rw 0 0
broken
"""


@pytest.fixture(autouse=True)
def on_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let folders of tests count as on a disk; some machines have them in memory."""
    monkeypatch.setattr(disk, "IN_MEMORY", ())


@pytest.fixture
def bench() -> Iterator[Bench]:
    device = Processor(1)
    yield Bench(device, LIMITS, True)
    device.close()


def test_reads_by_size_with_some_held_out(bench: Bench, tmp_path: Path) -> None:
    found = disk_series(bench, tmp_path, 2 * MIB)
    assert [(p.at, p.held_out) for p in found.points] == [
        (64 << 10, False), (256 << 10, False), (512 << 10, True), (MIB, False),
    ]  # fmt: skip
    assert found.facts["past_page_cache_by"] in ("O_DIRECT", "posix_fadvise")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_read_is_the_next_stretch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    """Four stretches of the file in order and the first again, with and without O_DIRECT.

    Each is dropped from the page cache before, one alone or queued behind others.
    """
    if not direct:
        monkeypatch.setattr(os, "O_DIRECT", -1)
        plain = os.open

        def refusing(name: Any, flags: int, mode: int = 0o777, **other: Any) -> int:
            if flags == -1:
                raise OSError(22, "Invalid argument")
            return plain(name, flags, mode, **other)

        monkeypatch.setattr(os, "open", refusing)
    seen: list[tuple[str, int, int]] = []
    read, advise = os.preadv, os.posix_fadvise

    def watched(handle: int, buffers: Any, start: int) -> int:
        got = read(handle, buffers, start)
        seen.append(("read", start, got))
        return got

    def dropping(handle: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        seen.append(("drop", start, size))
        advise(handle, start, size, advice)

    monkeypatch.setattr(os, "preadv", watched)
    monkeypatch.setattr(os, "posix_fadvise", dropping)
    with temporary_file(tmp_path, 4 * 65536) as file, Lane("disk") as lane:
        assert direct or file.way == "posix_fadvise"
        assert seen == [("drop", 0, 0)]  # all of it, once it is written
        expected = [
            (what, k * 65536 % (4 * 65536), 65536) for k in range(5) for what in ("drop", "read")
        ]
        seen.clear()
        once = reader(file, 65536, lane)
        assert all(once() >= 0 for _ in range(5))
        assert seen == expected
        seen.clear()
        job = read_job(file, 65536)
        for ticket in [lane.submit(work) for work in [job() for _ in range(5)]]:
            ticket.wait()
        assert seen == expected


def test_the_file_has_no_name_while_it_is_read(tmp_path: Path) -> None:
    """So it disappears however the process ends."""
    with temporary_file(tmp_path, 65536) as file:
        assert list(tmp_path.iterdir()) == []
        assert os.fstat(file.handle).st_size == 65536
        assert os.fstat(file.handle).st_nlink == 0
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(file.handle)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("kernel")])
def test_nothing_is_left_of_an_interrupted_measurement(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def fail(*_: object) -> None:
        raise error

    for what in ("measure", "fill"):
        with monkeypatch.context() as patch:
            patch.setattr(disk, what, fail)
            with pytest.raises(type(error)):
                disk_series(bench, tmp_path, 65536)
        assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(disk, "fill", full)
    with pytest.raises(CalibrationError, match=r"disk: a file in .*: No space left on device"):
        disk_series(bench, tmp_path, 65536)
    assert list(tmp_path.iterdir()) == []


def test_free_space_is_checked_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"bytes free; \d+ are needed to read a file"):
        check_folder(tmp_path, 1 << 60)
    with pytest.raises(CalibrationError, match="is no folder"):
        check_folder(tmp_path / "nowhere", 1)


def test_a_folder_in_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "IN_MEMORY", ("tmpfs",))
    monkeypatch.setattr(disk, "file_system", lambda _: "tmpfs")
    with pytest.raises(CalibrationError, match=r"is in memory \(tmpfs\); a folder on a disk is"):
        check_folder(tmp_path, 1)


def test_a_folder_in_memory_is_not_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {tmp_path: "ext4"}
    monkeypatch.setattr(disk, "IN_MEMORY", ("tmpfs",))
    monkeypatch.setattr(disk, "file_system", lambda folder: kinds.get(folder, "tmpfs"))
    other = tmp_path / "memory"
    other.mkdir()
    assert usual_folder([str(tmp_path / "nowhere"), str(other), str(tmp_path)]) == tmp_path
    assert usual_folder([str(other)]) == Path(tempfile.gettempdir())


@pytest.mark.parametrize(
    ("folder", "kind"),
    [
        ("/home", "ext4"),
        ("/run/fast/x", "tmpfs"),
        ("/run/faster", "ext4"),
        ("/run/fast/deep er/x", "xfs"),
    ],
)
def test_the_innermost_mount_counts(folder: str, kind: str) -> None:
    assert file_system(Path(folder), MOUNTS) == kind
