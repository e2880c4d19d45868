from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.traces.format import MISSING, Trace
from moesim.traces.predictors import DERIVED, OFFLINE, SEES_FUTURE, guess, resolve
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import Steps, cut, steps_of

MakeTrace = Callable[..., Trace]
NONE = MISSING


AT_ONCE = {"popularity", "popularity-offline", "previous"}
"""Derived guesses that are made before the step, and so for all of its layers at once."""


def of(*sequences: list[list[list[int]]]) -> Trace:
    """Return a trace of sequences of these ids [token][layer][rank], of 4 experts; one prompt."""
    lengths = [len(ids) for ids in sequences]
    experts = np.concatenate([np.array(ids, np.uint16) for ids in sequences])
    position = np.concatenate([np.arange(n) for n in lengths])
    return Trace(
        experts=experts,
        layer_ids=np.arange(experts.shape[1], dtype=np.int32),
        phase=(position > 0).astype(np.uint8),
        sequence=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
        position=position.astype(np.int32),
        meta={"num_experts": 4},
    )


def one_sequence(ids: list[list[list[int]]], prompt: int) -> tuple[Trace, Steps]:
    """Return a trace of one sequence with these ids [token][layer][rank], of 4 experts."""
    experts = np.array(ids, np.uint16)
    tokens, layers, _ = experts.shape
    trace = Trace(
        experts=experts,
        layer_ids=np.arange(layers, dtype=np.int32),
        phase=(np.arange(tokens) >= prompt).astype(np.uint8),
        sequence=np.zeros(tokens, np.int32),
        position=np.arange(tokens, dtype=np.int32),
        meta={"num_experts": 4},
    )
    return trace, steps_of(cut(trace))


def test_transition_by_hand() -> None:
    """Layer 0 chose 0 and 1, then layer 1 chose 2 and 3; then 0, 2 -> 2, 1; then 0, 3."""
    trace, steps = one_sequence(
        [[[0, 1], [2, 3]], [[0, 2], [2, 1]], [[0, 3], [0, 1]], [[3, 2], [0, 1]]], prompt=1
    )

    ids, scores = guess(trace, steps, "transition", 1, 3)

    assert ids[:, 0].tolist() == [[NONE] * 3] * 4
    assert ids[:, 1].tolist() == [
        [NONE, NONE, NONE],  # nothing is known before the first step is over
        [2, 3, NONE],  # 0 was followed by 2 and 3, 2 by nothing yet
        [2, 1, 3],  # 0 by 2, 2, 3, 1; 1 and 3 tie, the lower id first
        [1, 0, 2],  # 3 by 0, 1; 2 by 2, 1
    ]
    assert scores is not None
    assert scores[:, 1].tolist() == [[0, 0, 0], [1, 1, 0], [2, 1, 1], [2, 1, 1]]


def test_transition_skips_layers_and_what_is_missing() -> None:
    trace, steps = one_sequence(
        [[[0, 1], [2, 3], [3, NONE]], [[1, NONE], [0, 1], [0, 1]], [[2, 3], [0, 1], [0, 2]]],
        prompt=1,
    )

    ids, _ = guess(trace, steps, "transition", 2, 2)
    too_far, _ = guess(trace, steps, "transition", 3, 2)

    assert (ids[:, :2] == NONE).all()
    assert ids[:, 2].tolist() == [[NONE, NONE], [3, NONE], [NONE, NONE]]
    assert (too_far == NONE).all()


def test_previous_and_popularity_by_hand() -> None:
    trace, steps = one_sequence([[[0, 1]], [[2, 0]], [[2, 3]], [[2, 1]]], prompt=2)

    previous, _ = guess(trace, steps, "previous", 1, 3)
    popularity, counts = guess(trace, steps, "popularity", 1, 2)

    assert previous[:, 0].tolist() == [[NONE] * 3, [NONE] * 3, [2, 0, NONE], [2, 3, NONE]]
    assert popularity[:, 0].tolist() == [[NONE] * 2, [NONE] * 2, [0, 1], [0, 2]]
    assert counts is not None
    assert counts[:, 0].tolist() == [[0, 0], [0, 0], [2, 1], [2, 2]]


