import msgspec
import numpy as np
import pytest

from moesim.errors import TraceError
from moesim.traces.format import MISSING, Trace, check
from moesim.traces.stats import lru_hits, reuse, srp
from moesim.traces.synthetic import PRESETS, correlation_for, overlap, synthesize

CORRELATIONS = (0, 0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99)
OVERLAPS = {
    (64, 6): (0.093, 0.161, 0.251, 0.308, 0.373, 0.450, 0.544, 0.669, 0.760, 0.809, 0.841, 0.884),
    (128, 8): (0.062, 0.121, 0.205, 0.261, 0.326, 0.405, 0.504, 0.639, 0.737, 0.793, 0.828, 0.874),
}


@pytest.mark.parametrize("shape", OVERLAPS)
def test_overlaps_follow_the_curve(shape: tuple[int, int]) -> None:
    found = [overlap(*shape, c) for c in CORRELATIONS]

    assert found == pytest.approx(OVERLAPS[shape], abs=0.005)


def test_a_recall_becomes_the_correlation_behind_it() -> None:
    """Between points of the curve; 78.8 % at 60/4 and 90 % at 8/2 are published recalls."""
    assert correlation_for(128, 8, 0.828) == pytest.approx(0.98, abs=0.001)
    assert correlation_for(64, 6, 0.669) == pytest.approx(0.90, abs=0.004)
    assert correlation_for(60, 4, 0.788) == pytest.approx(0.970, abs=0.005)
    assert correlation_for(8, 2, 0.90) == pytest.approx(0.986, abs=0.002)
    assert correlation_for(128, 8, 1.0) == 1
    assert correlation_for(128, 8, 0.01) == 0
    for recall in (0.3, 0.6, 0.9):
        assert overlap(64, 6, correlation_for(64, 6, recall), seed=9) == pytest.approx(
            recall, abs=0.01
        )


# SRP of 16 tokens (%), and the hit ratio of an LRU cache of a quarter of the experts, as the fit
# behind each preset has them. qwen3-30b varies with depth: the means over all layers and both
# recorded traces.
EXPECTED = {
    "qwen3-30b": (53.9, 0.795),
    "mixtral": (49.3, 0.301),
    "deepseek-v2-lite": (38.8, 0.450),
    "olmoe": (51.2, 0.54),
    "phi-3.5": (51.2, 0.56),
    "qwen1.5-moe": (29.6, 0.35),
    "qwen2-57b": (42.8, 0.418),
}


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_as_local_as_their_models(preset: str, seed: int) -> None:
    trace = synthesize(
        preset, layers=16, sequences=1, prompt=1500, generate=1, distances=0, seed=seed
    )

    f1 = float(srp(trace, [16]).mean())
    hits = float(lru_hits(trace, [round(trace.n_experts / 4)], protect=False).mean())

    assert 100 * f1 == pytest.approx(EXPECTED[preset][0], abs=3)
    assert hits == pytest.approx(EXPECTED[preset][1], abs=0.04)


def small(seed: int = 0, recall: float = 0.9, **arguments: int | float) -> Trace:
    options = {"layers": 12, "sequences": 3, "prompt": 40, "generate": 20} | arguments
    return synthesize("qwen3-30b", seed=seed, recall=recall, **options)  # type: ignore[arg-type]


def test_a_made_up_trace_is_valid_and_says_what_it_is() -> None:
    trace = small(residual_recall=0.95)

    check(trace)
    assert trace.experts.shape == (3 * 59, 12, 8)
    assert trace.phase.sum() == 3 * 19
    assert np.bincount(trace.sequence).tolist() == [59] * 3
    assert sorted(trace.candidates) == ["gate1", "gate2", "gate3", "residual1"]
    assert trace.candidates["gate1"].shape == (3 * 59, 12, 24)
    assert trace.weights is not None
    assert trace.weights.astype(float).sum(axis=2) == pytest.approx(1, abs=0.02)
    assert (np.diff(trace.weights, axis=2) <= 0).all()
    assert trace.meta["model"] == "qwen3-30b-a3b"
    assert trace.meta["seed"] == 0
    assert trace.meta["parameters"]["recall"] == 0.9


