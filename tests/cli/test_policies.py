"""`moesim policies` lists what `--policy` takes."""

import json
from collections.abc import Callable
from subprocess import CompletedProcess

from moesim.policies.registry import choose, names

Cli = Callable[..., CompletedProcess[str]]


def test_policies_as_json(cli: Cli) -> None:
    ended = cli("policies", "--json")
    rows = {row["name"]: row for row in json.loads(ended.stdout)}

    assert ended.stderr == ""
    assert sorted(rows) == names()
    assert {"dali", "lru", "static"} <= set(rows)
    for row in rows.values():
        assert row["source"]
        assert row["defaults"] == {p["name"]: p["default"] for p in row["parameters"]}
    assert "arXiv 2602.03495" in rows["dali"]["source"]
    assert rows["dali"]["defaults"]["cache"] == "window"
    legal = {p["name"]: p["legal"] for p in rows["dali"]["parameters"]}
    assert legal["cache"] == "window|lru|lfu|static"
    assert legal["w_size"] == "whole number >= 0"
    assert legal["count_prefill"] == "true|false"


def test_what_is_listed_can_be_chosen(cli: Cli) -> None:
    for row in json.loads(cli("policies", "--json").stdout):
        given = ",".join(
            f"{p['name']}={str(p['default']).lower()}" for p in row["parameters"] if p["default"]
        )
        chosen = choose(f"{row['name']}:{given}")

        assert chosen.parameters == row["defaults"]
        assert chosen.spec == row["name"]


def test_policies_for_people(cli: Cli) -> None:
    ended = cli("policies")
    lines = ended.stdout.splitlines()

    assert ended.stderr == ""
    assert all(len(line) <= 80 for line in lines)
    for row in json.loads(cli("policies", "--json").stdout):
        assert any(line.startswith(row["name"] + "  ") for line in lines)
        for parameter in row["parameters"]:
            assert any(line.split()[:2] == [parameter["name"], "="] for line in lines)
    assert "--policy dali:prefetch_size=2,cache=lru" in ended.stdout
