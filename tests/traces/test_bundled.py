"""The bundled trace behaves as a trained router does, and is what its documentation says.

The bounds hold for any training by the script: they are those of published small models, widened by
what three seeds and two shapes differ by.
"""

import numpy as np
import pytest

from moesim.model import spec_from_dict, total_params
from moesim.traces.bundled import example_path
from moesim.traces.format import MISSING, Trace, read_trace
from moesim.traces.stats import lru_hits, reuse, skew
from moesim.types import DECODE


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(example_path())


def recall(trace: Trace, name: str, width: int, distance: int) -> np.ndarray:
    """Return the share of a token's experts among a guess's first `width`, by layer guessed."""
    truth, guess = trace.experts[:, distance:], trace.candidates[name][:, distance:, :width]
    found = (truth[:, :, :, None] == guess[:, :, None, :]).any(axis=-1)
    by_layer: np.ndarray = found.mean(axis=(0, 2))
    return by_layer


def test_it_is_small_and_says_what_it_is(trace: Trace) -> None:
    spec = spec_from_dict(trace.meta["spec"])

    assert example_path().stat().st_size <= 3_000_000
    assert (spec.layers, spec.experts, spec.top_k) == (8, 16, 2)
    assert round(total_params(spec) / 1e6) == 28
    assert len(set(trace.sequence.tolist())) == len(trace.meta["topics"]) >= 64
    assert len(set(trace.meta["topics"])) == 8
    assert trace.meta["importer"] == "recorder"
    assert (trace.phase == DECODE).sum() == 64 * len(trace.meta["topics"])
    assert trace.token_id is None
    assert set(trace.candidates) == {
        *("router", "wrap1"),
        *(f"{kind}{distance}" for kind in ("gate", "residual") for distance in (1, 2, 3)),
    }


def test_experts_come_again_far_more_often_than_by_chance(trace: Trace) -> None:
    by_lag = reuse(trace, [1, 8, 64])
    chance = skew(trace)["chance"]

    assert (by_lag[0] > 1.3 * chance).all()
    assert by_lag[0].mean() > 1.8 * chance.mean()
    assert by_lag.mean(axis=1).tolist() == sorted(by_lag.mean(axis=1), reverse=True)
    assert by_lag[0, 1:].mean() > 2 * 2 / 16


def test_a_quarter_of_the_experts_holds_half_of_what_is_needed(trace: Trace) -> None:
    """LRU at 25 %: .48-.53 in small trained models, .25 for random routing."""
    assert lru_hits(trace, [4]).mean() == pytest.approx(0.51, abs=0.05)


def test_load_is_balanced_in_all_and_skewed_by_topic(trace: Trace) -> None:
    topics = np.array([trace.meta["topics"][s] for s in trace.sequence])
    whole = skew(trace)["top25"].mean()
    inside = []
    for topic in set(topics):
        rows = topics == topic
        counts = [
            np.bincount(trace.experts[rows, layer].ravel(), minlength=16) for layer in range(8)
        ]
        held = -np.sort(-np.array(counts), axis=1)[:, :4]
        inside.append((held.sum(axis=1) / (2 * rows.sum())).mean())

    assert skew(trace)["entropy"].min() > 0.88
    assert np.mean(inside) > whole + 0.05


def test_guesses_are_good_and_get_worse_with_distance(trace: Trace) -> None:
    """Published for such a model .84 / .76 / .68; here .80 / .73 / .65.

    What is lacking is lacking in the first pair of layers: .48 against .63. Deeper ones agree.
    """
    gates = [recall(trace, f"gate{d}", 2, d) for d in (1, 2, 3)]
    means = [gate.mean() for gate in gates]

    assert means == pytest.approx([0.82, 0.74, 0.66], abs=0.04)
    assert gates[0][1:].mean() == pytest.approx(0.87, abs=0.04)
    assert recall(trace, "gate1", 6, 1).mean() > 0.95


def test_the_first_pair_of_layers_is_the_hardest(trace: Trace) -> None:
    first, *others = recall(trace, "gate1", 2, 1)
    assert first < min(others) - 0.1


def test_residuals_help_most_where_little_is_known(trace: Trace) -> None:
    for distance in (1, 2, 3):
        gain = recall(trace, f"residual{distance}", 2, distance) - recall(
            trace, f"gate{distance}", 2, distance
        )
        assert gain.mean() > 0
        assert gain[0] == gain.max() > 0.01


def test_the_routers_own_candidates_begin_with_its_choice(trace: Trace) -> None:
    own = trace.candidates["router"]
    assert (np.sort(own[:, :, :2]) == np.sort(trace.experts)).all()
    scores = trace.candidate_scores["router"]
    assert (np.diff(scores.astype(np.float32), axis=2) <= 0).all()


def test_the_wrapped_guess_is_better_than_chance(trace: Trace) -> None:
    decode = trace.phase == DECODE
    guess = trace.candidates["wrap1"]
    hit = (trace.experts[decode, 0, :, None] == guess[decode, 0, None, :2]).any(axis=1).mean()

    assert hit > 2 / 16
    assert (guess[~decode] == MISSING).all()
    assert (guess[:, 1:] == MISSING).all()
