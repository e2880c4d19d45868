import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import msgspec
import pytest

from moesim.sim.curves import RULES, curves
from moesim.traces.format import MISSING, read_trace, write_trace

Cli = Callable[..., CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path / "compiled"))


def test_json_has_a_row_per_rule_size_and_layer(cli: Cli, small: Path) -> None:
    ended = cli("cache", small, "--rule", "belady,lru", "--sizes", "8,2", "--json")
    found = json.loads(ended.stdout)
    trace = read_trace(small)

    assert (ended.returncode, ended.stderr) == (0, "")
    assert found["digest"] == trace.digest()
    assert (found["clock"], found["tokens"], found["lookups"]) == ("token", 30, 240)
    rates = curves(trace, ["belady", "lru"], [2, 8]).hit_rates()
    assert found["curves"] == [
        {"rule": rule, "size": size, "layer": layer, "hit_rate": rates[r, s, layer]}
        for r, rule in enumerate(["belady", "lru"])
        for s, size in enumerate([2, 8])
        for layer in range(4)
    ]


def test_the_same_input_gives_the_same_bytes(cli: Cli, small: Path) -> None:
    words = ["cache", small, "--json"]

    assert cli(*words).stdout == cli(*words).stdout


def test_by_default_all_rules_at_sizes_that_hold_a_token(cli: Cli, small: Path) -> None:
    found = json.loads(cli("cache", small, "--json").stdout)

    assert list(dict.fromkeys(row["rule"] for row in found["curves"])) == list(RULES)
    assert sorted({row["size"] for row in found["curves"]}) == [2, 4, 8, 12]


def test_what_is_named_twice_is_shown_once(cli: Cli, small: Path) -> None:
    once = cli("cache", small, "--rule", "lru,fifo", "--sizes", "2,4", "--json")
    twice = cli("cache", small, "--rule", "lru, fifo,lru", "--sizes", "4, 2,4", "--json")

    assert once.stdout == twice.stdout


def test_the_clock_is_what_was_asked_for(cli: Cli, small: Path) -> None:
    found = {
        clock: json.loads(cli("cache", small, "--clock", clock, "--sizes", 2, "--json").stdout)
        for clock in ("token", "access")
    }

    assert {clock: result["clock"] for clock, result in found.items()} == {
        clock: clock for clock in found
    }
    assert found["token"]["curves"] != found["access"]["curves"]


def test_table(cli: Cli, small: Path) -> None:
    ended = cli("cache", small, "--sizes", "4,16")
    lines = ended.stdout.splitlines()

    assert (ended.returncode, ended.stderr) == (0, "")
    assert lines[0] == "small: 30 tokens, 4 layers of 16 experts, top-2; 240 lookups"
    assert lines[2].startswith("Hit rate in %")
    assert lines[3].split()[3:] == list(RULES)
    assert lines[4].startswith("4 (25%)")
    assert lines[5].startswith("16 (100%)")
    rates = curves(read_trace(small), RULES, [16]).hit_rates()[0, 0] * 100
    assert f"{rates.mean():.1f} ({rates.min():.0f}-{rates.max():.0f})" in lines[5]
    assert lines[-1].startswith("belady knows")
    assert all(len(line) <= 80 for line in lines[:6])


def test_a_layer_that_was_not_recorded_has_no_hit_rate(
    cli: Cli, small: Path, tmp_path: Path
) -> None:
    trace = read_trace(small)
    for layers in ([1], [0, 1, 2, 3]):
        experts = trace.experts.copy()
        experts[:, layers] = MISSING
        path = tmp_path / f"{len(layers)}.npz"
        write_trace(msgspec.structs.replace(trace, experts=experts, weights=None), path)
        found = json.loads(cli("cache", path, "--json").stdout)
        empty = {row["layer"] for row in found["curves"] if row["hit_rate"] is None}
        assert empty == set(layers)
        assert cli("cache", path).returncode == 0
    assert " - " in cli("cache", path).stdout


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--rule", "lruu"], ["'lruu'", "there are: lru, lfu, fifo, belady"]),
        (["--rule", ""], ["''", "there are: lru, lfu, fifo, belady"]),
        (["--rule", "lru,"], ["''", "there are: lru, lfu, fifo, belady"]),
        (["--sizes", "0"], ["cache of 0 experts", "1..16"]),
        (["--sizes", "-1"], ["cache of -1 experts", "1..16"]),
        (["--sizes", "2,17"], ["cache of 17 experts", "1..16"]),
        (["--sizes", "2,,4"], ["--sizes ''", "8,16,32"]),
        (["--sizes", "1e3"], ["--sizes '1e3'", "8,16,32"]),
        (["--sizes", "2.5"], ["--sizes '2.5'", "8,16,32"]),
        (["--sizes", "9" * 5000], ["--sizes", "8,16,32"]),
        (["--clock", "second"], ["'second'", "there are: token, access"]),
    ],
    ids=lambda words: " ".join(words)[:20],
)
def test_bad_options_are_one_line(
    cli: Cli, small: Path, words: list[str], parts: list[str]
) -> None:
    ended = cli("cache", small, *words)

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert all(part in ended.stderr for part in parts), ended.stderr


def test_no_such_trace_is_one_line(cli: Cli, tmp_path: Path) -> None:
    ended = cli("cache", tmp_path / "none.npz")

    assert (ended.returncode, ended.stdout) == (2, "")
    assert "none.npz: no such file" in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
