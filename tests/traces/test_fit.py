import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from moesim.cli.trace import command
from moesim.errors import MoesimError, TraceError
from moesim.traces import fit as fit_module
from moesim.traces.fit import Comparison, Fitted, compare, copy, fit
from moesim.traces.format import MISSING, Trace, check, read_trace, rows_by_sequence, write_trace
from moesim.traces.importers import load_trace
from moesim.traces.recall import recall
from moesim.traces.stats import LAGS, SPANS, active, lru_hits, popularity, reuse
from moesim.traces.synthetic import synthesize
from moesim.types import FloatArray

MakeTrace = Callable[..., Trace]

SHARED = Path(__file__).resolve().parents[2].parent / "shared/traces"

needs_recorded = pytest.mark.skipif(not SHARED.is_dir(), reason="needs the recorded traces")

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def spoken() -> Trace:
    """Many short sequences about several topics, with predictors, as a small model gives them."""
    return synthesize(
        "phi-3.5",
        layers=6,
        sequences=64,
        prompt=60,
        generate=41,
        domains=5,
        recall=0.85,
        residual_recall=0.9,
        distances=2,
        seed=5,
    )


def made_of(ids: np.ndarray, lengths: list[int], experts: int, **more: object) -> Trace:
    """Return a trace of given ids (tokens, layers, top_k) in sequences of given lengths."""
    tokens, layers, _ = ids.shape
    return Trace(
        experts=ids.astype(np.uint16),
        layer_ids=np.arange(layers, dtype=np.int32),
        phase=np.zeros(tokens, np.uint8),
        sequence=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        position=np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        meta={"num_experts": experts},
        **more,  # type: ignore[arg-type]
    )


def by_name(comparisons: list[Comparison]) -> dict[tuple[str, str], tuple[float, float]]:
    return {
        (statistic, of): (one, other)
        for statistic, of, one, other in comparisons
        if one is not None and other is not None
    }


@cache
def recorded(name: str, stride: int) -> tuple[Trace, Fitted]:
    """Return a recorded trace of every `stride`-th of its layers, and its fit."""
    whole = load_trace(SHARED / f"qwen3-30b-a3b-{name}.npz")
    trace = msgspec.structs.replace(
        whole,
        experts=np.ascontiguousarray(whole.experts[:, ::stride]),
        layer_ids=whole.layer_ids[::stride],
    )
    return trace, fit(trace)


@cache
def recorded_statistics(name: str, stride: int) -> list[FloatArray]:
    return statistics(recorded(name, stride)[0])


def statistics(trace: Trace) -> list[FloatArray]:
    return [reuse(trace, LAGS), lru_hits(trace, [8, 16, 32, 64]), active(trace, SPANS)]


@needs_recorded
@pytest.mark.parametrize(
    ("name", "stride", "seed"),
    [("general", 1, 0), ("general", 2, 1), ("general", 2, 2), ("code", 3, 0)],
)
def test_a_copy_is_as_local_as_the_recorded_trace(name: str, stride: int, seed: int) -> None:
    """Bounds in share of experts, those of the last row relative; the second by layer."""
    _, fitted = recorded(name, stride)

    for wanted, found, mean, by_layer in zip(
        recorded_statistics(name, stride),
        statistics(copy(fitted, seed=seed)),
        (0.015, 0.015, 0.05),
        (0.015, 0.02, 0.05),
        strict=True,
    ):
        scale = wanted.mean(axis=1).clip(1)  # active experts are counts
        assert (np.abs((found - wanted).mean(axis=1)) / scale).max() < mean
        assert (np.abs(found - wanted).mean(axis=1) / scale).max() < by_layer


@needs_recorded
def test_first_tokens_of_windows_stay_alike() -> None:
    """They choose the same experts in every window, which tokens after them hardly do."""
    trace, fitted = recorded("general", 2)

    def alike(trace: Trace, position: int) -> float:
        rows = trace.position == position
        counts, windows = popularity(trace, rows), int(rows.sum())
        return float((counts * (counts - 1)).sum(axis=1).mean() / (windows * (windows - 1) * 8))

    copied = copy(fitted, prompt=3, generate=1)

    assert alike(trace, 0) > 0.8
    assert alike(copied, 0) == pytest.approx(alike(trace, 0), abs=0.1)
    assert alike(copied, 2) == pytest.approx(alike(trace, 2), abs=0.1)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_copy_of_short_sequences_is_alike(spoken: Trace, seed: int) -> None:
    copied = copy(fit(spoken), seed=seed)
    found = by_name(compare(spoken, copied))

    check(copied)
    assert {name for name, _ in found} == {"reuse", "lru", "active", "skew", "recall"}
    assert {of for name, of in found if name == "recall"} == {"gate1", "gate2", "residual1"}
    for (name, _), (one, other) in found.items():
        if name == "active":
            assert other == pytest.approx(one, rel=0.03)
        else:
            assert other == pytest.approx(one, abs=0.015)


