"""Every built-in policy keeps the laws that third parties inherit."""

import re
from pathlib import Path

import pytest

from moesim.errors import InputError
from moesim.policies.registry import BUILTIN, load_class
from moesim.policies.testing import PolicyConformance


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
    """Suites of other policies stand beside their tests."""
    texts = [file.read_text() for file in Path(__file__).parent.rglob("test_*.py")]
    suites = "".join(text for text in texts if "PolicyConformance)" in text)
    for name in BUILTIN:
        assert re.search(rf"\"{name}[\":]", suites), name
        assert issubclass(load_class(name), tuple)


def test_a_misspelt_name_is_not_taken_for_a_policy() -> None:
    class Misspelt(PolicyConformance):
        policy = "dail"

    with pytest.raises(InputError, match="no policy named 'dail'"):
        Misspelt().test_one_slot()
