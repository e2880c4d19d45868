"""`moesim compare`: what it prints and writes, and what it refuses."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from moesim.answers.documents import Compared, understood

Cli = Callable[..., CompletedProcess[str]]

FEW = ("--policies", "lru,dali,all-gpu", "--cache-ratio", 0.25, "--machine", "simpy", "--jobs", 1)


@pytest.fixture
def result(cli: Cli) -> Callable[..., dict[str, Any]]:
    """Return a function that compares and gives the results."""

    def run(*words: object) -> dict[str, Any]:
        ended = cli("compare", "--json", *words)
        assert ended.returncode == 0, ended.stderr
        found: dict[str, Any] = json.loads(ended.stdout)
        return found

    return run


@pytest.mark.parametrize("columns", [80, 100])
def test_the_answer_comes_first_then_a_table_that_fits(
    columns: int, cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    ended = cli("compare", small, "--policy", "dali:swap=guarded", *FEW)
    lines = ended.stdout.splitlines()

    assert ended.returncode == 0, ended.stderr
    assert " is fastest: " in lines[0]
    assert " tokens/s, " in lines[0]
    assert "of the time the GPU" in lines[1]
    assert lines[2].startswith("No policy that keeps results can exceed ")
    assert lines[4].endswith("batch 1; 6 prompt + 5 generated tokens")
    names = [line.split()[1] for line in lines[7:11]]
    assert set(names) == {"lru", "dali", "dali:swap=guarded", "static"}
    assert all(len(line) <= columns for line in lines[5:])
    text = " ".join(ended.stdout.split())
    for words in ("times static", "cannot run: policy 'all-gpu'", "gain: from on-demand (0%"):
        assert words in text
    for words in ("3 windows of the trace", "15%, assumed of datasheet numbers"):
        assert words in text
    assert "…" not in ended.stdout


def test_json_is_all_of_stdout_and_what_a_report_reads(cli: Cli, small: Path) -> None:
    ended = cli("compare", small, "--json", *FEW)
    found = json.loads(ended.stdout)

    assert isinstance(understood(found, "it"), Compared)
    assert all(line.startswith("note: ") for line in ended.stderr.splitlines())
    assert found["baseline"] == "static"
    assert found["model"] == "small"
    assert [one["policy"] for one in found["refused"]] == ["all-gpu"]
    assert found["simulated"] == {"replays": 2 * 3 + 3 * (3 + 4), "machines": ["simpy"]}
    for row in found["rows"]:
        assert row["low"] <= row["tokens_per_s"] <= row["high"]
        assert row["makespan_ns"] == sum(row["time_ns"].values())
        assert len(row["hit_rate_by_layer"]) == 4


def test_a_row_is_what_replay_says_with_its_share_of_the_gain(
    cli: Cli, result: Callable[..., dict[str, Any]], small: Path
) -> None:
    same = ("--batch", 2, "--cache-ratio", 0.3, "--bits", 8, "--layers", 3, "--start", 1)
    words = (small, *same, "--set", "link.h2d.bytes_per_s=3e9", "--machine", "simpy", "--seed", 3)
    found = result(*words, "--policies", "dali", "--windows", 1, "--jobs", 1)
    ended = cli("replay", "--json", *words, "--policy", "dali", "--share")
    alone = json.loads(ended.stdout)

    (row,) = (row for row in found["rows"] if row["policy"] == "dali")
    for key in ("tokens_per_s", "ttft_ms", "tpot_ms", "makespan_ns", "time_ns", "hit_rate"):
        assert row[key] == pytest.approx(alone[key]), key
    assert row["gain"] == pytest.approx(alone["gain"]["share"])
    for key in ("trace", "model_digest", "hardware_digest"):
        assert found["workload"][key] == alone["run"][key]


def test_the_bound_is_that_of_moesim_bound(
    cli: Cli, result: Callable[..., dict[str, Any]], small: Path
) -> None:
    words = (small, "--budget", "8MiB", "--batch", 3)
    alone = json.loads(cli("bound", "--json", *words).stdout)
    found = result(*words, "--policies", "lru", "--machine", "simpy", "--windows", 1)

    assert found["cells"][0]["bound_tokens_per_s"] == pytest.approx(alone["tokens_per_s"])


def test_lists_make_a_table_each_with_the_answers_above(cli: Cli, small: Path) -> None:
    words = ("--policies", "lru", "--machine", "simpy", "--jobs", 1, "--windows", 1)
    text = cli("compare", small, *words, "--cache-ratios", ".25, .5", "--batches", "1,3").stdout

    lines = text.splitlines()
    for line, (size, batch) in zip(lines, [(12, 1), (12, 3), (24, 1), (24, 3)], strict=False):
        share = "25%" if size == 12 else "50%"
        assert line.startswith(f"{size:.2f} MiB for experts ({share} of all), batch {batch}: ")
    assert text.count("times static") >= 4
    assert "is not known from one" in " ".join(text.split())


def test_what_was_chosen_for_the_user_is_noted(cli: Cli, small: Path) -> None:
    ended = cli("compare", small, "--policies", "lru", "--machine", "simpy", "--windows", 1)
    notes = ended.stderr.splitlines()

    assert notes[0].startswith("note: hardware: preset ")
    assert notes[1].startswith("note: budget 72.00 MiB, 100% of all experts")
    assert len(notes) == 2


def test_csv_has_a_row_per_policy(cli: Cli, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    ended = cli("compare", small, *FEW, "--csv", path, "--json")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = json.loads(ended.stdout)["rows"]

    assert [row["policy"] for row in rows] == [row["policy"] for row in expected]
    for row, one in zip(rows, expected, strict=True):
        assert float(row["tokens_per_s"]) == one["tokens_per_s"]
        assert int(row["time_ns.wait_weights"]) == one["time_ns"]["wait_weights"]
        assert row["tied"] == "; ".join(one["tied"])
    assert list(tmp_path.iterdir()) == [path]


def test_pictures_are_drawn_into_a_folder(cli: Cli, small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    ended = cli("compare", small, *FEW, "--plot", folder)

    assert ended.returncode == 0, ended.stderr
    drawn = sorted(folder.iterdir())
    assert drawn
    assert all(str(path) in ended.stderr for path in drawn)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--policies", "lru,nope"), "no policy named 'nope'; there are: "),
        (("--policies", "lru:staging=2"), "takes names alone"),
        (("--policies", ","), "names no policy"),
        (("--policy", "lru:nope=1"), "policy lru: no parameter 'nope=1'"),
        (("--budgets", "4XB"), "budget 4XB: write a size"),
        (("--budgets", ","), "--budgets ',': write 4GiB,8GiB"),
        (("--batches", "1,x"), "--batches '1,x': write whole numbers from 1 on, as 1,8"),
        (("--batches", "1", "--batch", 2), "--batch and --batches exclude each other"),
        (("--cache-ratios", ".5,x"), "--cache-ratios '.5,x': write numbers from 0 to 1"),
        (("--cache-ratios", "1.5"), "cache ratio 1.5 is not in 0..1"),
        (("--cache-ratios", ".5", "--budget", "8MiB"), "exclude each other: give one"),
        (("--policies", "all-gpu", "--baseline", "all-gpu", "--cache-ratio", 0.5), "no policy can"),
        (("--windows", 0), "--windows"),
        (("--jobs", 0), "--jobs"),
        (("--csv", "/nowhere/rows.csv"), "there is no folder /nowhere"),
        (("--plot", "/dev/null/pictures"), "nothing can be written there"),
    ],
)
def test_bad_input_is_one_line(words: tuple[object, ...], said: str, cli: Cli, small: Path) -> None:
    ended = cli("compare", small, "--machine", "simpy", "--jobs", 1, *words)

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert said in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


def test_the_trace_is_not_overwritten(cli: Cli, small: Path) -> None:
    before = small.read_bytes()
    ended = cli("compare", small, *FEW, "--csv", small)

    assert ended.returncode == 2
    assert "must be different files" in ended.stderr
    assert small.read_bytes() == before