def test_the_seed_decides_and_predictors_do_not_change_routing() -> None:
    assert small(seed=4).digest() == small(seed=4).digest()
    assert (small(seed=4).experts != small(seed=5).experts).any()
    assert (small(seed=4).experts == small(seed=4, recall=0.5, distances=1).experts).all()


def recall_of(trace: Trace, name: str, layer: int) -> float:
    ids = trace.candidates[name][:, layer, : trace.top_k]
    return float((ids[:, :, None] == trace.experts[:, layer, None, :]).any(axis=1).mean())


def test_guesses_have_their_recall_and_lose_it_with_distance() -> None:
    trace = small(recall=0.8, residual_recall=0.9, sequences=8)
    deep = {
        name: np.mean([recall_of(trace, name, layer) for layer in range(4, 12)])
        for name in trace.candidates
    }

    assert deep["gate1"] == pytest.approx(0.8, abs=0.01)
    assert deep["residual1"] == pytest.approx(0.9, abs=0.01)
    assert 0.8 > deep["gate2"] + 0.05 > deep["gate3"] + 0.1
    assert recall_of(trace, "gate1", 1) == pytest.approx(0.8 * 0.72, abs=0.02)
    for distance in (1, 2, 3):
        guesses = trace.candidates[f"gate{distance}"]
        assert (guesses[:, :distance] == MISSING).all()
        assert (guesses[:, distance:] != MISSING).all()


def test_sequences_of_one_domain_share_favourites() -> None:
    trace = small(sequences=4, prompt=150, generate=1, domains=2)
    used = np.zeros((4, 12, 128))
    for sequence in range(4):
        ids = trace.experts[trace.sequence == sequence]
        for layer in range(12):
            used[sequence, layer] = np.bincount(ids[:, layer].ravel(), minlength=128)

    def alike(a: int, b: int) -> float:
        return float(np.corrcoef(used[a].ravel(), used[b].ravel())[0, 1])

    assert alike(0, 2) > alike(0, 1) + 0.2
    assert alike(1, 3) > alike(1, 2) + 0.2


def test_the_first_layer_of_qwen3_is_the_least_local() -> None:
    by_layer = reuse(synthesize("qwen3-30b", sequences=1, prompt=300, distances=0), [1])[0]

    assert by_layer.argmin() == 0
    assert by_layer[0] < 0.2
    assert by_layer[8:46].mean() == pytest.approx(0.47, abs=0.06)


def test_shapes_may_be_chosen() -> None:
    trace = synthesize("olmoe", layers=1, experts=5, top_k=5, sequences=1, prompt=2, generate=2)

    check(trace)
    assert trace.experts.shape == (3, 1, 5)
    assert trace.candidates == {}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "gpt-9"}, "no preset named 'gpt-9'; there are: deepseek-v2-lite,"),
        ({"top_k": 200}, r"top_k is 200; legal are 1\.\.128"),
        ({"width": 129}, "width is 129"),
        ({"prompt": 0}, "prompt is 0"),
        ({"sequences": 0}, "sequences is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"recall": 1.1}, r"recall of 1\.1"),
        ({"sequences": 1_000_000, "prompt": 1_000_000}, "tokens x layers x top_k is"),
        ({"experts": 60_000, "layers": 4000}, "layers x experts is 240000000"),
    ],
)
def test_impossible_traces_are_refused(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        synthesize(**arguments)  # type: ignore[arg-type]


def test_presets_leave_room_for_noise() -> None:
    for preset in PRESETS.values():
        for drift in (preset.drift, *(d for _, d in preset.depth)):
            assert preset.base + drift.domain + drift.slow + drift.fast <= 1 + 1e-9
            assert min(msgspec.structs.astuple(drift)) >= 0
            assert drift.fast_memory < 1
