"""Every built-in policy keeps the laws that third parties inherit."""

import re
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import moesim.policies.testing as lab
from moesim.errors import InputError
from moesim.policies.api import Placement, Plan, Setting, View, run_on_cpu, run_on_gpu
from moesim.policies.registry import BUILTIN, Chosen, load_class
from moesim.policies.testing import PolicyConformance
from moesim.run import Prepared


class TestDali(PolicyConformance):
    policy = "dali"


class TestDaliOnALruCache(PolicyConformance):
    policy = "dali:cache=lru,predictor=noisy-oracle,link=priority"


class TestLru(PolicyConformance):
    policy = "lru"


class TestLruByFrequency(PolicyConformance):
    policy = "lru:rule=lfu"


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


LAST: list[int] = [0]
"""The last choice of the run: what nobody can know before its end."""


class Peeking(NamedTuple):
    """Decides by what the last router will choose."""

    @classmethod
    def new(cls, setting: Setting) -> "Peeking":
        return cls()

    def place(self, setting: Setting) -> Placement:
        return lab.placement(setting, slots=0)

    def dispatch(self, view: View, plan: Plan) -> None:
        for expert in view.active[: view.n_active]:
            run_on_gpu(plan, expert) if LAST[0] % 2 else run_on_cpu(plan, expert)


def test_a_policy_that_sees_the_future_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    class Peeks(PolicyConformance):
        policy = "peeking"

    audited = lab.audited

    def look_and_replay(ready: Prepared, **options: Any) -> Any:
        LAST[0] = int(ready.feed.chosen[-1, -1, -1])
        return audited(ready, **options)

    monkeypatch.setattr(lab, "audited", look_and_replay)
    monkeypatch.setattr(lab, "choose", lambda _: Chosen("peeking", Peeking, {}))
    with pytest.raises(AssertionError):
        Peeks().test_nothing_depends_on_what_comes_later()
    Peeks().test_random_choices()


def test_a_policy_says_whether_it_works_without_the_gpu() -> None:
    class Needing(PolicyConformance):
        policy = "on-demand"

    class Boasting(Needing):
        needs_gpu = False

    class Modest(PolicyConformance):
        policy = "all-cpu"

    Needing().test_no_slot()
    with pytest.raises(AssertionError, match="though needs_gpu = False"):
        Boasting().test_no_slot()
    with pytest.raises(AssertionError, match="say needs_gpu = False"):
        Modest().test_no_slot()


def test_a_misspelt_name_is_not_taken_for_a_policy() -> None:
    class Misspelt(PolicyConformance):
        policy = "dail"

    with pytest.raises(InputError, match="no policy named 'dail'"):
        Misspelt().test_one_slot()
