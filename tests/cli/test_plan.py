"""`moesim plan`: what a policy computes for itself is shown, with its numbers."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from moesim.policies.registry import BUILTIN, load_class

Cli = Callable[..., CompletedProcess[str]]

PLANNERS = sorted(name for name in BUILTIN if hasattr(load_class(name), "plan"))


@pytest.mark.parametrize("name", PLANNERS)
def test_every_planner_explains_itself(cli: Cli, small: Path, name: str) -> None:
    """The same tables are printed and given as JSON; the first is on the first screen."""
    words = ("plan", name, small, "--batch", 2, "--cache-ratio", 0.3)
    shown, data = cli(*words), cli(*words, "--json")
    assert shown.returncode == data.returncode == 0, shown.stderr
    result = json.loads(data.stdout)
    assert result["policy"] == name
    assert result["tables"]
    for table in result["tables"]:
        assert table["title"] in shown.stdout
        assert table["rows"]
    assert shown.stdout.startswith(result["tables"][0]["title"])


def test_a_policy_that_plans_nothing_names_those_that_do(cli: Cli, small: Path) -> None:
    ended = cli("plan", "lru", small)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr == (
        f"moesim: policy 'lru' computes no settings; those that do: {', '.join(PLANNERS)}\n"
    )


def write_planner(folder: Path, row: str) -> Path:
    """Write a policy whose plan is one table with one row."""
    file = folder / "planner.py"
    file.write_text(f"""
import numpy as np
from moesim.policies.api import Table
from moesim.policies.on_demand import OnDemand

class Planner(OnDemand):
    def plan(self, setting):
        return (Table("Found", ("slots", "share", "fits", "name"), ({row},)),)
""")
    return file


def test_a_plan_may_hold_numbers_of_numpy(cli: Cli, small: Path, tmp_path: Path) -> None:
    file = write_planner(tmp_path, "(np.int64(4), np.float64(0.5), np.bool_(True), 'a')")
    shown, data = cli("plan", file, small), cli("plan", file, small, "--json")
    rows = json.loads(data.stdout)["tables"][0]["rows"]
    assert rows == [{"slots": 4, "share": 0.5, "fits": True, "name": "a"}]
    assert shown.stdout.splitlines()[2].split() == ["4", "0.500", "yes", "a"]


@pytest.mark.parametrize("row", ["(1, 2)", "(1 // 0, 2, 3, 4)"])
def test_a_plan_that_fails_says_where(cli: Cli, small: Path, tmp_path: Path, row: str) -> None:
    ended = cli("plan", write_planner(tmp_path, row), small)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert re.search(r"planner.py', plan: (Value|ZeroDivision)Error: ", ended.stderr)
    assert "Traceback" not in ended.stderr


def test_notices_go_to_stderr(cli: Cli, small: Path) -> None:
    """With all sequences replayed nothing is left to look at beforehand."""
    ended = cli("plan", "moepic", small, "--batch", 3, "--cache-ratio", 0.3)
    assert "note: moepic's configurator looks at the part of the trace" in ended.stderr
    assert "note:" not in ended.stdout
