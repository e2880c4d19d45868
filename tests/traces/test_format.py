import contextlib
import io
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import TraceError
from moesim.traces.format import (
    MISSING,
    SCHEMA,
    Trace,
    read_trace,
    rows_by_sequence,
    write_trace,
)

MakeTrace = Callable[..., Trace]
Arrays = dict[str, Any]


def arrays_of(path: Path) -> Arrays:
    with np.load(path) as archive:
        return dict(archive)


def same(a: Trace, b: Trace) -> bool:
    fields = [(getattr(a, name), getattr(b, name)) for name in Trace.__struct_fields__]
    return a.digest() == b.digest() and all(
        np.array_equal(x, y) and x.dtype == y.dtype if isinstance(x, np.ndarray) else True
        for x, y in fields
    )


@given(
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    layers=st.integers(1, 4),
    experts=st.integers(3, 9),
    seed=st.integers(0, 99),
    full=st.booleans(),
)
@settings(deadline=None, max_examples=30)
def test_what_is_written_is_read(
    make_trace: MakeTrace,
    tmp_path_factory: pytest.TempPathFactory,
    lengths: list[int],
    layers: int,
    experts: int,
    seed: int,
    full: bool,
) -> None:
    trace = make_trace(
        lengths, [1] * len(lengths), layers=layers, experts=experts, seed=seed, full=full
    )
    folder = tmp_path_factory.mktemp("round")

    write_trace(trace, folder / "a.npz")
    again = read_trace(folder / "a.npz")
    write_trace(again, folder / "b.npz")

    assert same(trace, again)
    assert again.meta == trace.meta
    assert again.n_experts == experts
    assert (folder / "a.npz").read_bytes() == (folder / "b.npz").read_bytes()
    assert sorted(p.name for p in folder.iterdir()) == ["a.npz", "b.npz"]


def test_the_digest_sees_every_array(make_trace: MakeTrace) -> None:
    trace = make_trace()
    changes: list[dict[str, Any]] = [
        {"weights": None},
        {"token_id": None},
        {"candidate_scores": {}},
        {"candidates": {}, "candidate_scores": {}},
        {"meta": {}},
        {"experts": trace.experts[:, :, ::-1]},
        {"position": trace.position + np.int32(1)},
    ]
    digests = {msgspec.structs.replace(trace, **change).digest() for change in changes}

    assert len(digests | {trace.digest()}) == len(changes) + 1


def test_experts_are_counted_where_meta_does_not_say(make_trace: MakeTrace) -> None:
    trace = make_trace(experts=6)
    unsaid = msgspec.structs.replace(trace, meta={})
    in_spec = msgspec.structs.replace(trace, meta={"spec": {"experts": 77}})

    assert unsaid.n_experts == trace.experts.max() + 1
    assert in_spec.n_experts == 77


def test_missing_ids_are_legal_and_may_repeat(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_trace()
    trace.experts[1, 2] = MISSING

    write_trace(trace, tmp_path / "t.npz")

    assert read_trace(tmp_path / "t.npz").experts[1, 2].tolist() == [MISSING, MISSING]


def test_rows_of_interleaved_sequences_are_told_apart(make_trace: MakeTrace) -> None:
    trace = make_trace((2, 2, 2), (1, 1, 1))
    mixed = msgspec.structs.replace(
        trace,
        sequence=np.array([9, 4, 9, 4, 0, 0], np.int32),
        position=np.array([0, 0, 1, 7, 2, 3], np.int32),
    )

    rows, starts = rows_by_sequence(mixed)

    assert rows.tolist() == [0, 2, 1, 3, 4, 5]
    assert starts.tolist() == [0, 2, 4, 6]


def put(name: str, value: Any) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name] = value

    return change


def drop(name: str) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        del arrays[name]

    return change


def cast(name: str, dtype: str) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name] = arrays[name].astype(dtype)

    return change


def at(name: str, index: tuple[int, ...], value: Any) -> Callable[[Arrays], None]:
    def change(arrays: Arrays) -> None:
        arrays[name][index] = value

    return change


