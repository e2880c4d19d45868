"""`experts [layers, tokens, top_k]` in an npz, fed in windows with a cleared memory."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.model import ModelSpec
from moesim.traces.format import MISSING
from moesim.traces.importers import load_trace

SHARED = Path(__file__).resolve().parents[3].parent / "shared/traces"


def saved(path: Path, tokens: int, **meta: object) -> Path:
    experts = np.arange(2 * tokens).reshape(2, tokens, 1) % 7
    experts[1, 3, 0] = -1
    np.savez(
        path,
        experts=experts.astype(np.int16),
        meta=json.dumps({"model": "m", "num_experts": 7, **meta}),
        hidden=np.ones((tokens, 4)),
    )
    return path


def test_trap_10_windows_are_sequences_and_meta_says_so(tmp_path: Path) -> None:
    trace = load_trace(saved(tmp_path / "k.npz", 1100))

    assert trace.experts.shape == (1100, 2, 1)
    assert trace.experts[5, :, 0].tolist() == [5, (1100 + 5) % 7]
    assert trace.experts[3, 1, 0] == MISSING
    assert np.bincount(trace.sequence).tolist() == [512, 512, 76]
    assert trace.position[[0, 511, 512, 1099]].tolist() == [0, 511, 0, 75]
    assert not trace.phase.any()
    assert trace.meta["window"] == 512
    assert trace.meta["memory"] == "cleared before every sequence"
    assert trace.n_experts == 7


def test_the_window_is_taken_from_meta(tmp_path: Path) -> None:
    trace = load_trace(saved(tmp_path / "k.npz", 10, window=4))

    assert trace.sequence.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]


def test_trap_14_what_meta_says_of_the_run_is_kept(tmp_path: Path) -> None:
    trace = load_trace(saved(tmp_path / "k.npz", 4, sampler="greedy", quantisation="Q4_K_M"))

    assert (trace.meta["sampler"], trace.meta["quantisation"]) == ("greedy", "Q4_K_M")


def test_trap_19_the_first_token_of_a_window_is_dropped_if_asked(tmp_path: Path) -> None:
    path = saved(tmp_path / "k.npz", 10, window=4)

    kept, dropped = load_trace(path), load_trace(path, first_token="drop")

    assert kept.tokens == 10
    assert dropped.position.tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert dropped.sequence.tolist() == [0, 0, 0, 1, 1, 1, 2]
    assert dropped.experts.tolist() == kept.experts[kept.position > 0].tolist()
    with pytest.raises(TraceError, match="nothing is left without the first token"):
        load_trace(saved(path, 10, window=1), first_token="drop")


def test_the_models_layers_have_its_numbers(data: Path, spec: ModelSpec, tmp_path: Path) -> None:
    path = data / "windows.npz"

    assert load_trace(path).layer_ids.tolist() == [0, 1]
    assert load_trace(path, spec=spec).layer_ids.tolist() == [1, 2]
    np.savez(tmp_path / "k.npz", experts=np.zeros((3, 4, 1), np.int16), meta="{}")
    with pytest.raises(TraceError, match="has 3 layers; data has 2 with experts"):
        load_trace(tmp_path / "k.npz", spec=spec)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "wrong dtype": ({"experts": np.zeros((1, 4, 1), np.float32)}, "it must be int16"),
    "structured": ({"experts": np.zeros(0, [("a", "<i2")])}, "it must be int16"),
    "below -1": ({"experts": np.full((1, 4, 1), -2, np.int16)}, "experts[0, 0, 0] is -2"),
    "out of range": (
        {"experts": np.full((1, 4, 1), 9, np.int16), "meta": '{"num_experts": 8}'},
        "experts[0, 0, 0] is 9",
    ),
    "window": ({"meta": '{"window": 0}'}, "window is 0"),
    "unknown array": ({"logits": np.ones(3)}, "no array called 'logits'"),
    "two axes": ({"experts": np.zeros((4, 1), np.int16)}, "experts has shape (4, 1)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_file_is_refused(tmp_path: Path, fault: str) -> None:
    change, message = BROKEN[fault]
    good: dict[str, Any] = {"experts": np.zeros((1, 4, 1), np.int16), "meta": "{}"}
    np.savez(tmp_path / "k.npz", **(good | change))

    with pytest.raises(TraceError, match=r"^[^\n]*$") as caught:
        load_trace(tmp_path / "k.npz")

    assert message in str(caught.value)


def test_a_file_without_meta_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "k.npz", experts=np.zeros((1, 4, 1), np.int16))

    with pytest.raises(TraceError, match="array meta is missing"):
        load_trace(tmp_path / "k.npz")


@pytest.mark.skipif(not SHARED.exists(), reason="recorded traces that are not part of moesim")
def test_trap_19_first_tokens_of_recorded_windows_choose_nearly_the_same_experts() -> None:
    trace = load_trace(SHARED / "qwen3-30b-a3b-general.npz")
    starts = trace.experts[trace.position == 0]

    def overlap(a: Any, b: Any) -> float:
        return float(np.mean([len(set(x) & set(y)) / 8 for x, y in zip(a, b, strict=True)]))

    firsts = [overlap(a, b) for a, b in pairwise(starts)]
    before = trace.experts[np.flatnonzero(trace.position == 0)[1:] - 1]
    across = [overlap(a, b) for a, b in zip(before, starts[1:], strict=True)]
    assert np.mean(firsts) > 0.8
    assert np.mean(across) < 0.1
