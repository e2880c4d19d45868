"""What a policy may learn beforehand: the part of the trace that is not replayed, and no more."""

from typing import Any

import msgspec
import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.policies.api import Offline, Prediction, Setting
from moesim.policies.registry import Chosen, choose
from moesim.policies.testing import make_model, quiet_machine
from moesim.run import Prepared, prepare
from moesim.traces.format import MISSING, Trace
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import cut


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Return 3 sequences of 4 + 5 rows, 3 layers of 8 experts, top 2, with guesses gate1."""
    return synthesize(
        layers=3, experts=8, top_k=2, sequences=3, prompt=4, generate=6, distances=1, seed=2
    )


def prepared(trace: Trace, spec: str | Chosen = "static", **workload: Any) -> Prepared:
    chosen = choose(spec) if isinstance(spec, str) else spec
    model = make_model(trace.layers, trace.n_experts, trace.top_k)
    return prepare(
        trace, cut(trace, **workload), model, quiet_machine(), chosen, budget_bytes=1 << 20
    )


def offline(trace: Trace, prediction: Prediction | None = None, **workload: Any) -> Offline:
    return prepared(trace, **workload).setting.offline(prediction)


def test_it_is_what_is_not_replayed_in_the_order_of_its_sequences(trace: Trace) -> None:
    found = offline(trace, start=1)
    others = trace.sequence != trace.sequence[np.unique(trace.sequence, return_index=True)[1][1]]
    assert (found.ids == trace.experts[others].astype(int)).all()
    assert (found.sequence == trace.sequence[others]).all()
    assert found.guesses.size == 0


@pytest.mark.parametrize("lengths", [{"generate": 2}, {"prompt": 3, "generate": 2}])
def test_what_follows_in_a_sequence_that_is_cut_off_is_not_seen(
    trace: Trace, lengths: dict[str, Any]
) -> None:
    """Sequence 0 is cut after 5 or 4 of its 9 rows; the others are seen whole, and counted."""
    setting = prepared(trace, **lengths).setting
    others = trace.sequence != 0
    ids = trace.experts[others].astype(int)
    assert (setting.offline().ids == ids).all()
    assert (setting.offline().sequence == trace.sequence[others]).all()
    counts = [np.bincount(ids[:, layer].ravel(), minlength=8) for layer in range(3)]
    assert (setting.popularity == counts).all()


def test_if_every_sequence_is_cut_off_the_rest_is_all_there_is(trace: Trace) -> None:
    """Windows of 3 + 1 rows of every sequence: its other 5 rows remain."""
    found = offline(trace, batch=3, prompt=3, generate=2)
    assert np.bincount(found.sequence).tolist() == [5, 5, 5]
    rows = np.concatenate([np.flatnonzero(trace.sequence == s)[4:] for s in range(3)])
    assert (found.ids == trace.experts[rows].astype(int)).all()


def test_of_nothing_nothing_is_seen(trace: Trace) -> None:
    found = offline(trace, Prediction("gate1"), batch=3)
    assert len(found.ids) == len(found.sequence) == len(found.guesses) == 0


def test_recorded_guesses_are_those_of_the_rows(trace: Trace) -> None:
    found = offline(trace, Prediction("auto", after_gate=False, width=3))
    rest = trace.sequence != 0
    recorded = trace.candidates["gate1"][rest][:, :, :3].astype(int)
    assert (found.guesses == np.where(recorded == MISSING, -1, recorded)).all()


@pytest.mark.parametrize("name", ["popularity-offline", "transition-offline", "activation"])
def test_nothing_of_what_is_replayed_is_learned_from(trace: Trace, name: str) -> None:
    """Other choices of the sequence that is replayed leave everything as it is."""
    other = trace.experts.copy()
    mine = trace.sequence == 0
    other[mine] = (other[mine] + 1) % 8
    changed = msgspec.structs.replace(trace, experts=other)
    first, second = (offline(of, Prediction(name)) for of in (trace, changed))
    for before, after in zip(first, second, strict=True):
        assert (before == after).all()
    assert (first.guesses >= 0).any()


def test_a_guess_that_cannot_be_is_refused(trace: Trace) -> None:
    with pytest.raises(TraceError, match="cannot guess before the gate"):
        offline(trace, Prediction("transition", after_gate=False))
    with pytest.raises(TraceError, match="no predictor 'crystal'"):
        offline(trace, Prediction("crystal"))


class Wrapping:
    """Guesses, with or without those for the first layer of the next step."""

    @staticmethod
    def of(wraps: bool) -> Chosen:
        static: Any = choose("static").cls

        class Guessing(static):  # type: ignore[misc]
            @classmethod
            def new(cls, setting: Setting) -> Any:
                return cls(*static.new(setting))

            def place(self, setting: Setting) -> Any:
                prediction = Prediction("auto", after_gate=False, wraps=wraps)
                return msgspec.structs.replace(super().place(setting), predictions=(prediction,))

        return Chosen("guessing", Guessing, {})


def test_guesses_for_the_next_step_come_from_wrap1(trace: Trace) -> None:
    """gate1 leaves layer 0 out; with `wraps` it has what wrap1 recorded, and only there."""
    wrapped = np.full_like(trace.candidates["gate1"], MISSING)
    wrapped[:, 0, :2] = 7, 5
    with_wrap = msgspec.structs.replace(
        trace, candidates={**trace.candidates, "wrap1": wrapped}, candidate_scores={}
    )
    plain, both = (
        prepared(with_wrap, Wrapping.of(wraps)).feed.guesses[0][0] for wraps in (False, True)
    )
    assert (plain[:, 0] == -1).all()
    assert (both[:, 0] == [7, 5]).all()
    assert (both[:, 1:] == plain[:, 1:]).all()
    assert (prepared(trace, Wrapping.of(True)).feed.guesses[0][0] == plain).all()
