from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from moesim.traces.format import MISSING, Ids, Trace
from moesim.traces.importers import load_trace
from moesim.traces.predictors import guess
from moesim.traces.recall import one_by_one, recall, recalls
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import cut, steps_of

MakeTrace = Callable[..., Trace]
NONE = MISSING
SHARED = Path(__file__).resolve().parents[2].parent / "shared/traces"


def one_layer(ids: list[list[list[int]]]) -> Ids:
    """Return ids (tokens, layers, M)."""
    return np.array(ids, np.uint16)


def at(found: dict[str, Any], name: str, distance: int = 1) -> list[float | None]:
    """Return a predictor's recall by width."""
    return list(found["predictors"][name][str(distance)]["at"].values())


def test_recall_by_hand() -> None:
    truth = one_layer([[[0, 1]], [[0, 1]], [[2, NONE]], [[NONE, NONE]], [[0, 1]]])
    guessed = one_layer([[[1, 2, 0]], [[2, 3, 4]], [[1, NONE, NONE]], [[1, 2, 3]], [[NONE] * 3]])

    shares = recall(guessed, truth, [1, 2, 3])

    assert shares[:, :3, 0].tolist() == [[0.5, 0, 0], [0.5, 0, 0], [1, 0, 0]]
    assert np.isnan(shares[:, 3:]).all()
    assert (recall(truth, truth, [2])[0, :3] == 1).all()


def test_recorded_guesses_are_judged_in_decode(make_trace: MakeTrace) -> None:
    """Of 12 experts, top-2: the truth, its first half, and the first layer alone."""
    trace = make_trace((5, 4), (3, 2), layers=4, experts=12)
    truth, decode = trace.experts, (trace.phase == 1)[:, None, None]
    half = np.where(np.arange(2) == 0, truth, NONE).astype(np.uint16)
    padding = np.full((9, 4, 2), NONE, np.uint16)
    first = np.where((np.arange(4) == 0)[:, None], truth, NONE).astype(np.uint16)
    wrong = (truth + 1) % 12  # wrong in part, but for prompts only
    candidates = {
        "gate1": np.concatenate([truth, padding], axis=2),
        "gate2": half,
        "narrow": truth[:, :, :1].copy(),
        "router": np.where(decode, truth, wrong),
        "wrap1": first,
    }
    trace = msgspec.structs.replace(trace, candidates=candidates, candidate_scores={})

    found = recalls(trace)

    assert (found["tokens"], found["phase"]) == (4, "decode")
    assert found["widths"] == [2, 3, 4, 6]
    assert found["chance"] == {"2": 0.1667, "3": 0.25, "4": 0.3333, "6": 0.5}
    assert found["router"] == 1.0
    assert at(found, "gate") == [1, 1, 1, None]
    assert at(found, "gate", 2) == [0.5, None, None, None]
    assert at(found, "narrow") == [None] * 4
    assert found["predictors"]["narrow"]["1"]["by_layer"] == [None] * 4
    assert at(found, "wrap") == [1, None, None, None]
    assert found["predictors"]["wrap"]["1"]["by_layer"] == [1, None, None, None]
    assert msgspec.json.decode(msgspec.json.encode(found)) == found


def test_derived_guesses_are_judged_in_decode_by_hand() -> None:
    """Expert 0, 0, 1 in layer 0; one less each in layer 1. The first token is the prompt."""
    trace = Trace(
        experts=one_layer([[[1], [0]], [[1], [0]], [[2], [1]]]),
        layer_ids=np.arange(2, dtype=np.int32),
        phase=np.array([0, 1, 1], np.uint8),
        sequence=np.zeros(3, np.int32),
        position=np.arange(3, dtype=np.int32),
        meta={"num_experts": 8},
    )

    found = recalls(trace)

    assert found["tokens"] == 2
    assert found["router"] is None
    assert found["predictors"]["previous"]["1"]["by_layer"] == [0.5, 0.5]
    assert at(found, "previous") == [0.5, None, None]
    assert at(found, "popularity") == [0.5, 0.5, 0.5]
    assert found["predictors"]["transition"]["1"]["by_layer"] == [None, 1]  # none after 2
    assert at(found, "transition", 2) == [None] * 3
    assert at(found, "activation") == [None] * 3  # there is no past sequence
    assert found["left_out"].keys() == {"popularity-offline", "transition-offline"}


