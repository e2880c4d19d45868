"""Rows on disk: what was committed is there again, and memory does not grow with rows."""

import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import RecordError
from moesim.traces.format import Trace, write_trace
from moesim.traces.recorder.spool import Spool


def rows(count: int, start: int = 0) -> dict[str, np.ndarray]:
    numbers = np.arange(start, start + count)
    return {"a": np.repeat(numbers, 6).reshape(count, 2, 3).astype(np.uint16), "b": numbers}


@given(parts=st.lists(st.integers(0, 5), min_size=1, max_size=6), kept=st.integers(0, 6))
@settings(deadline=None, max_examples=40)
def test_a_crash_loses_only_what_was_not_committed(
    tmp_path_factory: pytest.TempPathFactory, parts: list[int], kept: int
) -> None:
    folder = tmp_path_factory.mktemp("spool") / "x"
    with Spool(folder, {"seed": 1}) as spool:
        spool.commit({"parts": 0})
        for done, count in enumerate(parts, 1):
            spool.append(rows(count, spool.rows))
            if done <= kept:
                spool.commit({"parts": done})

    with Spool(folder, {"seed": 1}) as again:
        committed = int(again.notes["parts"])
        assert committed == min(kept, len(parts))
        for count in parts[committed:]:
            again.append(rows(count, again.rows))
        found = again.arrays()

        expected = rows(sum(parts))
        assert (found["a"] == expected["a"]).all()
        assert (found["b"] == expected["b"]).all()
        again.discard()
    assert not folder.exists()


def test_memory_does_not_grow_with_tokens(tmp_path: Path) -> None:
    tokens, layers, passes = 10_000, 48, 40
    per_pass = tokens // passes
    guess = np.tile(np.arange(24, dtype=np.uint16), (per_pass, layers, 1))
    names = ("candidates_gate1", "candidates_gate2", "candidates_gate3", "candidates_router")
    tracemalloc.start()
    try:
        with Spool(tmp_path / "spool", {}) as spool:
            for done in range(passes):
                spool.append(
                    {
                        "experts": guess[:, :, :8],
                        "position": np.arange(per_pass, dtype=np.int32) + done * per_pass,
                        "sequence": np.zeros(per_pass, np.int32),
                        "phase": np.zeros(per_pass, np.uint8),
                        **dict.fromkeys(names, guess),
                    }
                )
            arrays = spool.arrays()
            trace = Trace(
                **{n: a for n, a in arrays.items() if n not in names},  # type: ignore[arg-type]
                layer_ids=np.arange(layers, dtype=np.int32),
                candidates={n.removeprefix("candidates_"): arrays[n] for n in names},
                meta={"num_experts": 128},
            )
            write_trace(trace, tmp_path / "t.npz")
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    written = tokens * layers * (8 + 4 * 24) * 2
    assert peak < 40e6 < written / 2  # NumPy writes 16 MB at a time, twice over


def test_another_recording_is_not_gone_on_with(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", {"seed": 1}) as spool:
        spool.commit({})

    with pytest.raises(RecordError, match="recording with seed 1, now 2; finish it"):
        Spool(tmp_path / "s", {"seed": 2})


def test_a_folder_that_is_no_recording(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()

    with pytest.raises(RecordError, match="is no unfinished recording"):
        Spool(tmp_path, {})


@pytest.mark.parametrize("state", ["", "[]", "{}", '{"rows": 1}'])
def test_a_broken_folder(tmp_path: Path, state: str) -> None:
    (tmp_path / "state.json").write_text(state)

    with pytest.raises(RecordError, match="is broken"):
        Spool(tmp_path, {})


def test_a_file_that_lost_rows(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", {}) as spool:
        spool.append(rows(3))
        spool.commit({})
    (tmp_path / "s" / "a.bin").write_bytes(b"1")

    with pytest.raises(RecordError, match="shorter than 36 bytes"):
        Spool(tmp_path / "s", {})
    assert json.loads((tmp_path / "s" / "state.json").read_text())["rows"] == 3


def test_rows_that_do_not_fit(tmp_path: Path) -> None:
    with Spool(tmp_path / "s", {}) as spool:
        spool.append(rows(3))
        with pytest.raises(RecordError, match="do not follow"):
            spool.append({"a": np.zeros((1, 2), np.uint16)})
        with pytest.raises(RecordError, match="equally many"):
            spool.append({"a": np.zeros((1, 2, 3), np.uint16), "b": np.arange(2)})