BROKEN: dict[str, tuple[Callable[[Arrays], None], str]] = {
    "unknown array": (put("speed", np.ones(3)), "no array called 'speed'"),
    "missing array": (drop("phase"), "array phase is missing"),
    "other schema": (put("schema", np.array("moesim.trace/9")), f"legal is '{SCHEMA}'"),
    "schema of numbers": (put("schema", np.ones(2)), "schema is float64"),
    "object array": (put("experts", np.array([None, {}], object)), "Python objects"),
    "ids of a wrong dtype": (cast("experts", "int64"), "experts is int64; it must be uint16"),
    "big-endian ids": (cast("experts", ">u2"), "experts is >u2; it must be uint16"),
    "ids of two axes": (put("experts", np.zeros((8, 3), np.uint16)), "experts has shape (8, 3)"),
    "no tokens": (put("experts", np.zeros((0, 3, 2), np.uint16)), "at least 1"),
    "id out of range": (at("experts", (4, 1, 0), 6), "experts[4, 1, 0] is 6; legal are 0..5"),
    "expert twice": (put("experts", np.ones((8, 3, 2), np.uint16)), "experts[0, 0] is [1, 1]"),
    "weight NaN": (at("weights", (2, 0, 1), np.nan), "weights[2, 0, 1] is nan"),
    "weight infinite": (at("weights", (2, 0, 1), np.inf), "weights[2, 0, 1] is inf"),
    "weights of another shape": (
        put("weights", np.ones((8, 3, 1), np.float16)),
        "it must be (8, 3, 2)",
    ),
    "weights of a wrong dtype": (cast("weights", "f4"), "weights is float32"),
    "phase 2": (at("phase", (3,), 2), "phase[3] is 2"),
    "phase of another length": (put("phase", np.zeros(7, np.uint8)), "it must be (8)"),
    "position standing": (at("position", (2,), 1), "position[2] is 1"),
    "position negative": (at("position", (0,), -1), "position[0] is -1"),
    "sequence negative": (at("sequence", (0,), -3), "sequence[0] is -3"),
    "layers falling": (at("layer_ids", (1,), 0), "layer_ids[1] is 0"),
    "layer negative": (at("layer_ids", (0,), -1), "layer_ids[0] is -1"),
    "token ids of floats": (cast("token_id", "f4"), "token_id is float32"),
    "candidate out of range": (
        at("candidates_gate1", (1, 1, 2), 600),
        "candidates_gate1[1, 1, 2] is 600",
    ),
    "candidate twice": (
        put("candidates_gate1", np.ones((8, 3, 3), np.uint16)),
        "candidates_gate1[0, 0] is [1, 1, 1]",
    ),
    "candidates of other layers": (
        put("candidates_gate1", np.zeros((8, 2, 1), np.uint16)),
        "it must be (8, 3, any)",
    ),
    "score NaN": (
        at("candidate_scores_gate1", (0, 2, 0), np.nan),
        "candidate_scores_gate1[0, 2, 0] is nan",
    ),
    "scores alone": (drop("candidates_gate1"), "without candidates_gate1"),
    "meta no JSON": (put("meta", np.array("{")), "meta is no JSON"),
    "meta with NaN": (put("meta", np.array('{"a": NaN}')), "NaN is no JSON number"),
    "meta too deep": (put("meta", np.array("[" * 100_000)), "meta is no JSON"),
    "meta a list": (put("meta", np.array("[1]")), "it must be an object"),
    "meta of bytes": (put("meta", np.array(b"{}")), "it must be one string"),
    "meta with a wrong count": (
        put("meta", np.array('{"num_experts": "128"}')),
        "num_experts is '128'",
    ),
    "meta with a wrong model": (put("meta", np.array('{"model": 3}')), "model is 3"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_array_is_refused(make_trace: MakeTrace, tmp_path: Path, fault: str) -> None:
    change, message = BROKEN[fault]
    path = tmp_path / "t.npz"
    write_trace(make_trace(), path)
    arrays = arrays_of(path)
    change(arrays)
    np.savez_compressed(path, **arrays)

    with pytest.raises(TraceError) as caught:
        read_trace(path)

    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_more_experts_than_any_model_has_are_refused(make_trace: MakeTrace, tmp_path: Path) -> None:
    wide = msgspec.structs.replace(make_trace(layers=300), meta={"num_experts": 65_000})

    with pytest.raises(TraceError, match="300 layers of 65000 experts; legal are 16777216"):
        write_trace(wide, tmp_path / "t.npz")


def npy(header: str, data: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    """Return an npy file with a header written by hand."""
    return b"\x93NUMPY" + version + len(header).to_bytes(2, "little") + header.encode() + data


def zipped(method: int = zipfile.ZIP_DEFLATED, **members: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name.replace("__", "."), data)
    return out.getvalue()


def header(shape: str, descr: str = "<u2") -> str:
    return f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}\n"


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "no readable npz"),
    "text": (b"experts,1,2,3", "no readable npz"),
    "bare npy": (npy(header("(1,)"), b"\x00\x00"), "no readable npz"),
    "no arrays": (zipped(), "array schema is missing"),
    "another layout": (
        zipped(experts__npy=npy(header("(1, 1, 1)", "<i2"), b"\x00\x00")),
        "array schema is missing",
    ),
    "no npy": (zipped(experts__npy=b"hello"), "no readable npz"),
    "a file beside": (zipped(readme__txt=b"hello"), "'readme.txt' is no array"),
    "huge shape": (
        zipped(experts__npy=npy(header("(100000, 50, 1000)", "<i2"))),
        "10000000000 bytes; it has 0",
    ),
    "overflowing shape": (
        zipped(experts__npy=npy(header("(4294967296, 4294967296, 2)", "<i2"))),
        "it has 0",
    ),
    "negative shape": (
        zipped(experts__npy=npy(header("(-1, -1, 1)", "<i2"), b"\x00\x00")),
        "states shape (-1, -1, 1)",
    ),
    "short data": (zipped(experts__npy=npy(header("(1, 2, 1)", "<i2"), b"\x00\x00")), "it has 2"),
    "long data": (zipped(experts__npy=npy(header("(1, 1, 1)", "<i2"), b"\x00" * 4)), "it has 4"),
    "pickle": (zipped(experts__npy=npy(header("(1,)", "|O"), b"cos\nsystem\n")), "Python objects"),
    "version 3": (
        zipped(experts__npy=npy(header("(1,)"), version=b"\x03\x00")),
        "experts is npy version (3, 0)",
    ),
    "header that is no literal": (zipped(experts__npy=npy("__import__('os')\n")), "no readable"),
    "deep header": (zipped(experts__npy=npy("(" * 9000)), "no readable npz"),
    "lzma": (zipped(zipfile.ZIP_LZMA, experts__npy=b"x"), "compressed by method 14"),
    "bomb": (zipped(experts__npy=bytes(65 * 2**20)), "legal are 67108864"),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, attack: str) -> None:
    data, message = HOSTILE[attack]
    path = tmp_path / "t.npz"
    path.write_bytes(data)

    with pytest.raises(TraceError) as caught:
        read_trace(path)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_member_given_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "t.npz", "w") as archive:
        archive.writestr("meta.npy", b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("meta.npy", b"")

    with pytest.raises(TraceError, match=r"'meta.npy' is no array of its own"):
        read_trace(tmp_path / "t.npz")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no such file"):
        read_trace(tmp_path / "none.npz")
    with pytest.raises(TraceError, match="is a directory"):
        read_trace(tmp_path)


@given(data=st.data())
@settings(deadline=None, max_examples=150)
def test_damage_is_an_error_of_ours_or_does_no_harm(
    make_trace: MakeTrace, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("damage") / "t.npz"
    write_trace(make_trace(), path)
    whole = bytearray(path.read_bytes())
    end = data.draw(st.integers(0, len(whole)))
    spots = data.draw(st.lists(st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255))))
    for spot, value in spots:
        whole[spot] = value
    path.write_bytes(bytes(whole[:end] if not spots else whole))

    with contextlib.suppress(TraceError):
        read_trace(path)


def test_a_broken_trace_is_not_written(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_trace()
    unwritable = msgspec.structs.replace(trace, meta={"x": {1, 2}})
    trace.experts[0, 0, 0] = 99

    with pytest.raises(TraceError, match=r"experts\[0, 0, 0\] is 99"):
        write_trace(trace, tmp_path / "t.npz")
    with pytest.raises(TraceError):
        write_trace(unwritable, tmp_path / "t.npz")
    with pytest.raises(TraceError, match="No such file"):
        write_trace(make_trace(), tmp_path / "nowhere" / "t.npz")
    assert list(tmp_path.iterdir()) == []

    (tmp_path / "file").touch()
    with pytest.raises(TraceError, match="Not a directory"):
        write_trace(make_trace(), tmp_path / "file" / "t.npz")
