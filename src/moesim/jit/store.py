"""The user's folder of compiled modules.

A module is the text that `flatten` made; its file is named by a hash of that text and of everything
else that decides what the machine code does: versions, this package, the processor. So nothing in
the folder is ever out of date, and files of other versions are never looked at. Numba keeps the
machine code beside it. Files appear whole or not at all, so processes may share the folder.
"""

import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import msgspec
import platformdirs

from moesim import __version__


class Record(msgspec.Struct, frozen=True):
    """What is known of a module that was compiled, or could not be."""

    name: str
    seconds: float
    error: str = ""
    """Why it does not compile; empty if it does."""


class Stored(NamedTuple):
    """A module's place in the folder."""

    name: str
    text: str
    path: Path
    """Of its source; its record is beside it."""


def disabled() -> bool:
    """Say whether Numba was told to compile nothing, as for measuring which lines tests reach."""
    return os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


def folder() -> Path:
    """Return where compiled modules are kept: MOESIM_CACHE_DIR, or the user's cache folder."""
    chosen = os.environ.get("MOESIM_CACHE_DIR")
    return (Path(chosen) if chosen else platformdirs.user_cache_path("moesim")) / "compiled"


@cache
def surroundings() -> str:
    """Return all but the text that decides what is compiled."""
    here = Path(__file__).parent
    sources = "".join(path.read_text("utf-8") for path in sorted(here.glob("*.py")))
    checks = os.environ.get("NUMBA_BOUNDSCHECK", "")
    packages = [f"{name} {version(name)}" for name in ("numba", "llvmlite", "numpy")]
    parts = (__version__, sys.version, *packages, processor(), checks, sources)
    return "\n".join(parts)


def processor() -> str:
    """Return what distinguishes this processor from others that may share the folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").split("\n\n", 1)[0].splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kept = ("model name", "flags", "Features", "CPU part")
    return "\n".join(line for line in lines if line.startswith(kept))


def place(name: str, text: str) -> Stored:
    """Return where a module is kept, or would be."""
    digest = hashlib.sha256(f"{surroundings()}\n{text}".encode()).hexdigest()[:20]
    return Stored(name, text, folder() / f"{name}_{digest}.py")


def record_of(stored: Stored) -> Record | None:
    """Return a module's record; None if it was never compiled, or its record cannot be read."""
    try:
        return msgspec.json.decode(stored.path.with_suffix(".json").read_bytes(), type=Record)
    except (OSError, msgspec.MsgspecError):
        return None


def records() -> list[tuple[Path, Record]]:
    """Return all records in the folder."""
    found = []
    for path in sorted(folder().glob("*.json")):
        record = record_of(Stored("", "", path))
        if record is not None:
            found.append((path, record))
    return found


def clear() -> int:
    """Delete all that is in the folder; return how many modules that were."""
    path = folder().resolve()
    if not path.exists():
        return 0
    count = len(list(path.glob("*.py")))
    shutil.rmtree(path)
    return count


def load(stored: Stored, prepare: Callable[[ModuleType], Any]) -> Any:
    """Return what `prepare` makes of the module, which it compiles or finds compiled.

    Files that cannot be read, such as those of a process that was killed, are made anew. Raises
    what `prepare` raises if that is not the files' fault.
    """
    try:
        stored.path.parent.mkdir(parents=True, exist_ok=True)
        write(stored.path, stored.text.encode())
    except OSError:
        # A folder that cannot be written costs a compilation every time, and nothing else.
        stored = stored._replace(path=Path(_temporary().name) / stored.path.name)
        write(stored.path, stored.text.encode())
    known = record_of(stored)
    began = time.perf_counter()
    try:
        made = prepare(import_file(stored.path))
    except Exception:
        if known is None or known.error:
            raise
        forget(stored)
        write(stored.path, stored.text.encode())
        known = None
        made = prepare(import_file(stored.path))
    if known is None:
        note(stored, "", time.perf_counter() - began)
    return made


def note(stored: Stored, error: str, seconds: float) -> None:
    """Write a module's record, if that is possible."""
    record = Record(stored.name, round(seconds, 3), error)
    path = stored.path.with_suffix(".json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, msgspec.json.encode(record))
    except OSError:
        return


def forget(stored: Stored) -> None:
    """Delete all files of a module."""
    for path in stored.path.parent.rglob(f"{stored.path.stem}*"):
        path.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """Write a file whole, unless it is there as it should be.

    Numba takes a source's time for its version: it is always the same, whoever wrote it.
    """
    if path.is_file() and path.read_bytes() == content:
        return
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", delete=False) as file:
        file.write(content)
    os.utime(file.name, (0, 0))
    Path(file.name).chmod(0o644)
    Path(file.name).replace(path)


def import_file(path: Path) -> ModuleType:
    """Import a module of the folder; Numba looks for it under its name in `sys.modules`."""
    spec = importlib.util.spec_from_file_location(f"moesim_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module.__name__] = module
    spec.loader.exec_module(module)
    return module


@cache
def _temporary() -> Any:
    """Make a folder that is gone when the process is."""
    return tempfile.TemporaryDirectory(prefix="moesim-")