def test_a_copy_keeps_shape_rows_and_phases(spoken: Trace) -> None:
    order = np.argsort(spoken.position, kind="stable")  # as a batch is recorded
    columns = ("experts", "weights", "phase", "sequence", "position")
    batch = msgspec.structs.replace(
        spoken,
        **{name: getattr(spoken, name)[order] for name in columns},
        candidates={name: ids[order] for name, ids in spoken.candidates.items()},
        layer_ids=np.arange(3, 9, dtype=np.int32),
    )
    copied = copy(fit(batch))

    check(copied)
    for name in ("phase", "sequence", "position", "layer_ids"):
        assert (getattr(copied, name) == getattr(batch, name)).all()
    assert copied.experts.shape == batch.experts.shape
    assert copied.weights is not None
    for name, ids in batch.candidates.items():
        assert copied.candidates[name].shape == ids.shape
        assert ((copied.candidates[name] == MISSING) == (ids == MISSING)).all()
    assert copied.token_id is None
    assert copied.meta["model"] == "phi-3.5-moe"
    assert copied.meta["importer"] == "synthetic"
    assert copied.meta["like"] == batch.digest()
    assert json.dumps(copied.meta)
    found = by_name(compare(batch, copied))
    assert found["lru", "4"][1] == pytest.approx(found["lru", "4"][0], abs=0.02)


@pytest.mark.parametrize(
    ("asked", "sequences", "prefill", "decode"),
    [
        ({"sequences": 100}, 100, 60, 40),
        ({"prompt": 5}, 64, 5, 40),
        ({"generate": 1}, 64, 60, 0),
        ({"sequences": 2, "prompt": 300, "generate": 9}, 2, 300, 8),
    ],
)
def test_a_copy_has_as_many_tokens_as_asked(
    spoken: Trace, asked: dict[str, int], sequences: int, prefill: int, decode: int
) -> None:
    copied = copy(fit(spoken), **asked)

    check(copied)
    assert copied.sequence.tolist() == np.repeat(range(sequences), prefill + decode).tolist()
    assert copied.phase.tolist() == ([0] * prefill + [1] * decode) * sequences
    assert copied.position.tolist() == list(range(prefill + decode)) * sequences


def test_sequences_of_all_lengths_keep_them(make_trace: MakeTrace) -> None:
    trace = make_trace([40, 1, 7, 30], [3, 1, 7, 0])
    copied = copy(fit(trace), sequences=6)

    assert np.bincount(copied.sequence).tolist() == [40, 1, 7, 30, 40, 1]
    prompts = [int((copied.phase[copied.sequence == i] == 0).sum()) for i in range(6)]
    assert prompts == [3, 1, 7, 0, 3, 1]


def test_the_seed_decides_and_predictors_do_not_change_routing(spoken: Trace) -> None:
    fitted = fit(spoken)
    mute = msgspec.structs.replace(fitted, guessers={})

    assert copy(fitted, seed=4).digest() == copy(fit(spoken), seed=4).digest()
    assert (copy(fitted, seed=4).experts != copy(fitted, seed=5).experts).any()
    assert (copy(fitted, seed=4).experts == copy(mute, seed=4).experts).all()


def test_tokens_without_memory_stay_so() -> None:
    """Expert e has the weight e + 1 in every draw: nothing drifts, and popularity is all."""
    rng = np.random.default_rng(0)
    scores = np.log(np.arange(1, 9)) + rng.gumbel(size=(4000, 2, 8))
    trace = made_of(np.argsort(-scores, axis=2)[:, :, :2], [2000, 2000], 8)
    fitted = fit(trace)
    copied = copy(fitted)

    assert fitted.router.variances.sum(axis=0).max() < 0.1
    assert popularity(copied) / 4000 == pytest.approx(popularity(trace) / 4000, abs=0.04)
    again = reuse(copied, [1, 16, 256])
    assert again == pytest.approx(np.broadcast_to(reuse(trace, [1]), again.shape), abs=0.03)


