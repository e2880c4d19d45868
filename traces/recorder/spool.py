"""Rows of several arrays, appended to files in a folder: memory stays small, and a crash loses
little."""

import contextlib
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from moesim.errors import RecordError
from moesim.traces.format import AnyArray

_STATE = "state.json"


class Spool:
    """A folder of growing arrays that share their first axis; a context manager.

    `append` writes rows, `commit` makes what was appended survive. Opened again with the same
    identity, a folder goes on from its last commit. rows: how many there are. notes: what the last
    commit was given.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]) -> None:
        self.folder, self.identity = folder, identity
        self.rows, self.notes = 0, {}  # type: int, dict[str, Any]
        self._layout: dict[str, tuple[str, list[int]]] = {}
        self._files: dict[str, BinaryIO] = {}
        if (folder / _STATE).exists():
            self._reopen()
        else:
            if folder.exists() and any(folder.iterdir()):
                raise RecordError(f"{folder}: is no unfinished recording; remove it or use another")
            folder.mkdir(exist_ok=True)
            self.commit({})

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()

    def append(self, arrays: dict[str, AnyArray]) -> None:
        """Append rows (N, ...) to every array; names, types and shapes are those of the first.

        Raises RecordError if they are not.
        """
        layout = {name: (a.dtype.str, list(a.shape[1:])) for name, a in arrays.items()}
        if not self._layout:
            self._layout = layout
        if layout != self._layout:
            raise RecordError(f"rows of {layout} do not follow rows of {self._layout}")
        counts = {len(array) for array in arrays.values()}
        if len(counts) != 1:
            raise RecordError(f"arrays have {sorted(counts)} rows; they must have equally many")
        for name, array in arrays.items():
            self._file(name).write(np.ascontiguousarray(array).tobytes())
        self.rows += counts.pop()

    def commit(self, notes: dict[str, Any]) -> None:
        """Make everything appended survive, together with some notes (JSON)."""
        for file in self._files.values():
            file.flush()
        self.notes = notes
        state = {
            "identity": self.identity,
            "rows": self.rows,
            "notes": notes,
            "layout": self._layout,
        }
        temporary = self.folder / f"{_STATE}.tmp"
        temporary.write_text(json.dumps(state))
        temporary.replace(self.folder / _STATE)

    def arrays(self) -> dict[str, AnyArray]:
        """Return the arrays, mapped from their files and read-only."""
        for file in self._files.values():
            file.flush()
        return {
            name: np.memmap(self._path(name), dtype, "r", shape=(self.rows, *shape))
            if self.rows
            else np.empty((0, *shape), dtype)
            for name, (dtype, shape) in self._layout.items()
        }

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _reopen(self) -> None:
        path = self.folder / _STATE
        try:
            state = json.loads(path.read_text())
            self.rows, self.notes = int(state["rows"]), dict(state["notes"])
            self._layout = {str(n): (str(d), list(s)) for n, (d, s) in state["layout"].items()}
            identity = dict(state["identity"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RecordError(f"{path}: is broken ({error}); remove the folder") from None
        for key in self.identity.keys() | identity.keys():
            was, now = identity.get(key), self.identity.get(key)
            if was != now:
                raise RecordError(
                    f"{self.folder}: an unfinished recording with {key} {was!r}, now {now!r}; "
                    f"finish it as it was begun, or remove the folder"
                )
        for name, (dtype, shape) in self._layout.items():
            size = self.rows * int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
            with contextlib.suppress(OSError):
                if self._path(name).stat().st_size >= size:
                    os.truncate(self._path(name), size)  # rows after the last commit
                    continue
            raise RecordError(
                f"{self._path(name)}: is shorter than {size} bytes; remove the folder"
            )

    def _file(self, name: str) -> BinaryIO:
        if name not in self._files:
            self._files[name] = self._path(name).open("ab")
        return self._files[name]

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.bin"
