"""`moesim sweep`: what it prints and writes, and that it goes on where it was killed."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pandas as pd
import pyarrow.parquet as pq
import pytest

from moesim.cli import sweep as module

Cli = Callable[..., CompletedProcess[str]]

GRID = """
trace: {trace}
machine: simpy
hardware: rtx3090-pcie4-ddr4
grid:
  policy: [lru, static]
  cache_ratio: [0.0001, 0.25, 0.5]
"""


@pytest.fixture
def grid(tmp_path: Path, small: Path) -> Path:
    """Return the file of a grid of 6 points, 2 of which cannot run: their budget holds nothing."""
    path = tmp_path / "grid.yaml"
    path.write_text(GRID.format(trace=small), encoding="utf-8")
    return path


def test_the_answer_comes_first(cli: Cli, grid: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.parquet"
    ended = cli("sweep", grid, "-o", output, "--jobs", 1)
    lines = ended.stdout.splitlines()
    rows = [row for row in pq.read_table(output).to_pylist() if row["error"] is None]
    best = max(rows, key=lambda row: float(row["tokens_per_s"]))

    assert (ended.returncode, ended.stderr) == (0, "")
    assert lines[0] == f"{best['tokens_per_s']:.2f} tokens/s   policy {best['run.policy']}"
    assert lines[1] == f"the fastest of 4 points: cache_ratio {best['cache_ratio']}"
    assert " ".join(lines[2:4]).split() == best["why"].split()
    for policy in ("lru", "static"):
        speed = max(row["tokens_per_s"] for row in rows if row["policy"] == policy)
        own = [line.split() for line in lines if line.startswith(policy)]
        assert own[0][1:3] == [f"{speed:.2f}", f"{speed / best['tokens_per_s']:.0%}"]
    assert "2 of 6 points cannot run" in lines
    reason = next(line for line in lines if "holds no expert" in line)
    assert reason.endswith("(2 such, the first at policy lru, cache_ratio 0.0001)")
    assert lines[-1] == f"{output}: 6 points, 0 of them done before"

    again = cli("sweep", grid, "-o", output, "--jobs", 1).stdout.splitlines()
    assert again[:-1] == lines[:-1]
    assert again[-1] == f"{output}: 6 points, 6 of them done before"


def test_json_is_everything_and_nothing_else(cli: Cli, grid: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.parquet"
    ended = cli("sweep", grid, "-o", output, "--jobs", 1, "--json")
    found = json.loads(ended.stdout)
    rows = pq.read_table(output).to_pylist()

    assert (ended.returncode, ended.stderr) == (0, "")
    assert (found["points"], found["done_before"]) == (6, 0)
    assert found["axes"] == [{"policy": ["lru", "static"]}, {"cache_ratio": [0.0001, 0.25, 0.5]}]
    speed = max(row["tokens_per_s"] for row in rows if row["error"] is None)
    best = next(row for row in rows if row["tokens_per_s"] == speed)
    assert best.items() >= found["best"].items()
    assert found["policies"][0]["point"] == found["best"]["point"]
    assert (found["pareto"]["more"], found["pareto"]["less"]) == (
        "tokens_per_s",
        "run.budget_bytes",
    )
    assert found["pareto"]["points"][-1]["tokens_per_s"] == speed
    assert [row["policy"] for row in found["failed"]] == ["lru", "static"]


def test_a_dry_run_does_nothing(cli: Cli, grid: Path, tmp_path: Path) -> None:
    output = tmp_path / "r.parquet"
    lines = cli("sweep", grid, "-o", output, "--dry-run").stdout.splitlines()

    assert lines == [
        "6 points: 0 are done, 6 are left, which take nobody knows how long: none was run yet",
        "",
        "  policy: lru, static",
        "  cache_ratio: 0.0001, 0.25, 0.5",
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["grid.yaml"]

    cli("sweep", grid, "-o", output)
    folder = tmp_path / "r.parquet.points"
    for row in pq.read_table(output).to_pylist()[3:]:
        (folder / f"{row['point']}.json").unlink()
    before = sorted(folder.iterdir())
    ended = cli("sweep", grid, "-o", output, "--dry-run", "--json", "--jobs", 1)
    found = json.loads(ended.stdout)
    assert (found["points"], found["done"], found["failed"], found["left"]) == (6, 3, 1, 3)
    assert found["left_s"] > 0
    line = cli("sweep", grid, "-o", output, "--dry-run").stdout.splitlines()[0]
    assert line.startswith("6 points: 3 are done (1 of them failed), 3 are left, which take about ")
    assert sorted(folder.iterdir()) == before

    cli("sweep", grid, "-o", output)
    line = cli("sweep", grid, "-o", output, "--dry-run").stdout.splitlines()[0]
    assert line == "6 points: 6 are done (2 of them failed), nothing is left"
    line = cli("sweep", grid, "-o", output, "--dry-run", "--retry-failed").stdout.splitlines()[0]
    assert line.startswith("6 points: 4 are done, 2 are left")


def test_if_nothing_can_run_the_status_says_so(cli: Cli, small: Path, tmp_path: Path) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(f"trace: {small}\nmachine: simpy\ngrid: {{budget: [1, 2]}}\n", "utf-8")
    ended = cli("sweep", path, "-o", tmp_path / "r.parquet")

    assert ended.returncode == 1
    assert ended.stdout.splitlines()[0] == "2 of 2 points cannot run"
    assert len(pd.read_parquet(tmp_path / "r.parquet")) == 2


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ("polcy: lru", [], "no key 'polcy'; there are: policy, "),
        ("grid: {seed: [1", [], "grid.yaml: line "),
        ("trace: none.npz", [], "none.npz"),
        ("seed: 1", ["-o", "r.csv"], "r.csv: the output is a Parquet file"),
        ("seed: 1", ["-o", "none/r.parquet"], "there is no folder"),
        ("seed: 1", ["--jobs", "2", "--scheduler", "tcp://a:1"], "exclude each other"),
        ("seed: 1", ["--jobs", "0"], "x>=1"),
    ],
)
def test_bad_input_is_one_line(
    cli: Cli, tmp_path: Path, text: str, words: list[str], said: str
) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text, "utf-8")
    ended = cli("sweep", path, "-o", tmp_path / "r.parquet", *words)

    assert (ended.returncode, ended.stdout) == (2, "")
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["grid.yaml"]


def test_without_a_terminal_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 10.0, 31.0, 45.0, 70.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    progress = module.lines()
    for done in (11, 12, 13, 14, 15):
        progress(done, 110)

    assert capsys.readouterr().err.splitlines() == [
        "note: 13 of 110 points, about 25 min left",
        "note: 15 of 110 points, about 28 min left",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (119, "119 s"), (120, "2 min"), (7200, "2 h"), (200_000, "2 days")],
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert module.in_words(seconds) == words


SLOW = """
machine: simpy
hardware: rtx3090-pcie4-ddr4
policy: lru
prompt: 64
generate: 16
grid:
  cache_ratio: [0.25, 0.5]
  seed: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
