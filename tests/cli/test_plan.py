"""`moesim plan`: what a policy computes for itself is shown, with its numbers."""

import json
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


def test_notices_go_to_stderr(cli: Cli, small: Path) -> None:
    """With all sequences replayed nothing is left to look at beforehand."""
    ended = cli("plan", "moepic", small, "--batch", 3, "--cache-ratio", 0.3)
    assert "note: moepic's configurator looks at the part of the trace" in ended.stderr
    assert "note:" not in ended.stdout