def test_offline_ones_learn_from_the_other_sequences() -> None:
    """0 was followed by 2, 3, 2 and 1, and 3 by 0 and 1."""
    others = ([[[0, 1], [2, 3]], [[0, 2], [2, 1]]], [[[3, 2], [0, 1]]])
    trace = of([[[0, 3], [1, 0]], [[0, 3], [1, 0]]], *others)
    steps = steps_of(cut(trace))

    transition, followers = guess(trace, steps, "transition-offline", 1, 3)
    popularity, counts = guess(trace, steps, "popularity-offline", 1, 3)

    assert followers is not None
    assert counts is not None
    assert transition.tolist() == [[[NONE] * 3, [1, 2, 0]]] * 2
    assert followers[:, 1].tolist() == [[2, 2, 1]] * 2
    assert popularity.tolist() == [[[0, 2, 1], [1, 2, 0]]] * 2
    assert counts[0].tolist() == [[2, 2, 1], [2, 2, 1]]


@pytest.mark.parametrize("name", sorted(OFFLINE))
def test_offline_ones_learn_nothing_from_what_is_served(make_trace: MakeTrace, name: str) -> None:
    trace = make_trace((9, 8, 7), (3, 3, 3))
    start = cut(trace, prompt=2, generate=3)  # the first 4 of 9 rows
    changed = trace.experts.copy()
    changed[4:9] ^= 1  # the rest of the same text is unknown, too
    other = msgspec.structs.replace(trace, experts=changed)
    ids, _ = guess(trace, steps_of(start), name, 1, 6)

    assert (guess(other, steps_of(start), name, 1, 6)[0] == ids).all()
    assert not (ids == NONE).all()
    with pytest.raises(TraceError, match=f"'{name}' learns from .* serve fewer, or take '"):
        guess(trace, steps_of(cut(trace, batch=3)), name, 1, 6)


def test_activation_by_hand() -> None:
    """Two past sequences agree on layer 0, where the first in the file wins, and part at layer 1.

    The 2 in layer 0 of the second token is like neither.
    """
    past = [[[0], [1], [2]], [[0], [1], [3]], [[0], [1], [3]]], [[[0], [3], [0]]]
    trace = of([[[0], [3], [2]], [[2], [3], [1]]], *past)
    steps = steps_of(cut(trace))

    ids, scores = guess(trace, steps, "activation", 1, 2)
    further, lower = guess(trace, steps, "activation", 2, 2)

    assert scores is not None
    assert lower is not None
    assert ids.tolist() == [[[NONE, NONE], [1, NONE], [0, NONE]]] * 2
    assert scores[:, 1:] == pytest.approx(np.array([[[2 / 3, 0], [2 / 3, 0]]] * 2))
    assert further[:, 2].tolist() == [[3, 2]] * 2
    assert lower[:, 2] == pytest.approx(np.array([[2 / 9, 1 / 9]] * 2))
    assert (guess(trace, steps, "activation", 3, 2)[0] == NONE).all()


def test_activation_compares_all_layers_up_to_this_one() -> None:
    """The first past sequence is alike in layer 1 (1 in all), the second in both (1 + .71)."""
    past = [[[2], [3], [0]]], [[[0], [3], [1]], [[0], [1], [1]]]
    trace = of([[[0], [3], [2]]], *past)
    ids, _ = guess(trace, steps_of(cut(trace)), "activation", 1, 1)

    assert ids[0, 2, 0] == 1


def test_activation_counts_what_the_sequence_did_before() -> None:
    """Of layer 0, (0 0 1) is more like 0 than like 1; its last token alone is not."""
    trace = of([[[0], [0]], [[0], [0]], [[1], [0]]], [[[0], [2]]], [[[1], [3]]])
    ids, _ = guess(trace, steps_of(cut(trace)), "activation", 1, 1)

    assert ids[:, 1, 0].tolist() == [2, 2, 2]


def test_activation_remembers_sequences_of_the_run_when_they_end() -> None:
    trace = of([[[0], [1]], [[0], [2]]], [[[3], [3]], [[0], [2]], [[0], [1]], [[3], [0]]])
    steps = steps_of(cut(trace, batch=2))

    ids, _ = guess(trace, steps, "activation", 1, 2)
    by_sequence = [ids[steps.sequence == i, 1].tolist() for i in (0, 1)]

    assert by_sequence == [[[NONE] * 2] * 2, [[NONE] * 2] * 2 + [[1, 2]] * 2]


