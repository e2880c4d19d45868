"""`moesim bound`: what it prints, and that `moesim replay` never beats it."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from moesim.sim.metrics import share_of_gain

Cli = Callable[..., CompletedProcess[str]]


@pytest.fixture
def found(cli: Cli) -> Callable[..., dict[str, Any]]:
    def run(*words: object) -> dict[str, Any]:
        ended = cli(*words, "--json")
        assert ended.returncode == 0, ended.stderr
        result: dict[str, Any] = json.loads(ended.stdout)
        return result

    return run


def test_the_example_is_bounded_without_arguments(cli: Cli) -> None:
    ended = cli("bound")
    first = ended.stdout.splitlines()[0]
    assert first.startswith("No policy can be faster than ")
    assert " tokens/s" in first


@pytest.mark.parametrize("words", [[], ["--cache-ratio", "0.2"], ["--batch", "3"]], ids=str)
def test_a_replay_of_the_same_words_is_slower(
    found: Callable[..., dict[str, Any]], small: Path, words: list[str]
) -> None:
    bound = found("bound", small, *words)
    replayed = found("replay", small, "--policy", "lru", *words)

    assert bound["makespan_ns"] <= replayed["makespan_ns"]
    assert bound["tokens_per_s"] >= replayed["tokens_per_s"]
    assert sum(bound["terms_ns"].values()) == bound["makespan_ns"]
    for key in ("trace", "model_digest", "hardware_digest", "budget_bytes", "bits"):
        assert bound["run"][key] == replayed["run"][key]


def test_less_budget_and_a_slower_link_bind(
    found: Callable[..., dict[str, Any]], small: Path, cli: Cli
) -> None:
    slow = ("--set", "link.h2d.bytes_per_s=1e+8", "--set", "cpu.expert_bytes_per_s=1e+8")
    tight = found("bound", small, "--cache-ratio", "0.1", *slow)

    assert found("bound", small, "--cache-ratio", "1", *slow)["terms_ns"]["weights"] == 0
    assert tight["binds"] == "weights"
    assert "the budget does not hold" in cli("bound", small, "--cache-ratio", 0.1, *slow).stdout


def test_more_may_be_allowed(found: Callable[..., dict[str, Any]], small: Path, cli: Cli) -> None:
    words = ("bound", small, "--cache-ratio", "0.1", "--set", "cpu.expert_bytes_per_s=1e+9")
    strict = found(*words)
    fewer_bits = found(*words, "--allow-bits", "2")
    deferred = found(*words, "--allow-deferral")

    assert strict["allowed"] == {"bits": [16], "deferral": False}
    assert fewer_bits["allowed"] == {"bits": [16, 2], "deferral": False}
    assert fewer_bits["makespan_ns"] < strict["makespan_ns"]
    assert deferred["makespan_ns"] < strict["makespan_ns"]
    assert "2 bit, deferral" in cli(*words, "--allow-bits", "2", "--allow-deferral").stdout


def test_a_bad_trace_is_one_line(cli: Cli, tmp_path: Path) -> None:
    ended = cli("bound", tmp_path / "none.npz")
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1


# The share of the achievable gain, of `moesim replay --share`.


@pytest.mark.parametrize(("policy", "share"), [("on-demand", 0.0), ("oracle", 1.0)])
def test_the_references_reach_nothing_and_all(
    found: Callable[..., dict[str, Any]], small: Path, policy: str, share: float
) -> None:
    result = found("replay", small, "--policy", policy, "--cache-ratio", "0.3", "--share")
    assert result["gain"]["share"] == share
    own = f"{policy.replace('-', '_')}_ns"
    assert result["gain"][own] == result["makespan_ns"]


def test_the_share_is_of_the_time_between_them(
    found: Callable[..., dict[str, Any]], small: Path, cli: Cli
) -> None:
    words = ("replay", small, "--policy", "lru", "--cache-ratio", "0.3")
    result = found(*words, "--share")
    gain = result.pop("gain")
    slow, fast = gain["on_demand_ns"], gain["oracle_ns"]
    assert gain["share"] == (slow - result["makespan_ns"]) / (slow - fast)
    plain = found(*words)
    for each in (plain, result):
        del each["run"]["wall_s"]
    assert result == plain

    lines = cli(*words, "--share").stdout.splitlines()
    start = f"{gain['share']:.1%} of the time that is to be gained from on-demand ("
    assert sum(line.startswith(start) for line in lines) == 1


def test_a_share_may_lie_outside_and_may_not_exist() -> None:
    assert share_of_gain(120, 100, 50) == -0.4
    assert share_of_gain(40, 100, 50) == 1.2
    assert share_of_gain(40, 50, 50) is None
