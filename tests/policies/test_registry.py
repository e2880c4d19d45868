import sys
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moesim.errors import InputError
from moesim.policies import registry
from moesim.policies.api import HOOKS, Setting
from moesim.policies.dali import Dali
from moesim.policies.lru import Lru
from moesim.policies.registry import BUILTIN, Chosen, Parameter, choose, names, parameters_of
from moesim.policies.static import Static
from moesim.sim.replay import Replayed

GOOD = """
from typing import NamedTuple

import numpy as np

from moesim.policies.api import layer_caches, run_on_cpu


class Mine(NamedTuple):
    size: int

    @classmethod
    def new(cls, setting, size: int = 3, careful: bool = False, ratio: float = 0.5, name="x"):
        return cls(size)

    def place(self, setting):
        none = np.zeros((setting.layers, setting.experts), np.int64)
        return layer_caches(setting, none, none.sum(axis=1), 0)

    def dispatch(self, view, plan):
        for i in range(view.n_active):
            run_on_cpu(plan, view.active[i])
"""


def written(tmp_path: Path, text: str) -> str:
    file = tmp_path / "mine.py"
    file.write_text(text)
    return str(file)


def refusal(spec: str) -> str:
    """Return the message with which a policy text is refused."""
    with pytest.raises(InputError) as refused:
        choose(spec)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_names_lists_what_is_built_in() -> None:
    assert {"dali", "lru", "static"} <= set(names())
    assert names() == sorted(set(names()))


@pytest.mark.parametrize(
    ("name", "cls", "hooks"),
    [
        ("dali", Dali, {"dispatch", "after_layer"}),
        ("lru", Lru, {"dispatch"}),
        ("static", Static, {"dispatch"}),
    ],
)
def test_built_in_policies_are_found_with_defaults_and_hooks(
    name: str, cls: type, hooks: set[str]
) -> None:
    chosen = choose(name)
    assert chosen == choose(f"{name}:") == Chosen(name, cls, chosen.parameters)
    assert chosen.parameters == {p.name: p.default for p in parameters_of(cls)}
    assert chosen.spec == name
    assert {hook for h, hook in enumerate(HOOKS) if chosen.hooks & (1 << h)} == hooks


def test_parameters_are_read_as_what_they_are() -> None:
    parameters = choose(
        "dali:prefetch_size=2,cache=lru,count_prefill=TRUE,recall=1e-1,predictor=gate1"
    ).parameters
    assert parameters["prefetch_size"] == 2
    assert parameters["cache"] == "lru"
    assert parameters["count_prefill"] is True
    assert parameters["recall"] == 0.1
    assert parameters["predictor"] == "gate1"
    assert choose("dali:count_prefill=false").parameters["count_prefill"] is False
    assert choose("static:order=list,file=a=b.json").parameters["file"] == "a=b.json"


def test_overrides_win_over_the_text() -> None:
    chosen = choose("lru:staging=5", {"staging": 7})
    assert chosen.parameters == {"staging": 7, "rule": "lru"}
    assert chosen.spec == "lru:staging=7"


def test_spec_is_the_shortest_text_for_the_same() -> None:
    assert choose("dali:cache=window,u_size=0").spec == "dali"
    assert choose("dali:count_prefill=true,u_size=3").spec == "dali:u_size=3,count_prefill=true"


def values_of(parameter: Parameter) -> st.SearchStrategy[Any]:
    if parameter.type is int:
        return st.integers(0, (1 << 31) - 1)
    if parameter.type is float:
        return st.floats(0, (1 << 31) - 1, exclude_max=True)
    if parameter.type is bool:
        return st.booleans()
    if parameter.type is str:
        return st.text(st.characters(exclude_characters=","))
    return st.sampled_from(parameter.legal.split("|"))


@settings(deadline=None)
@given(st.data(), st.sampled_from([Dali, Lru, Static]))
def test_spec_chooses_the_same_again(data: st.DataObject, cls: type) -> None:
    name = cls.__name__.lower()
    parameters = {p.name: data.draw(values_of(p), p.name) for p in parameters_of(cls)}
    chosen = Chosen(name, cls, parameters)
    assert choose(chosen.spec) == chosen


@pytest.mark.parametrize("name", ["lruu", "", "LRU", "lru "])
def test_unknown_policies_are_refused_with_the_names_that_exist(name: str) -> None:
    there = ", ".join(sorted(BUILTIN))
    assert refusal(name).startswith(f"no policy named '{name}'; there are: {there}")


@pytest.mark.parametrize("item", ["w_sizes=3", "w_size", "w_size:3", "=3", "W_SIZE=3", " w_size=3"])
def test_unknown_parameters_are_refused_with_the_names_that_exist(item: str) -> None:
    message = refusal(f"dali:u_size=1,{item}")
    assert f"no parameter {item!r}" in message
    assert "policy dali" in message
    for parameter in parameters_of(Dali):
        assert parameter.name in message


