"""When an operation has been timed often enough."""

from collections.abc import Callable
from itertools import chain, count, cycle, repeat

import numpy as np
import pytest

from moesim.calibrate.timing import MOST_CALLS, Limits, calls_for, measure, summary


def taking(*ns: int) -> tuple[Callable[[], int], list[int]]:
    """Return an operation that takes these times, the last one for ever, and its calls so far."""
    times = chain(ns, repeat(ns[-1]))
    calls: list[int] = []

    def once() -> int:
        calls.append(next(times))
        return calls[-1]

    return once, calls


def test_equal_times_are_enough_after_the_least_repetitions() -> None:
    once, calls = taking(1000)
    found = measure(once, Limits(warm_ups=2, least=5))
    assert len(calls) == 2 + 5
    assert (found.ns, found.median_ns, found.spread) == (1000, 1000, 0)
    assert (found.repetitions, found.settled, found.outliers) == (5, True, 0)


def test_warm_ups_do_not_count() -> None:
    once, _ = taking(10**9, 10**9, 7)
    assert measure(once, Limits(warm_ups=2)).median_ns == 7


def test_it_goes_on_until_the_times_agree() -> None:
    """Of 100, 200, 200, 100, ... the median comes near the low quartile when enough are 100."""
    once, _ = taking(100, 200, 200, 100)
    found = measure(once, Limits(warm_ups=0, least=3, spread=0.03))
    # 100 200 200 | 100: the middle of four is 150 | 100: the middle of five is 100
    assert found.repetitions == 5
    assert (found.ns, found.median_ns, found.settled) == (100, 100, True)


def test_a_time_limit_ends_it_unsettled() -> None:
    """A clock that counts its readings: the limit is over after 10 of them."""
    clock = count()
    times = cycle([100, 200, 300])
    found = measure(
        lambda: next(times), Limits(warm_ups=0, least=2, seconds=10), clock=lambda: next(clock)
    )
    assert not found.settled
    assert found.spread > 0.03
    assert found.repetitions == 2 + 9


def test_repetitions_have_a_limit() -> None:
    times = cycle([100, 200, 300])
    found = measure(lambda: next(times), Limits(warm_ups=0, most=20), clock=lambda: 0)
    assert (found.repetitions, found.settled) == (20, False)


def test_outliers_are_counted_and_not_hidden() -> None:
    once, _ = taking(100, 100, 100, 5000, 100)
    found = measure(once, Limits(warm_ups=0, least=5))
    assert found.outliers == 1
    assert found.ns == pytest.approx(100)


def test_the_time_is_the_low_quartile_and_not_the_least() -> None:
    found = summary(np.array([500.0, 100, 200, 300, 400]), Limits(least=5, spread=0.5))
    assert (found.ns, found.median_ns, found.spread, found.settled) == (200, 300, 0.5, True)
    assert not summary(np.array([200.0] * 4), Limits(least=5)).settled


@pytest.mark.parametrize(("ns", "calls"), [(1, MOST_CALLS), (100_000, 5), (300_000, 1), (10**9, 1)])
def test_short_operations_share_a_ticket_of_half_a_millisecond(ns: int, calls: int) -> None:
    assert calls_for(ns) == calls
