"""Finished points on disk, and the table made of them."""

import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moesim.answers import store as module
from moesim.answers.points import Point
from moesim.answers.store import (
    Finished,
    Store,
    held,
    kinds_of,
    table_of,
    write_table,
)
from moesim.errors import InputError

NEITHER = b'{"point": {}, "seconds": 1}'
"""No row, and no reason why."""
ROW = {"a": 1, "b": 0.1 + 0.2, "c": "x", "d": None, "e": [0.5, None], "f": True}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    found = Store(tmp_path / "points")
    found.folder.mkdir()
    return found


def test_what_is_kept_is_read_back_exactly(store: Store) -> None:
    kept = Finished(point=Point(policy="lru", cache_ratio=0.1), row=ROW, seconds=0.25)
    store.write("0123", kept)

    assert store.read("0123") == kept
    assert store.read("4567") is None
    assert store.finished() == {"0123"}
    assert [path.name for path in store.folder.iterdir()] == ["0123.json"]


def test_a_broken_file_is_as_good_as_none(store: Store) -> None:
    for at, content in enumerate(
        (b"", b"{", b'{"point": {}, "seconds": 1, "colour": 2}', b"\xff", NEITHER)
    ):
        store.path(f"{at}").write_bytes(content)

        assert store.read(f"{at}") is None


def test_what_is_begun_is_told_from_what_is_finished(store: Store) -> None:
    store.begin("01")
    (store.folder / f"02.{os.getpid() + 1}.part").touch()
    assert (store.begun(), store.finished()) == ({"01", "02"}, set())

    store.write("01", Finished(point=Point(), error="no", seconds=0.0))
    assert (store.begun(), store.finished()) == ({"02"}, {"01"})

    store.forget_begun()
    assert (store.begun(), store.finished()) == (set(), {"01"})


def test_a_folder_that_is_not_there_is_empty(tmp_path: Path) -> None:
    nowhere = Store(tmp_path / "nowhere")

    assert (nowhere.begun(), nowhere.finished(), nowhere.read("01")) == (set(), set(), None)
    assert not nowhere.folder.exists()


def test_one_sweep_at_a_time(store: Store) -> None:
    with (
        held(store),
        pytest.raises(InputError, match="another sweep is writing there"),
        held(store),
    ):
        pass
    with held(store):
        pass


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([True, None], "bool"),
        ([1, 2], "int"),
        ([None, 1, 2.5, 3], "float"),
        ([1.0, 1], "float"),
        (["x", None], "text"),
        ([1, "x"], "text"),
        ([True, 1], "text"),
        ([None, None], "float"),
        ([[], [0.5, None]], "numbers"),
        ([[1], None], "numbers"),
    ],
)
def test_a_column_has_one_kind(values: list[Any], kind: str) -> None:
    assert kinds_of({"x": value} for value in values) == {"x": kind}
    assert kinds_of({"x": value} for value in reversed(values)) == {"x": kind}


def test_the_column_of_errors_has_one_type_with_and_without_errors() -> None:
    assert kinds_of([{"error": None}]) == kinds_of([{"error": "no room"}]) == {"error": "text"}


def test_columns_come_in_the_order_of_their_first_row() -> None:
    assert list(kinds_of([{"a": None, "b": 1}, {"c": 1, "a": 2}])) == ["a", "b", "c"]


def test_a_table_by_hand() -> None:
    rows: list[dict[str, Any]] = [
        {"a": 1, "b": 1, "c": "x1", "notices": [], "e": True},
        {"a": None, "b": 0.5, "c": 2, "notices": ["y"], "e": 3},
        {"c": None},
    ]
    table = table_of(kinds_of(rows), rows)

    assert table.to_pydict() == {
        "a": [1, None, None],
        "b": [1.0, 0.5, None],
        "c": ["x1", "2", None],
        "notices": [[], ["y"], None],
        "e": ["true", "3", None],
    }
    assert table.schema.field("a").type == pa.int64()
    assert table.schema.field("notices").type == pa.list_(pa.string())


def test_a_file_is_written_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", 2)
    rows = [{"x": i, "y": "z" * i} for i in range(5)]
    path = tmp_path / "t.parquet"
    write_table(path, kinds_of(rows), iter(rows))

    assert pq.read_table(path).to_pylist() == rows
    assert pq.ParquetFile(path).num_row_groups == 3
    assert [file.name for file in tmp_path.iterdir()] == ["t.parquet"]


def test_a_file_that_cannot_be_finished_replaces_nothing(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, {"x": "int"}, [{"x": 1}])
    before = path.read_bytes()
    with pytest.raises((pa.ArrowInvalid, pa.ArrowTypeError)):
        write_table(path, {"x": "int"}, [{"x": "no"}])

    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["t.parquet"]
