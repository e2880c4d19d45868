"""Trap 22: whatever a file holds, the end is a trace or one line, and no more memory than that."""

import json
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import TraceError
from moesim.model import ModelSpec
from moesim.traces.importers import load_popularity, load_trace, source

GOLDEN = ["vllm-1.json", "vllm-2.json", "vllm-3.json", "vllm-shape.json", "sglang.json",
          "llama-rows.csv", "llama-ranks.csv", "llama-chunks.bin", "llama-pairs.csv",
          "windows.npz", "tokens.pt"]  # fmt: skip
Writers = dict[str, Callable[[Path, Any, int], object]]


def complaint(load: Callable[..., object], path: Path, **options: Any) -> str:
    """Return what a reader says of a file, nothing if it reads it."""
    try:
        load(path, **options)
    except TraceError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", GOLDEN)
@given(draw=st.data())
def test_trap_22_damage_is_one_line_or_does_no_harm(
    data: Path,
    spec: ModelSpec,
    writers: Writers,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    draw: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("damage") / "f"
    if name == "tokens.pt":
        writers["sglang-tokens"](path, np.tile(np.arange(2), (3, 2, 1)), 2)
    else:
        path.write_bytes((data / name).read_bytes())
    whole = bytearray(path.read_bytes())
    end = draw.draw(st.integers(0, len(whole)))
    byte = st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255))
    spots = draw.draw(st.lists(byte, max_size=4))
    for spot, value in spots:
        whole[spot] = value
    path.write_bytes(bytes(whole[:end] if not spots else whole))

    for load in (load_trace, load_popularity):
        line = complaint(load, path, spec=spec)
        assert line == "" or (line.startswith(f"{path}: ") and "\n" not in line)


@given(content=st.binary(max_size=80) | st.text(max_size=80).map(str.encode))
def test_trap_22_any_bytes_are_one_line_or_a_trace(
    tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec, content: bytes
) -> None:
    path = tmp_path_factory.mktemp("bytes") / "f"
    path.write_bytes(content)

    assert "\n" not in complaint(load_trace, path, spec=spec)


KEYS = ["choices", "outputs", "usage", "routed_experts", "prompt_routed_experts", "token_ids",
        "prompt_token_ids", "prompt_tokens", "completion_tokens", "meta_info", "shape", "data",
        "model", "prompt_tokens_details", "cached_tokens"]  # fmt: skip
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(document=JSON)
def test_trap_22_any_json_is_one_line_or_a_trace(
    tmp_path_factory: pytest.TempPathFactory, spec: ModelSpec, document: object
) -> None:
    path = tmp_path_factory.mktemp("json") / "f"
    path.write_text(json.dumps(document))

    line = complaint(load_trace, path, spec=spec, prompt_tokens=1)

    assert "no readable" not in line  # every shape of JSON has a line of its own
    assert "\n" not in line


def test_trap_22_deep_nesting_is_one_line(tmp_path: Path, spec: ModelSpec) -> None:
    path = tmp_path / "f"
    for deep in ("[" * 200_000, '{"a":' * 200_000, '{"choices":' + "[" * 200_000):
        path.write_text(deep)
        with pytest.raises(TraceError, match="is JSON nested too deeply"):
            load_trace(path, spec=spec)


def test_trap_22_json_beyond_the_bound_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "MAX_JSON_BYTES", 10)
    (tmp_path / "f").write_text('{"choices":[]}')

    with pytest.raises(TraceError, match="has 14 bytes; JSON is read up to 10"):
        load_trace(tmp_path / "f")


def hostile(path: Path) -> dict[str, Path]:
    """Return files of a megabyte that would like to be much more, by name."""
    files = {name: path / name for name in ("dicts", "lists", "rows", "word", "zip")}
    files["dicts"].write_text("[" + ",".join(["{}"] * 300_000) + "]")
    files["lists"].write_text('{"choices":[{"routed_experts":[' + "[]," * 300_000 + "[]]}]}")
    files["rows"].write_text("\n".join(f"-1,{i % 1000},0" for i in range(100_000)))
    ids = ["1"] * 100_000 + ["x" * 500_000]  # as an array of words: 200 GB
    files["word"].write_text(json.dumps({"choices": [{"routed_experts": [[ids]]}]}))
    with zipfile.ZipFile(files["zip"], "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("routed_experts.npy", bytes(400 << 20))
    return files


def test_trap_22_no_file_takes_more_than_a_factor_of_its_size(
    tmp_path: Path, spec: ModelSpec
) -> None:
    for name, path in hostile(tmp_path).items():
        tracemalloc.start()
        with pytest.raises(TraceError):
            load_trace(path, spec=spec)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()

        assert peak_bytes < 100 * path.stat().st_size + (1 << 20), name


def test_a_folder_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="is a directory"):
        load_trace(tmp_path)
    with pytest.raises(TraceError, match="no such file"):
        load_trace(tmp_path / "none")
