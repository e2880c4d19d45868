"""Fits recover a known truth from noisy times, and say where they do not."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.calibrate.fit import FAR, MISSES, fit_floor, fit_line
from moesim.errors import CalibrationError
from moesim.types import FloatArray

SIZES = np.geomspace(4096, 1 << 30, 19)
TOKENS = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])


def noisy(ns: FloatArray, seed: int, spread: float = 0.01) -> FloatArray:
    """Return times that are never below the truth by much, as those of a machine."""
    made: FloatArray = ns * (1 + np.abs(np.random.default_rng(seed).normal(0, spread, len(ns))))
    return made


@given(latency_ns=st.floats(2e3, 1e5), gb_per_s=st.floats(1, 60), seed=st.integers(0, 1 << 30))
@settings(max_examples=25)
def test_a_line_is_recovered(latency_ns: float, gb_per_s: float, seed: int) -> None:
    """Times with one percent of noise on one side: the rate to 3 %, and the latency to 5 %.

    Where even 4 KB take longer than the latency, noise of that time is more than 5 % of it.
    """
    truth = latency_ns + SIZES / gb_per_s
    fit = fit_line(SIZES, noisy(truth, seed))
    within = 0.05 * latency_ns + 0.02 * truth[0]
    assert fit.parameters[0] == pytest.approx(latency_ns, abs=within)
    assert 1 / fit.parameters[1] == pytest.approx(gb_per_s, rel=0.03)
    assert not fit.misses
    assert fit.outliers.size == 0


@given(
    floor=st.floats(1e4, 1e6), knee=st.floats(2, 256), base=st.floats(0, 0.9),
    seed=st.integers(0, 1 << 30),
)  # fmt: skip
@settings(max_examples=25)
def test_a_floor_and_a_slope_are_recovered(
    floor: float, knee: float, base: float, seed: int
) -> None:
    """What counts are the times that come out: 5 % at every number of tokens, seen or not.

    Flat up to the knee, behind which there are three points at least.
    """
    per_token = (1 - base) * floor / knee

    def truth(tokens: Any) -> FloatArray:
        ns: FloatArray = np.maximum(floor, base * floor + per_token * tokens)
        return ns

    between = np.array([3, 6, 12, 24, 48, 96, 192, 384, 768])
    fit = fit_floor(TOKENS, noisy(truth(TOKENS), seed), (between, truth(between)))
    assert fit(TOKENS) == pytest.approx(truth(TOKENS), rel=0.05)
    assert fit.error < 0.05


def test_the_floor_is_what_few_tokens_take() -> None:
    fit = fit_floor(TOKENS, np.maximum(1000.0, 200 + 50.0 * TOKENS))
    assert fit.parameters == pytest.approx([1000, 200, 50], rel=0.01)


def test_a_stray_point_bends_nothing_and_is_reported() -> None:
    """One of 19 sizes took three times as long."""
    ns = 1e4 + SIZES / 25
    ns[9] *= 3
    fit = fit_line(SIZES, ns)
    assert fit.parameters[0] == pytest.approx(1e4, rel=0.03)
    assert 1 / fit.parameters[1] == pytest.approx(25, rel=0.03)
    assert fit.outliers.tolist() == [9]
    assert abs(fit.residuals[9]) > FAR


def test_points_that_fall_before_they_rise_are_fitted_all_the_same() -> None:
    """The second point is below the first, as fp32 on a real processor was."""
    ns = np.array([0.99, 1.86, 1.59, 1.94, 2.76, 4.25, 7.3, 13.4, 25.7]) * 1e6
    fit = fit_floor(TOKENS[:9], ns)
    assert np.abs(fit.residuals[3:]).max() < 0.1
    assert (fit.parameters >= 0).all()
    assert fit.misses  # the first point is not the floor of the others


def test_held_out_points_are_judged_and_never_fitted() -> None:
    ns = 1e4 + SIZES / 25
    apart = (SIZES[5:8], 2 * ns[5:8])
    fit = fit_line(SIZES, ns, apart)
    assert fit.parameters == pytest.approx(fit_line(SIZES, ns).parameters)
    assert fit.held_out == pytest.approx([-0.5] * 3, abs=0.01)
    assert fit.error == pytest.approx(0.5, abs=0.01)
    assert fit.misses


def test_an_error_of_a_tenth_is_the_limit() -> None:
    ns = 1e4 + SIZES / 25
    for factor, misses in ((1 + MISSES - 0.02, False), (1 + MISSES + 0.02, True)):
        assert fit_line(SIZES, ns, (SIZES[:1], ns[:1] / factor)).misses == misses


def test_the_order_of_points_does_not_matter() -> None:
    ns = noisy(np.maximum(1000.0, 200 + 50.0 * TOKENS), 1)
    mixed = np.random.default_rng(2).permutation(len(TOKENS))
    one, other = fit_floor(TOKENS, ns), fit_floor(TOKENS[mixed], ns[mixed])
    assert one.parameters == pytest.approx(other.parameters, rel=1e-6)


@pytest.mark.parametrize(
    ("sizes", "ns", "why"),
    [
        ([1, 1], [5, 6], "needs 2 different sizes, not 1"),
        ([1, 2], [5, 0], "above 0 ns"),
        ([1, 2], [5, float("nan")], "above 0 ns"),
    ],
)
def test_what_cannot_be_fitted_is_refused(sizes: list[int], ns: list[float], why: str) -> None:
    with pytest.raises(CalibrationError, match=why):
        fit_line(np.array(sizes), np.array(ns))
