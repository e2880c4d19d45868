"""Sorting experts: both ways of doing it give the same order."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.policies.parts.order import IDS, sort_by, sort_compiled

KEYS = st.integers(-5, 5) | st.integers(-(1 << 46), 1 << 46)


@given(
    keys=st.lists(KEYS, min_size=1, max_size=60), seed=st.integers(0, 99),
    sign=st.sampled_from((1, -1)), data=st.data(),
)  # fmt: skip
def test_the_first_places_are_those_of_sorted(
    keys: list[int], seed: int, sign: int, data: st.DataObject
) -> None:
    n = data.draw(st.integers(1, len(keys)))
    count = data.draw(st.integers(1, n))
    items = np.random.default_rng(seed).permutation(len(keys))
    expected = sorted(items[:n].tolist(), key=lambda item: (sign * keys[item], item))
    for sort in (sort_by, sort_compiled):
        found = items.copy()
        sort(found, n, count, np.array(keys), sign)
        assert found[:count].tolist() == expected[:count]
        assert sorted(found[:n].tolist()) == sorted(expected)
        assert (found[n:] == items[n:]).all()


def test_any_id_of_a_trace_fits_beside_its_key() -> None:
    assert np.iinfo(np.int16).max < IDS


def test_keys_are_integers() -> None:
    with pytest.raises(TypeError, match="keys of float64"):
        sort_by(np.arange(3), 3, 3, np.zeros(3), 1)  # type: ignore[arg-type]