@pytest.mark.parametrize(
    ("name", "text", "legal"),
    [
        ("u_size", "two", "whole number >= 0"),
        ("u_size", "-1", "whole number >= 0"),
        ("u_size", "1.5", "whole number >= 0"),
        ("u_size", "", "whole number >= 0"),
        ("u_size", "2147483648", "whole number >= 0"),
        ("u_size", "9" * 5000, "whole number >= 0"),
        ("recall", "high", "number >= 0"),
        ("recall", "nan", "number >= 0"),
        ("recall", "inf", "number >= 0"),
        ("recall", "-0.5", "number >= 0"),
        ("count_prefill", "1", "true|false"),
        ("count_prefill", "yes", "true|false"),
        ("count_prefill", "", "true|false"),
        ("cache", "Lru", "window|lru|lfu|static"),
        ("cache", "fifo", "window|lru|lfu|static"),
        ("assign", "", "greedy|exact|threshold|hss|resident|gpu"),
        ("swap", "strict ", "strict|guarded"),
    ],
)
def test_illegal_values_are_refused_with_the_legal_ones(name: str, text: str, legal: str) -> None:
    message = refusal(f"dali:{name}={text}")
    assert message == f"policy dali: {name}={text!r} is not legal; {legal} is"


def test_a_file_is_a_policy(run: Callable[..., Replayed], tmp_path: Path) -> None:
    spec = written(tmp_path, GOOD)
    assert choose(spec).parameters == {"size": 3, "careful": False, "ratio": 0.5, "name": "x"}
    chosen = choose(f"{spec}:size=5,careful=true,name=y")
    assert chosen.parameters == {"size": 5, "careful": True, "ratio": 0.5, "name": "y"}
    assert chosen.spec == f"{spec}:size=5,careful=true,name=y"
    assert "size, careful, ratio, name" in refusal(f"{spec}:sizes=5")

    replayed = run(spec, 0)

    assert replayed.prepared.policy.size == 3
    assert replayed.prepared.chosen.cls.__name__ == "Mine"


def test_each_run_gets_a_policy_of_its_own(
    make_setting: Callable[..., Setting],
) -> None:
    chosen = choose("lru")
    first, second = (chosen.make(make_setting(8)) for _ in range(2))
    assert isinstance(first, Lru)
    assert isinstance(second, Lru)
    assert first.cache.order.after is not second.cache.order.after


@pytest.mark.parametrize(
    ("hook", "decorator"),
    [
        ("after_layers", ""),
        ("beforegate", ""),
        ("helper", "    @staticmethod\n"),
        ("build", "    @classmethod\n"),
    ],
)
def test_a_public_method_that_is_no_hook_is_refused(
    tmp_path: Path, hook: str, decorator: str
) -> None:
    spec = written(
        tmp_path, f"{GOOD}\n{decorator}    def {hook}(self, view, plan):\n        pass\n"
    )
    message = refusal(spec)
    assert f"{hook} is no hook" in message
    assert ", ".join(HOOKS) in message


def test_hooks_and_private_methods_are_allowed(tmp_path: Path) -> None:
    methods = [*HOOKS[:3], "after_layer", "plan", "_helper"]
    text = GOOD + "".join(f"\n    def {m}(self, view, plan):\n        pass\n" for m in methods)
    assert choose(written(tmp_path, text)).hooks == (1 << len(HOOKS)) - 1


@pytest.mark.parametrize("method", ["new", "place"])
def test_a_policy_without_a_needed_method_is_refused(tmp_path: Path, method: str) -> None:
    message = refusal(written(tmp_path, GOOD.replace(f"def {method}(", f"def _{method}(")))
    assert message.endswith(f"Mine has no method {method}")


def test_two_policies_in_a_file_are_refused(tmp_path: Path) -> None:
    message = refusal(written(tmp_path, GOOD + GOOD.replace("Mine", "Yours")))
    assert "has 2 classes with dispatch; 1 is needed" in message
    assert "has 0 classes" in refusal(written(tmp_path, "x = 1\n"))


def test_a_file_may_import_other_policies(tmp_path: Path) -> None:
    spec = written(tmp_path, "from moesim.policies.dali import Dali\n" + GOOD)
    assert choose(spec).cls.__name__ == "Mine"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("raise ValueError('out of order')", "ValueError: out of order"),
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("def", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("raise SystemExit(0)", "SystemExit"),
    ],
)
def test_a_file_that_fails_is_refused_with_its_error(tmp_path: Path, text: str, what: str) -> None:
    spec = written(tmp_path, text)
    message = refusal(spec)
    assert spec in message
    assert what in message


def test_files_that_are_not_there_are_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(str(tmp_path / "missing.py"))
    (tmp_path / "folder.py").mkdir()
    assert "no such file" in refusal(str(tmp_path / "folder.py"))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Install a package `others` with policies `other`, `broken` and `missing`."""
    module = ModuleType("others")
    exec(GOOD, module.__dict__)
    broken = type("Broken", (), dict(vars(Static), after_layers=lambda self, view, plan: None))
    module.Broken = broken  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "others", module)
    points = [
        EntryPoint("other", "others:Mine", registry.GROUP),
        EntryPoint("broken", "others:Broken", registry.GROUP),
        EntryPoint("missing", "others:Nothing", registry.GROUP),
    ]

    def entry_points(*, group: str) -> list[EntryPoint]:
        return points if group == "moesim.policies" else []

    monkeypatch.setattr(registry, "entry_points", entry_points)
    return module


def test_entry_points_are_policies(installed: ModuleType) -> None:
    assert names() == sorted([*BUILTIN, "broken", "missing", "other"])
    chosen = choose("other:size=4")
    assert chosen == Chosen("other", installed.Mine, chosen.parameters)
    assert chosen.parameters["size"] == 4
    assert choose(chosen.spec) == chosen
    assert f"there are: {', '.join(names())}" in refusal("others")


@pytest.mark.usefixtures("installed")
def test_entry_points_that_are_no_policies_are_refused() -> None:
    assert "after_layers is no hook" in refusal("broken")
    assert "missing" in refusal("missing")
