"""`--machine` and `moesim compile`: the same results, and a word about which machine and why."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

import moesim.policies.testing as lab
from moesim.jit import store
from moesim.policies.registry import choose
from moesim.sim.engine import Choice, choose_machine, engine_module, hooks_module, hooks_of

Cli = Callable[..., CompletedProcess[str]]

PLAIN = """
from typing import NamedTuple
import numpy as np
from moesim.policies import api


class Counts(NamedTuple):
    uses: dict

    @classmethod
    def new(cls, setting: api.Setting) -> "Counts":
        return cls({})

    def place(self, setting: api.Setting) -> api.Placement:
        none = np.zeros((setting.layers, setting.experts), np.int64)
        return api.layer_caches(setting, none, none[:, 0], staging_slots=2)

    def dispatch(self, view: api.View, plan: api.Plan) -> None:
        for expert in view.active[: view.n_active].tolist():
            self.uses[expert] = self.uses.get(expert, 0) + 1
            api.run_on_cpu(plan, expert)
"""


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path / "cache"))
    engine_module.cache_clear()
    hooks_module.cache_clear()
    return tmp_path / "cache" / "compiled"


@pytest.fixture(autouse=True)
def _forget_the_folder() -> Any:
    yield
    engine_module.cache_clear()
    hooks_module.cache_clear()


def result(ended: CompletedProcess[str]) -> tuple[dict[str, Any], str]:
    """Return the results of a replay, and the machine that they are from."""
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    del found["run"]["wall_s"]
    return found, found["run"].pop("machine")


def said(ended: CompletedProcess[str]) -> list[str]:
    """Return what was said about the machine."""
    return [line for line in ended.stderr.splitlines() if line.startswith("note: machine ")]


@pytest.mark.skipif(store.disabled(), reason="nothing compiles")
@pytest.mark.usefixtures("nothing_compiled")
def test_auto_compiles_nothing_for_a_short_run(cli: Cli, small: Path) -> None:
    ended = cli("replay", small, "--json")
    assert result(ended)[1] == "simpy"
    (line,) = said(ended)
    assert line.startswith("note: machine simpy: compiling would take about ")
    assert line.endswith("--machine compiled does it")
    assert store.records() == []
    assert said(cli("replay", small, "--json", "--machine", "simpy")) == []


@pytest.mark.skipif(store.disabled(), reason="nothing compiles")
@pytest.mark.usefixtures("nothing_compiled")
def test_auto_compiles_for_a_run_that_repays_it() -> None:
    lru = lab.prepared(choose("lru"), [[[0, 2]]], lab.make_costs())
    assert choose_machine("auto", lru, 20_000).machine == "simpy"
    assert choose_machine("auto", lru, 200_000).machine == "compiled"
    store.note(engine_module(), "", 10.0)
    assert choose_machine("auto", lru, 20_000).machine == "compiled"
    store.note(hooks_of(lru), "", 1.0)
    assert choose_machine("auto", lru, 1) == Choice("compiled", "was compiled before")


@pytest.mark.skipif(store.disabled(), reason="nothing compiles")
def test_all_machines_give_the_same_results(cli: Cli, small: Path) -> None:
    simpy, fast = [
        cli("replay", small, "--policy", "lru", "--json", "--jitter", 0.3, "--machine", machine)
        for machine in ("simpy", "compiled")
    ]
    assert result(fast) == (result(simpy)[0], "compiled")
    after = cli("replay", small, "--policy", "lru", "--json", "--jitter", 0.3)
    assert result(after) == result(fast)
    assert said(after) == ["note: machine compiled: was compiled before"]


@pytest.mark.skipif(store.disabled(), reason="nothing compiles")
def test_a_timeline_of_the_compiled_machine(cli: Cli, small: Path, tmp_path: Path) -> None:
    made = []
    for machine in ("simpy", "compiled"):
        path = tmp_path / f"{machine}.json"
        ended = cli("replay", small, "--machine", machine, "--timeline", path)
        assert ended.returncode == 0, ended.stderr
        made.append(json.loads(path.read_text()))
    assert made[0] == made[1]


@pytest.mark.skipif(store.disabled(), reason="nothing compiles")
def test_ordinary_python_runs_on_simpy(cli: Cli, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "counts.py"
    path.write_text(PLAIN)
    words = ("replay", small, "--policy", path, "--json")
    refused = cli(*words, "--machine", "compiled")
    assert refused.returncode == 2
    assert refused.stdout == ""
    assert "does not compile" in refused.stderr.splitlines()[-1]
    ended = cli(*words)
    assert result(ended)[1] == "simpy"
    (line,) = said(ended)
    assert line.startswith(f"note: machine simpy: policy '{path}' does not compile: ")
    assert result(cli(*words, "--machine", "simpy")) == result(ended)


@pytest.mark.skipif(store.disabled(), reason="nothing compiles")
def test_compile_says_what_it_does_and_clears(cli: Cli, nothing_compiled: Path) -> None:
    store.note(engine_module(), "", 10.0)
    for stored in (engine_module(), store.place("policy_Lru", "text")):
        store.write(stored.path, b"")
    store.note(store.place("policy_Lru", "text"), "", 0.5)
    shown = cli("compile", "--list")
    assert [line.split("_")[0] for line in shown.stdout.splitlines()[:2]] == ["engine", "policy"]
    assert shown.stdout.splitlines()[-1] == f"in {nothing_compiled}"
    assert cli("compile", "--clear").stdout.startswith("2 modules deleted")
    assert not nothing_compiled.exists()
    assert cli("compile", "--clear").stdout.startswith("0 modules deleted")


@pytest.mark.skipif(store.disabled(), reason="nothing compiles")
def test_compile_makes_a_policy_ready(cli: Cli) -> None:
    """With the folder of the tests, in which the host program is compiled once."""
    ended = cli("compile", "static")
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("static: ready after ")
    prepared = lab.prepared(choose("static"), [[[0, 2]]], lab.make_costs())
    assert choose_machine("auto", prepared, 1).machine == "compiled"
    assert os.environ["MOESIM_CACHE_DIR"] in str(store.folder())


@pytest.mark.skipif(store.disabled(), reason="nothing compiles")
def test_compile_goes_on_after_a_policy_that_does_not(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "my-counts.py"
    path.write_text(PLAIN)
    ended = cli("compile", path, "static")
    assert ended.returncode == 2
    assert ended.stdout.startswith("static: ready after ")
    assert ended.stderr.splitlines()[-1] == f"moesim: these run on SimPy only: {path}"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("compile", "lruu"), "no policy named 'lruu'; there are: adapmoe, "),
        (("compile", "--clear", "lru"), "--clear deletes everything"),
        (("replay", "--machine", "torch"), "'torch' is not one of 'auto', 'simpy', 'compiled'"),
    ],
)
def test_bad_input(cli: Cli, words: tuple[str, ...], message: str) -> None:
    ended = cli(*words)
    assert ended.returncode == 2
    (line,) = ended.stderr.splitlines()
    assert message in line
