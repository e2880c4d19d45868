"""The folder of compiled modules: never out of date, shared by processes, cleared at will."""

import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from moesim.jit import store

pytestmark = pytest.mark.skipif(store.disabled(), reason="nothing compiles")

TEXT = """\
import numba

@numba.njit(cache=True)
def add(x, y):
    return x + y * {factor}
"""


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path))
    return tmp_path / "compiled"


def add(module: ModuleType) -> Any:
    """Compile the module's function for integers."""
    module.add(1, 2)
    return module.add


def hits(function: Any) -> int:
    """Count how often machine code was found instead of made."""
    return sum(function.stats.cache_hits.values())


def test_what_was_compiled_is_found_again() -> None:
    stored = store.place("add", TEXT.format(factor=3))
    assert store.record_of(stored) is None
    made = store.load(stored, add)
    assert (made(1, 2), hits(made)) == (7, 0)
    record = store.record_of(stored)
    assert record is not None
    assert (record.name, record.error) == ("add", "")
    found = store.load(stored, add)
    assert (found(1, 2), hits(found)) == (7, 1)


def test_another_text_or_version_is_another_module(monkeypatch: pytest.MonkeyPatch) -> None:
    first = store.place("add", TEXT.format(factor=3))
    assert store.place("add", TEXT.format(factor=4)).path != first.path
    for name in ("__version__", "processor", "version"):
        changed = "other" if name == "__version__" else lambda *_: "other"
        with monkeypatch.context() as patch:
            patch.setattr(store, name, changed)
            store.surroundings.cache_clear()
            assert store.place("add", TEXT.format(factor=3)).path != first.path
        store.surroundings.cache_clear()
    assert store.place("add", TEXT.format(factor=3)).path == first.path


@pytest.mark.parametrize("ending", [".nbi", ".nbc"])
@pytest.mark.parametrize("content", [b"", b"nonsense", None])
def test_damaged_files_are_made_anew(ending: str, content: bytes | None, own_folder: Path) -> None:
    stored = store.place("add", TEXT.format(factor=3))
    store.load(stored, add)
    damaged = [path for path in own_folder.rglob(f"*{ending}") if path.is_file()]
    assert len(damaged) == 1
    whole = damaged[0].read_bytes()
    damaged[0].write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert store.load(stored, add)(1, 2) == 7
    again = store.load(stored, add)
    assert (again(1, 2), hits(again)) == (7, 1)


@pytest.mark.parametrize("ending", [".py", ".json"])
def test_a_damaged_source_or_record_is_made_anew(ending: str, own_folder: Path) -> None:
    stored = store.place("add", TEXT.format(factor=3))
    store.load(stored, add)
    stored.path.with_suffix(ending).write_bytes(b"")
    assert store.load(stored, add)(1, 2) == 7
    assert stored.path.read_text() == stored.text
    assert store.record_of(stored) is not None


def test_an_error_that_is_not_the_files_fault_is_raised() -> None:
    stored = store.place("broken", TEXT.format(factor="unknown"))
    with pytest.raises(Exception, match="unknown"):
        store.load(stored, add)
    assert store.record_of(stored) is None


def test_a_folder_that_cannot_be_written_costs_only_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path / "file"))
    stored = store.place("add", TEXT.format(factor=3))
    assert store.load(stored, add)(1, 2) == 7
    assert store.record_of(stored) is None


def test_processes_may_share_it(own_folder: Path) -> None:
    """Four of them start at once in an empty folder; each gets the right answer."""
    code = (
        "from moesim.jit import store\n"
        f"stored = store.place('add', {TEXT.format(factor=3)!r})\n"
        "print(store.load(stored, lambda module: module.add)(1, 2))\n"
    )
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    assert [process.communicate()[0] for process in running] == ["7\n"] * 4
    assert not [path for path in own_folder.iterdir() if path.name.startswith(".")]
    found = store.load(store.place("add", TEXT.format(factor=3)), add)
    assert hits(found) == 1


def test_it_is_cleared(own_folder: Path) -> None:
    store.load(store.place("add", TEXT.format(factor=3)), add)
    assert [record.name for _, record in store.records()] == ["add"]
    assert store.clear() == 1
    assert not own_folder.exists()
    assert store.clear() == 0
    assert os.environ["MOESIM_CACHE_DIR"] == str(own_folder.parent)
