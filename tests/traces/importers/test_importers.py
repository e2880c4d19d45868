"""What holds for every kind of file: golden files, round trips, counts, detection, options."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import InputError, TraceError
from moesim.model import ModelSpec
from moesim.traces.format import Trace, read_trace, write_trace
from moesim.traces.importers import IMPORTERS, import_trace, load_popularity, load_trace

Writers = dict[str, Callable[[Path, Any, int], object]]

# Three tokens in two layers, of which the last was decoded; every golden file holds these.
IDS = [[[3, 1], [0, 2]], [[5, 0], [7, 4]], [[3, 6], [2, 0]]]
GOLDEN = {
    "vllm-1.json": ("vllm", True),
    "vllm-2.json": ("vllm", True),
    "vllm-3.json": ("vllm", True),
    "vllm-shape.json": ("vllm", True),
    "sglang.json": ("sglang", True),
    "llama-rows.csv": ("llama-rows", True),
    "llama-ranks.csv": ("llama-ranks", True),
    "llama-chunks.bin": ("llama-chunks", False),
    "windows.npz": ("windows", False),
}
NAMES = ["vllm-1", "vllm-2", "vllm-3", "sglang", "sglang-tokens", "llama-rows", "llama-ranks",
         "llama-chunks", "windows"]  # fmt: skip


@pytest.mark.parametrize("name", GOLDEN)
def test_a_golden_file_is_the_same_three_tokens(data: Path, spec: ModelSpec, name: str) -> None:
    kind, phases = GOLDEN[name]

    found, trace = import_trace(data / name, spec=spec)

    assert found == kind
    assert trace.experts.tolist() == IDS
    assert trace.layer_ids.tolist() == [1, 2]
    assert trace.phase.tolist() == [0, 0, int(phases)]
    assert trace.sequence.tolist() == [0, 0, 0]
    assert trace.position.tolist() == [0, 1, 2]
    assert trace.n_experts == 8
    assert trace.meta["granularity"] == "token"
    assert trace.meta["has_rank_order"] is True
    assert trace.meta["importer"].startswith(kind)
    assert trace.meta["spec"]["name"] == spec.name


def test_a_golden_file_of_pairs_is_a_popularity(data: Path) -> None:
    found = load_popularity(data / "llama-pairs.csv", top_k=2)

    assert found.layer_ids.tolist() == [1, 2]
    assert found.counts.tolist() == [[1, 1, 0, 2, 0, 1, 1, 0], [2, 0, 2, 0, 1, 0, 0, 1]]
    assert found.granularity == "layer_order"


@given(data=st.data(), tokens=st.integers(1, 6), seed=st.integers(0, 999))
@pytest.mark.parametrize("name", NAMES)
def test_counts_are_conserved_and_what_is_imported_is_written_and_read(
    writers: Writers,
    spec: ModelSpec,
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    data: st.DataObject,
    tokens: int,
    seed: int,
) -> None:
    prompt = data.draw(st.integers(1, tokens))
    rng = np.random.default_rng(seed)
    ids = rng.permuted(np.tile(np.arange(8), (tokens, 2, 1)), axis=2)[:, :, :2]
    folder = tmp_path_factory.mktemp("import")
    writers[name](folder / "f", ids, prompt)

    trace = load_trace(folder / "f", spec=spec)
    write_trace(trace, folder / "t.npz")
    again = read_trace(folder / "t.npz")

    assert trace.experts.tolist() == ids.tolist()
    wanted = [np.bincount(ids[:, layer].ravel(), minlength=8).tolist() for layer in range(2)]
    assert load_popularity(folder / "f", spec=spec).counts.tolist() == wanted
    assert same(trace, again)
    assert same(load_trace(folder / "t.npz"), again)


def same(a: Trace, b: Trace) -> bool:
    return a.digest() == b.digest() and all(
        np.array_equal(getattr(a, name), getattr(b, name)) for name in Trace.__struct_fields__[:-1]
    )


def test_a_file_of_no_known_kind_is_answered_by_the_list(tmp_path: Path) -> None:
    unknown = {
        "text": b"a,b,c\n1,2,3\n",
        "empty": b"",
        "parquet": b"PAR1\x15\x04\x15\x00",
        "megatron": b'{"step":0,"layer":3,"top_indices":[[12,45]]}\n',
        "binary": b"\x00" * 64,
    }
    for name, content in unknown.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "eam.npy", np.zeros((2, 3, 4)))

    for name in (*unknown, "eam.npy"):
        with pytest.raises(TraceError, match=r"^[^\n]*$") as caught:
            load_trace(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: is no kind of trace")
        assert all(kind in str(caught.value) for kind in IMPORTERS)


def test_a_kind_that_is_asked_for_must_fit(data: Path, spec: ModelSpec) -> None:
    path = data / "llama-rows.csv"

    assert load_trace(path, kind="llama-rows", spec=spec).tokens == 3
    with pytest.raises(TraceError, match=r"is no file of kind vllm \(JSON"):
        load_trace(path, kind="vllm", spec=spec)
    with pytest.raises(InputError, match="no kind of trace named 'vlm'; there are: auto, moesim"):
        load_trace(path, kind="vlm")


def test_an_option_that_says_nothing_is_refused(data: Path, spec: ModelSpec) -> None:
    with pytest.raises(TraceError, match=r"--cached says nothing .* are: --experts, --top-k"):
        load_trace(data / "llama-rows.csv", spec=spec, cached="keep")
    with pytest.raises(InputError, match="Invalid enum value 'maybe'"):
        load_trace(data / "vllm-3.json", spec=spec, cached="maybe")
    with pytest.raises(InputError, match="unknown field `speed`"):
        load_trace(data / "vllm-3.json", spec=spec, speed=3)


def test_what_is_missing_is_named_with_its_option(data: Path) -> None:
    for name in ("vllm-3.json", "sglang.json"):
        with pytest.raises(TraceError, match=r"does not name its model.*takes --model"):
            load_trace(data / name)
    for name in ("llama-rows.csv", "llama-ranks.csv", "llama-chunks.bin"):
        with pytest.raises(TraceError, match="takes --experts or --model"):
            load_trace(data / name)
        assert load_trace(data / name, experts=8).n_experts == 8
    with pytest.raises(TraceError, match="say top_k or the model"):
        load_popularity(data / "llama-pairs.csv")


def test_what_is_said_twice_must_agree(data: Path, spec: ModelSpec) -> None:
    with pytest.raises(TraceError, match="experts per layer: 8, and --experts says 9"):
        load_trace(data / "llama-rows.csv", spec=spec, experts=9)
    with pytest.raises(TraceError, match="top-k: 2, and --top-k says 3"):
        load_trace(data / "llama-rows.csv", experts=8, top_k=3)
    with pytest.raises(TraceError, match="prompt: 2, and --prompt-tokens says 3"):
        load_trace(data / "vllm-3.json", spec=spec, prompt_tokens=3)


def test_less_than_a_trace_says_what_it_is_good_for(data: Path) -> None:
    with pytest.raises(TraceError, match=r"order of experts in each layer.*a popularity"):
        load_trace(data / "llama-pairs.csv")
