"""Finished points on disk, each in a small file of its own, and the table that is made of them.

A file is written by the process that evaluated the point and appears whole or not at all, so that
whatever is killed loses no more than what was under way. The table can be made again at any time.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec

from moesim.answers.points import Point
from moesim.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

PART = ".part"
ROWS_AT_ONCE = 4096
"""Rows of a table that are in memory together."""
TEXTS = ("notices", "prefetch.predictors")
"""Columns that are lists of texts; all other lists are of numbers."""

EMPTY = {"error": "text"}
"""Kinds of columns without a value, if they are not numbers."""

Row = dict[str, Any]


class Finished(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What became of a point: its row, or the line that says why there is none."""

    point: Point
    row: Row | None = None
    error: str = ""
    seconds: float
    """What evaluating it took."""


class Store(NamedTuple):
    """A folder of finished points by their digest."""

    folder: Path

    def path(self, digest: str) -> Path:
        """Return where a point is kept once it is finished."""
        return self.folder / f"{digest}.json"

    def part(self, digest: str) -> Path:
        """Return what this process has of a point that it is evaluating."""
        return self.folder / f"{digest}.{os.getpid()}{PART}"

    def read(self, digest: str) -> Finished | None:
        """Return a finished point; None if it is not there, or its file is broken."""
        try:
            found = msgspec.json.decode(self.path(digest).read_bytes(), type=Finished)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
        return None if (found.row is None) == (not found.error) else found

    def begin(self, digest: str) -> None:
        """Note that this process is evaluating a point."""
        self.part(digest).touch()

    def write(self, digest: str, finished: Finished) -> None:
        """Keep a finished point."""
        part = self.part(digest)
        part.write_bytes(msgspec.json.encode(finished))
        part.replace(self.path(digest))

    def finished(self) -> set[str]:
        """Return the digests of all finished points."""
        return {path.name.removesuffix(".json") for path in self.files(".json")}

    def begun(self) -> set[str]:
        """Return the digests of points that a process is evaluating, or was when it ended."""
        return {path.name.partition(".")[0] for path in self.files(PART)}

    def forget_begun(self) -> None:
        """Delete what processes that ended left of unfinished points."""
        for path in self.files(PART):
            path.unlink(missing_ok=True)

    def files(self, suffix: str) -> list[Path]:
        """Return the files that end so; none if there is no folder yet."""
        with contextlib.suppress(FileNotFoundError), os.scandir(self.folder) as entries:
            return [Path(entry.path) for entry in entries if entry.name.endswith(suffix)]
        return []


@contextlib.contextmanager
def held(store: Store) -> Iterator[None]:
    """Make the folder, and keep other sweeps out of it; raise InputError if one is in there."""
    store.folder.mkdir(exist_ok=True)
    try:
        import fcntl
    except ImportError:  # not on Windows, where two sweeps would do the same work twice
        yield
        return
    with (store.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{store.folder}: another sweep is writing there") from None
        yield


def kinds_of(rows: Iterable[Row]) -> dict[str, str]:
    """Return the kind of every column, in the order in which columns first appear.

    Columns of whole numbers and others are `float`; of numbers and texts `text`.
    """
    kinds: dict[str, str] = {}
    for row in rows:
        for key, value in row.items():
            kind = kind_of(key, value)
            known = kinds.get(key, "")
            if known == kind or not kind:
                kinds.setdefault(key, kind)
            elif not known or {known, kind} == {"int", "float"}:
                kinds[key] = "float" if known else kind
            else:
                kinds[key] = "text"
    return {key: kind or EMPTY.get(key, "float") for key, kind in kinds.items()}


def kind_of(key: str, value: Any) -> str:
    """Return the kind of one value, "" for None."""
    if value is None:
        return ""
    if isinstance(value, list):
        return "texts" if key in TEXTS else "numbers"
    return {bool: "bool", int: "int", float: "float"}.get(type(value), "text")


def write_table(path: Path, kinds: dict[str, str], rows: Iterable[Row]) -> None:
    """Write rows as a Parquet file, which appears whole or not at all."""
    parquet = imported("pyarrow.parquet")
    part = path.with_name(path.name + PART)
    blocks = iter(rows)
    try:
        with parquet.ParquetWriter(part, schema_of(kinds)) as writer:
            while block := list(islice(blocks, ROWS_AT_ONCE)):
                writer.write_table(table_of(kinds, block))
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def table_of(kinds: dict[str, str], rows: Sequence[Row]) -> "pa.Table":
    """Return rows as an Arrow table; what a row does not have is null."""
    pa = imported("pyarrow")
    schema = schema_of(kinds)
    columns = [
        pa.array([converted(row.get(key), kind) for row in rows], schema.field(key).type)
        for key, kind in kinds.items()
    ]
    return pa.Table.from_arrays(columns, schema=schema)


def schema_of(kinds: dict[str, str]) -> "pa.Schema":
    """Return the types of the columns."""
    pa = imported("pyarrow")
    types = {
        "bool": pa.bool_(), "int": pa.int64(), "float": pa.float64(), "text": pa.string(),
        "texts": pa.list_(pa.string()), "numbers": pa.list_(pa.float64()),
    }  # fmt: skip
    return pa.schema([(key, types[kind]) for key, kind in kinds.items()])


def converted(value: Any, kind: str) -> Any:
    """Return a value as one of a column's kind."""
    if kind == "text" and value is not None and not isinstance(value, str):
        return msgspec.json.encode(value).decode()
    return value


def imported(name: str) -> Any:
    """Return pyarrow, or a module of it; raise InputError if it is not installed."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError:
        package = name.partition(".")[0]
        raise InputError(f"sweeps need {package}: pip install 'moesim[analysis]'") from None