def test_activation_forgets_the_most_similar(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = of([[[0], [0]]], [[[0], [1]]], [[[3], [2]]], [[[0], [3]]])
    steps = steps_of(cut(trace))

    assert guess(trace, steps, "activation", 1, 1)[0][0, 1, 0] == 1
    monkeypatch.setattr("moesim.traces.predictors.MOST_MATRICES", 2)
    assert guess(trace, steps, "activation", 1, 1)[0][0, 1, 0] == 3


def test_previous_stays_inside_the_sequence(make_trace: MakeTrace) -> None:
    trace = make_trace((5, 3, 4), (3, 2, 2))
    steps = steps_of(cut(trace, batch=3), batches=2)

    ids, _ = guess(trace, steps, "previous", 1, 2)

    decode = steps.offset[0, -1]
    assert (ids[:decode] == NONE).all()
    assert (ids[decode:] == trace.experts[steps.rows[decode:] - 1]).all()


def test_recorded_guesses_are_cut_padded_and_reordered(make_trace: MakeTrace) -> None:
    trace = make_trace((5, 3), (3, 2))  # 3 candidates
    trace.candidates["gate1"][:, 0] = NONE
    steps = steps_of(cut(trace, batch=2))

    narrow, scores = guess(trace, steps, "gate1", 1, 2)
    wide, wide_scores = guess(trace, steps, "gate1", 1, 5)
    unscored = msgspec.structs.replace(trace, candidate_scores={})

    assert scores is not None
    assert wide_scores is not None
    assert (narrow == trace.candidates["gate1"][steps.rows, :, :2]).all()
    assert (scores[:, 1:] == trace.candidate_scores["gate1"][steps.rows, 1:, :2]).all()
    assert (wide[:, :, 3:] == NONE).all()
    assert (wide_scores[wide == NONE] == 0).all()
    assert guess(unscored, steps, "gate1", 1, 2)[1] is None


def test_the_oracle_tells_the_truth(make_trace: MakeTrace) -> None:
    trace = make_trace()
    steps = steps_of(cut(trace, batch=2))

    ids, scores = guess(trace, steps, "oracle", 1, 3)
    noisy, _ = guess(trace, steps, "noisy-oracle", 1, 2, recall=1.0)

    assert scores is None
    assert (ids[:, :, :2] == trace.experts[steps.rows]).all()
    assert (ids[:, :, 2] == NONE).all()
    assert (noisy == trace.experts[steps.rows]).all()


@pytest.mark.parametrize("recall", [0.5, 0.8, 0.95])
def test_the_noisy_oracle_has_the_recall_asked_for(recall: float) -> None:
    trace = synthesize("qwen3-30b", layers=12, sequences=1, prompt=200, generate=1, distances=0)
    steps = steps_of(cut(trace))

    ids, scores = guess(trace, steps, "noisy-oracle", 1, 8, recall=recall, seed=3)
    again, _ = guess(trace, steps, "noisy-oracle", 1, 8, recall=recall, seed=3)
    other, _ = guess(trace, steps, "noisy-oracle", 1, 8, recall=recall, seed=4)
    truth = trace.experts[steps.rows]
    found = (ids[..., None] == truth[..., None, :]).any(axis=2)

    assert found.mean() == pytest.approx(recall, abs=0.01)
    assert found[..., 0].mean() > found[..., -1].mean() + 0.05  # it errs where margins are thin
    assert (ids == again).all()
    assert (ids != other).any()
    assert scores is not None
    assert (np.diff(scores, axis=2) <= 0).all()


def test_the_noisy_oracle_keeps_to_what_is_recorded() -> None:
    trace, steps = one_sequence([[[3, NONE]], [[NONE, NONE]], [[1, 2]]], prompt=1)

    ids, _ = guess(trace, steps, "noisy-oracle", 1, 4, recall=1.0)

    assert ids[0, 0, 0] == 3
    assert ids[2, 0, :2].tolist() == [1, 2]
    assert all(sorted(row) == [0, 1, 2, 3] for row in ids[:, 0].tolist())


@pytest.mark.parametrize("name", sorted(set(DERIVED) - SEES_FUTURE))
def test_no_derived_guess_sees_what_is_not_known_yet(make_trace: MakeTrace, name: str) -> None:
    trace = make_trace((7, 5, 6, 8), (3, 3, 2, 4), seed=1)
    steps = steps_of(cut(trace, batch=2), batches=2)
    for distance in (1, 2):
        ids, _ = guess(trace, steps, name, distance, 6)
        for step in range(len(steps.phase)):
            start, end = steps.offset[step, 0], steps.offset[step, -1]
            for layer in range(trace.layers):  # whose choice, and all after it, is another
                changed = trace.experts.copy()
                changed[steps.rows[end:]] = changed[steps.rows[end:]][:, :, ::-1] ^ 1
                changed[steps.rows[start:end], layer:] ^= 1
                other = msgspec.structs.replace(trace, experts=changed)
                found, _ = guess(other, steps, name, distance, 6)
                made = None if name in AT_ONCE else layer + distance
                assert (found[:start] == ids[:start]).all()
                assert (found[start:end, :made] == ids[start:end, :made]).all()


@pytest.mark.parametrize("name", ["gate1", *DERIVED])
def test_guesses_have_one_shape(make_trace: MakeTrace, name: str) -> None:
    trace = make_trace((4, 3, 5), (2, 2, 3))
    steps = steps_of(cut(trace, batch=2))

    for width in (1, 2, 9):
        ids, scores = guess(trace, steps, name, 1, width)
        ordered = np.sort(ids, axis=2)
        twice = (ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] != NONE)

        assert ids.shape == (7, 3, width)
        assert ids.dtype == np.uint16
        assert ((ids < 6) | (ids == NONE)).all()
        assert not twice.any()
        assert scores is None or (scores.shape == ids.shape and scores.dtype == np.float32)