"""


def alive(group: int) -> bool:
    """Say whether a process of a group has not ended."""
    found = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], check=True, capture_output=True)
    lines = [line.split() for line in found.stdout.decode().splitlines()]
    return any(int(own) == group and not state.startswith("Z") for own, state in lines)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_killed_sweep_goes_on_with_what_is_left(cli: Cli, tmp_path: Path, jobs: int) -> None:
    """Its processes end soon after it."""
    path, output = tmp_path / "grid.yaml", tmp_path / "r.parquet"
    path.write_text(SLOW, "utf-8")
    words = ["sweep", str(path), "-o", str(output), "--jobs", str(jobs)]
    code = "from moesim.cli import main; main()"
    folder = tmp_path / "r.parquet.points"
    with subprocess.Popen(
        [sys.executable, "-c", code, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as running:
        while running.poll() is None and len(list(folder.glob("*.json"))) < 4:
            time.sleep(0.002)
        running.kill()
    assert running.returncode == -signal.SIGKILL
    until = time.monotonic() + 30
    while alive(running.pid):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not output.exists()
    before = {file.name: file.stat() for file in folder.glob("*.json")}
    assert 4 <= len(before) < 24

    ended = cli(*words)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1].endswith(f"24 points, {len(before)} of them done before")
    after = {file.name: file.stat() for file in folder.glob("*.json")}
    assert len(after) == 24
    for name, stat in before.items():
        assert (after[name].st_ino, after[name].st_mtime_ns) == (stat.st_ino, stat.st_mtime_ns)

    whole = tmp_path / "whole.parquet"
    cli("sweep", path, "-o", whole, "--jobs", 1)
    table, other = (pd.read_parquet(file).drop(columns="run.wall_s") for file in (output, whole))
    pd.testing.assert_frame_equal(table, other)
    assert list(zip(table.cache_ratio, table.seed, strict=True)) == [
        (ratio, seed) for ratio in (0.25, 0.5) for seed in range(12)
    ]