def test_sequences_are_served_one_after_another(make_trace: MakeTrace) -> None:
    trace = make_trace((5, 3, 4), (3, 2, 1))
    steps = one_by_one(trace)

    row = step = 0
    for number in range(3):
        alone = steps_of(cut(trace, start=number))
        rows, passes = slice(row, row + len(alone.rows)), slice(step, step + len(alone.phase))
        assert (steps.rows[rows] == alone.rows).all()
        assert (steps.sequence[rows] == number).all()
        assert (steps.phase[passes] == alone.phase).all()
        assert (steps.offset[passes] - row == alone.offset).all()
        assert (steps.context[passes] == alone.context).all()
        assert (steps.kept[passes] == alone.kept).all()
        assert (steps.sequences[passes] == alone.sequences).all()
        row, step = rows.stop, passes.stop
    assert (row, step) == (len(steps.rows), len(steps.phase))
    assert one_by_one(trace, first=1, stride=2).rows.tolist() == [5, 6, 7]


def test_without_decode_rows_each_token_is_a_step(make_trace: MakeTrace) -> None:
    trace = make_trace((5, 3), (5, 3), full=False)
    steps = one_by_one(trace)
    found = recalls(trace)
    ids, _ = guess(trace, steps, "previous", 1, 2)

    assert np.diff(steps.offset).ravel().tolist() == [1] * 8
    assert (ids[[0, 5]] == NONE).all()
    assert (ids[1:5] == trace.experts[:4]).all()
    assert (found["tokens"], found["phase"]) == (8, "prefill")


def test_much_is_judged_by_its_first_sequences(
    make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = (6, 5, 9)
    trace = make_trace(lengths, (2, 3, 1), full=False)
    rng = np.random.default_rng(0)
    mixed = np.argsort(rng.permuted(trace.sequence), kind="stable")  # sequences interleave
    slots = np.empty_like(mixed)
    slots[mixed] = np.arange(len(mixed))
    interleaved = msgspec.structs.replace(
        trace,
        experts=trace.experts[slots],
        phase=trace.phase[slots],
        sequence=trace.sequence[slots],
        position=trace.position[slots],
    )

    monkeypatch.setattr("moesim.traces.recall.MOST_TOKENS", 6)
    assert recalls(trace)["tokens"] == 6
    assert recalls(interleaved)["tokens"] == 6
    monkeypatch.setattr("moesim.traces.recall.MOST_CELLS", 7 * 3 * 6)
    assert recalls(trace)["tokens"] == 4


def test_a_noisy_guess_has_the_recall_it_was_made_with() -> None:
    trace = synthesize("qwen3-30b", layers=6, sequences=2, prompt=60, generate=90, distances=0)
    steps = one_by_one(trace)
    ids, _ = guess(trace, steps, "noisy-oracle", 1, 24, recall=0.8)
    guesses = np.empty_like(ids)
    guesses[steps.rows] = ids

    found = recalls(msgspec.structs.replace(trace, candidates={"noise": guesses}))

    recall_8, *wider = at(found, "noise")
    assert recall_8 == pytest.approx(0.8, abs=0.02)
    assert wider == sorted(wider, key=float)  # type: ignore[arg-type]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the recorded traces")
@pytest.mark.parametrize(
    ("text", "previous", "popularity", "transition"),
    [("general", 0.446, 0.296, 0.584), ("code", 0.474, 0.430, 0.629)],
)
def test_recorded_traces_have_about_their_published_recall(
    text: str, previous: float, popularity: float, transition: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Published: popularity and co-occurrence of 8,000 tokens, in a way not told.

    Ours learn as they go, from 2,000 at most, and transition adds up counts, as Klotski does: a
    likelihood (a naive Bayes classifier) from the same pairs names a tenth more.
    """
    monkeypatch.setattr("moesim.traces.recall.DISTANCES", (1,))
    found = recalls(load_trace(SHARED / f"qwen3-30b-a3b-{text}.npz"))
    by_name = {name: at(found, name)[0] for name in found["predictors"]}

    assert by_name["previous"] == pytest.approx(previous, abs=0.015)
    assert by_name["popularity"] == pytest.approx(popularity, abs=0.03)
    assert popularity + 0.05 < by_name["transition"] < transition  # type: ignore[operator]
    assert by_name["transition-offline"] < by_name["transition"]  # type: ignore[operator]