def test_names_are_resolved(make_trace: MakeTrace) -> None:
    trace = make_trace()
    gate = trace.candidates["gate1"]
    rich = msgspec.structs.replace(
        trace, candidates={"gate1": gate, "gate3": gate, "residual1": gate, "router": gate}
    )

    assert resolve(trace, "auto", 1) == "gate1"
    assert resolve(rich, "auto", 1) == "residual1"
    assert resolve(rich, "auto", 3) == "gate3"
    assert resolve(trace, "auto", 2) == "transition"
    assert resolve(rich, "gate3", 2) == "gate3"
    assert resolve(trace, "oracle", 2) == "oracle"
    with pytest.raises(TraceError, match="no predictor 'gate2'; there are: gate1, activation, noi"):
        resolve(trace, "gate2", 2)
    with pytest.raises(TraceError, match="guesses 1 layers ahead; 2 were asked for"):
        resolve(trace, "gate1", 2)
    with pytest.raises(TraceError, match="no predictor 'router'"):
        resolve(rich, "router", 1)


def test_the_first_layer_alone_has_a_guess_from_the_token_before(make_trace: MakeTrace) -> None:
    trace = make_trace()
    wrap = np.full_like(trace.candidates["gate1"], NONE)
    wrap[3:5, 0] = trace.candidates["gate1"][3:5, 0]
    trace = msgspec.structs.replace(trace, candidates={"wrap1": wrap}, candidate_scores={})
    steps = steps_of(cut(trace, batch=2))

    ids, _ = guess(trace, steps, "wrap1", 1, 3)

    assert (ids == wrap[steps.rows]).all()
    assert resolve(trace, "auto", 1) == "transition"  # which guesses more than one layer
    with pytest.raises(TraceError, match="guesses 1 layers ahead; 2 were asked for"):
        resolve(trace, "wrap1", 2)


def test_bad_requests_are_refused(make_trace: MakeTrace, monkeypatch: pytest.MonkeyPatch) -> None:
    trace = make_trace()
    steps = steps_of(cut(trace, batch=2))
    huge = msgspec.structs.replace(trace, meta={"num_experts": 60_000})

    with pytest.raises(TraceError, match="must both be at least 1"):
        guess(trace, steps, "oracle", 1, 0)
    with pytest.raises(TraceError, match=r"recall of 1\.5 is impossible"):
        guess(trace, steps, "noisy-oracle", 1, 2, recall=1.5)
    with pytest.raises(TraceError, match="too large"):
        guess(huge, steps, "transition", 1, 2)
    monkeypatch.setattr("moesim.traces.predictors._MOST_CELLS", 700_000)
    with pytest.raises(TraceError, match=r"4 matrices of 3 layers x 60000 experts, .* too large"):
        guess(huge, steps, "activation", 1, 2)


@pytest.mark.parametrize("name", ["activation", "transition", "transition-offline"])
def test_before_the_gate_nothing_is_known_of_its_choice(make_trace: MakeTrace, name: str) -> None:
    trace = msgspec.structs.replace(make_trace(), candidates={}, candidate_scores={})

    assert resolve(trace, "auto", 1, after_gate=True) == "transition"
    assert resolve(trace, "auto", 1, after_gate=False) == "popularity"
    assert resolve(trace, name, 1) == name
    with pytest.raises(TraceError, match=f"'{name}' needs the layer's choice and cannot guess"):
        resolve(trace, name, 1, after_gate=False)