def test_sequences_that_never_change_stay_so_each_with_its_experts() -> None:
    ids = np.repeat(np.array([[0, 1], [2, 3], [4, 5]]), 40, axis=0)[:, None]
    trace = made_of(ids, [40, 40, 40], 6)
    copied = copy(fit(trace), sequences=6)

    assert reuse(copied, [1, 16]).min() > 0.98
    for sequence in range(6):
        used = popularity(copied, copied.sequence == sequence)[0]
        assert sorted(np.argsort(-used)[:2]) == [2 * (sequence % 3), 2 * (sequence % 3) + 1]


def test_a_part_that_drifts_is_found_at_its_speed() -> None:
    """It has one of the memories that are tried."""
    memory = 0.25 ** (1 / 16)
    rng = np.random.default_rng(0)
    part = rng.standard_normal((3, 64))
    logits = np.empty((6000, 3, 64))
    for row in logits:
        part = memory * part + np.sqrt(1 - memory**2) * rng.standard_normal((3, 64))
        row[:] = np.sqrt(0.6) * part + np.sqrt(0.4) * rng.standard_normal((3, 64))
    router = fit(made_of(np.argsort(-logits, axis=2)[:, :, :6], [6000], 64)).router

    near = np.abs(router.memories[:, 0, 0] - memory) < 0.02
    assert router.variances[near].sum(axis=0) == pytest.approx(0.6, abs=0.08)
    assert router.noise == pytest.approx(0.4, abs=0.1)
    total = router.noise + router.variances.sum(axis=0)
    assert total == pytest.approx(1, abs=1e-5)


def test_weights_keep_their_share_and_sum(spoken: Trace) -> None:
    assert spoken.weights is not None
    sharp = spoken.weights.astype(np.float32) ** 3
    sharp *= 2.5 / sharp.sum(axis=2, keepdims=True)
    trace = msgspec.structs.replace(spoken, weights=sharp.astype(np.float16))
    copied = copy(fit(trace))

    assert copied.weights is not None
    made = copied.weights.astype(np.float32)
    assert made.sum(axis=2) == pytest.approx(2.5, abs=0.02)
    assert (np.diff(made, axis=2) <= 0).all()
    assert made[..., 0].mean() == pytest.approx(sharp[..., 0].mean(), abs=0.03)
    assert copy(fit(msgspec.structs.replace(spoken, weights=None))).weights is None


def test_each_predictor_keeps_its_recall_layer_by_layer(spoken: Trace) -> None:
    gate = spoken.candidates["gate1"].copy()
    gate[:, 3] = MISSING
    gate[:2000, 4] = MISSING
    guesses = {
        "router": spoken.experts.copy(),
        "gate1": gate,
        "narrow1": spoken.candidates["residual1"][:, :, :1].copy(),
    }
    trace = msgspec.structs.replace(spoken, candidates=guesses)
    copied = copy(fit(trace))

    assert (copied.candidates["router"] == copied.experts).all()
    assert (copied.candidates["gate1"][:, 3] == MISSING).all()
    for name, width in (("gate1", 2), ("narrow1", 1)):
        for layer in (1, 2, 4, 5):
            made, recorded = (
                np.nanmean(recall(one.candidates[name], one.experts, [width])[0][:, layer])
                for one in (copied, trace)
            )
            assert made == pytest.approx(recorded, abs=0.025)


def test_what_is_missing_is_filled_in(make_trace: MakeTrace) -> None:
    trace = make_trace([60, 40], [30, 40], layers=2)
    ids = trace.experts.copy()
    ids[:50, 1] = MISSING
    ids[3, 0, 1] = MISSING
    copied = copy(fit(msgspec.structs.replace(trace, experts=ids)))

    check(copied)
    assert (copied.experts != MISSING).all()


