"""Every built-in policy keeps the laws that third parties inherit."""

import pytest

from moesim.errors import InputError
from moesim.policies.registry import BUILTIN, load_class
from moesim.testing import PolicyConformance


class TestDali(PolicyConformance):
    policy = "dali"


class TestDaliOnALruCache(PolicyConformance):
    policy = "dali:cache=lru,predictor=noisy-oracle,link=priority"


class TestLru(PolicyConformance):
    policy = "lru"


class TestStatic(PolicyConformance):
    policy = "static"
    needs_gpu = False


def test_no_policy_is_left_out() -> None:
    suites = (TestDali, TestLru, TestStatic)
    assert {suite.policy for suite in suites} == set(BUILTIN)
    assert all(load_class(name) for name in BUILTIN)


def test_a_misspelt_name_is_not_taken_for_a_policy() -> None:
    class Misspelt(PolicyConformance):
        policy = "dail"

    with pytest.raises(InputError, match="no policy named 'dail'"):
        Misspelt().test_one_slot()