def test_of_much_the_first_sequences_stand_for_all(
    spoken: Trace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fit_module, "MOST_CELLS", 1000 * spoken.layers * spoken.n_experts)
    monkeypatch.setattr(fit_module, "MOST_FAVOURITES", 7 * spoken.layers * spoken.n_experts)
    fitted = fit(spoken)

    assert len(fitted.router.favourites) == 7
    assert copy(fitted).tokens == spoken.tokens
    assert compare(spoken, copy(fitted))


@pytest.mark.parametrize(("experts", "top_k"), [(4, 4), (2, 1), (3_000, 1)])
def test_odd_shapes_are_copied(experts: int, top_k: int) -> None:
    rng = np.random.default_rng(1)
    scores = rng.random((90, 2, experts))
    trace = made_of(np.argsort(-scores, axis=2)[:, :, :top_k], [50, 40], experts)
    copied = copy(fit(trace))

    check(copied)
    assert copied.experts.shape == trace.experts.shape
    assert compare(trace, copied)


def test_too_little_is_refused_in_one_line(make_trace: MakeTrace) -> None:
    with pytest.raises(TraceError, match=r"^2 tokens have a successor .* at least 32$"):
        fit(make_trace([3], [2]))
    with pytest.raises(TraceError, match="0 tokens have a successor"):
        fit(make_trace([1] * 100, [1] * 100))
    trace = make_trace([50], [50])
    empty = trace.experts.copy()
    empty[:, 1] = MISSING
    with pytest.raises(TraceError, match="layer 1 has no expert recorded"):
        fit(msgspec.structs.replace(trace, experts=empty))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"sequences": 0}, "sequences is 0"),
        ({"prompt": 0}, "prompt is 0"),
        ({"sequences": 2**20, "prompt": 2**24}, "tokens x layers x top_k is"),
    ],
)
def test_impossible_copies_are_refused(spoken: Trace, asked: dict[str, int], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        copy(fit(spoken), **asked)


def test_nothing_is_made_of_sequences_without_rows(make_trace: MakeTrace) -> None:
    trace = make_trace([40, 40], [10, 0])

    with pytest.raises(TraceError, match="tokens of the shortest sequence is 0"):
        copy(fit(trace), generate=1)


def test_the_command_writes_a_copy_and_says_how_near_it_came(spoken: Trace, tmp_path: Path) -> None:
    write_trace(spoken, tmp_path / "trace.npz")
    words = ["synth", "--like", str(tmp_path / "trace.npz"), "-o", str(tmp_path / "copy.npz")]
    result = CliRunner().invoke(command, [*words, "--seed", "3"], catch_exceptions=False)
    copied = read_trace(tmp_path / "copy.npz")

    assert result.exit_code == 0
    assert copied.digest() == copy(fit(spoken), seed=3).digest()
    for words_shown in (
        "copy.npz: 6400 tokens,",
        "used again 64 tokens later",
        "hit rate of an LRU cache of 4 experts",
        "distinct experts of 16 tokens",
        "recall of residual1",
    ):
        assert words_shown in result.output

    result = CliRunner().invoke(command, [*words, "--sequences", "3", "--generate", "1"])
    assert result.exit_code == 0
    assert read_trace(tmp_path / "copy.npz").tokens == 180


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "mixtral", "--top-k", "2"], "leave out --preset, --top-k; legal beside it"),
        (["--recall", "0.9"], "leave out --recall"),
        ([], "no such file"),
    ],
)
def test_the_command_refuses_in_one_line(words: list[str], message: str, tmp_path: Path) -> None:
    like = ["synth", "--like", str(tmp_path / "none.npz"), "-o", str(tmp_path / "copy.npz")]
    result = CliRunner().invoke(command, [*like, *words])

    assert isinstance(result.exception, MoesimError)
    assert message in str(result.exception)
    assert len(str(result.exception).splitlines()) == 1


def test_the_command_does_not_replace_the_trace(make_trace: MakeTrace, tmp_path: Path) -> None:
    place = tmp_path / "trace.npz"
    write_trace(make_trace([3], [2]), place)
    result = CliRunner().invoke(command, ["synth", "--like", str(place), "-o", str(place)])
    other = CliRunner().invoke(
        command, ["synth", "--like", str(place), "-o", str(tmp_path / "copy.npz")]
    )

    assert "is the trace itself" in str(result.exception)
    assert "trace.npz: 2 tokens have a successor" in str(other.exception)
    assert rows_by_sequence(read_trace(place))[1].tolist() == [0, 3]
