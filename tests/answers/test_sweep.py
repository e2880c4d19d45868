"""Sweeps: the same rows wherever they run and whatever is killed, each point once."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import moesim
from moesim import __version__
from moesim.answers import runners
from moesim.answers.grid import grid_of
from moesim.answers.parallel import processes
from moesim.answers.points import Point, flat, row_of
from moesim.answers.runners import Task, check_workers, result_of, version_here, with_machines
from moesim.answers.store import Finished, Store
from moesim.answers.sweep import folder_of, plan_of, sweep
from moesim.answers.swept import MEMORY, SPEED, Swept, front
from moesim.errors import InputError
from moesim.sim.engine import Choice
from moesim.traces.bundled import example_path
from moesim.traces.format import read_trace, write_trace

FIXED = {"prompt": 4, "generate": 4, "machine": "simpy", "hardware": "rtx3090-pcie4-ddr4"}
GRID = {
    **FIXED,
    "grid": {"policy": ["lru", "static", "all-cpu"], "cache_ratio": [0.25, 0.5], "seed": [0, 1]},
}
"""12 points of the trace that ships with moesim."""

MORTAL = """
import os
import signal
from pathlib import Path

from moesim.policies.lru import Lru


class Mortal(Lru):
    @classmethod
    def new(cls, setting, lives: int = 1, weak: int = 3):
        deaths = Path(__file__).with_name("deaths")
        before = deaths.read_text() if deaths.exists() else ""
        if setting.seed == weak and len(before) < lives:
            deaths.write_text(before + "x")
            os.kill(os.getpid(), signal.SIGKILL)
        made = Lru.new(setting)
        return cls(made.cache, made.staging)
"""
"""A policy that kills its process so many times, at one seed."""


def results(swept: Swept) -> pd.DataFrame:
    """Return everything that must not depend on where and when it ran."""
    return swept.frame().drop(columns=["run.wall_s"])


def files(output: Path) -> dict[str, tuple[int, int]]:
    """Return what identifies each point's file: it changes when a point is run again."""
    found = folder_of(output).glob("*.json")
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


@pytest.fixture(scope="module")
def swept() -> Swept:
    return sweep(GRID, jobs=1)


@pytest.fixture(scope="module")
def expected(swept: Swept) -> pd.DataFrame:
    return results(swept)


def test_each_point_is_its_replay(swept: Swept, expected: pd.DataFrame) -> None:
    assert len(expected) == 12
    assert list(expected.columns[:5]) == ["policy", "cache_ratio", "seed", "point", "error"]
    assert list(zip(expected.policy, expected.cache_ratio, expected.seed, strict=True)) == [
        (policy, ratio, seed)
        for policy in ("lru", "static", "all-cpu")
        for ratio in (0.25, 0.5)
        for seed in (0, 1)
    ]
    row = list(swept.rows())[3]
    found = moesim.replay(policy="lru", cache_ratio=0.5, seed=1, **FIXED)  # type: ignore[arg-type]
    own = {"run.policy" if k == "policy" else k: v for k, v in flat(found.data).items()}
    del own["run.wall_s"]
    assert all(row[key] == own[key] for key in own)
    assert row["why"] == found.why
    assert expected.error.isna().all()


def test_processes_give_the_same_table(expected: pd.DataFrame, tmp_path: Path) -> None:
    output = tmp_path / "r.parquet"
    told: list[tuple[int, int]] = []
    swept = sweep(GRID, output, 2, progress=lambda done, total: told.append((done, total)))

    pd.testing.assert_frame_equal(results(swept), expected)
    pd.testing.assert_frame_equal(pd.read_parquet(output), swept.frame())
    assert told == [(done, 12) for done in range(1, 13)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.parquet", "r.parquet.points"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    from distributed import LocalCluster

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its processes leave is theirs
        with LocalCluster(
            n_workers=2, threads_per_worker=1, processes=True, dashboard_address=":0"
        ) as made:
            yield made


def test_a_cluster_gives_the_same_table(
    expected: pd.DataFrame, cluster: Any, tmp_path: Path
) -> None:
    output = tmp_path / "r.parquet"
    swept = sweep(GRID, output, scheduler=cluster.scheduler_address)

    pd.testing.assert_frame_equal(results(swept), expected)
    assert len(files(output)) == 12


def test_a_killed_worker_of_a_cluster_costs_nothing(cluster: Any, tmp_path: Path) -> None:
    """The point goes to another worker, and is done."""
    (tmp_path / "mortal.py").write_text(MORTAL, encoding="utf-8")
    output = tmp_path / "r.parquet"
    grid = {**FIXED, "policy": str(tmp_path / "mortal.py"), "cache_ratio": 0.5}
    swept = sweep(
        {**grid, "grid": {"seed": [1, 2, 3, 4]}}, output, scheduler=cluster.scheduler_address
    )

    assert (tmp_path / "deaths").read_text() == "x"
    assert list(swept.frame().seed) == [1, 2, 3, 4]
    assert not swept.failed
    assert len(files(output)) == 4


def test_a_scheduler_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "CLUSTER_S", 0.2)
    with pytest.raises(InputError, match=r"no Dask scheduler answers at tcp://127.0.0.1:9"):
        sweep(GRID, scheduler="tcp://127.0.0.1:9")
    with pytest.raises(InputError, match="jobs and scheduler exclude each other"):
        sweep(GRID, jobs=2, scheduler="tcp://127.0.0.1:9")


def test_a_cluster_without_workers_or_with_another_moesim(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stub:
        def __init__(self) -> None:
            self.versions: dict[str, str] = {}

        def wait_for_workers(self, count: int, timeout: float) -> None:
            if not self.versions:
                raise TimeoutError

        def run(self, function: Any) -> dict[str, str]:
            return self.versions

    stub = Stub()
    with pytest.raises(InputError, match="the scheduler at x has no workers"):
        check_workers(stub, "x")
    stub.versions = {"a": __version__, "b": "0.0.1"}
    with pytest.raises(InputError, match=r"the workers of x have moesim 0\.0\.1, "):
        check_workers(stub, "x")
    stub.versions = {"a": version_here()}
    check_workers(stub, "x")


def test_what_comes_back_from_a_cluster() -> None:
    from distributed import KilledWorker
    from distributed.client import FutureCancelledError

    class Stub:
        def __init__(self, what: Any) -> None:
            self.what = what

        def result(self) -> Any:
            if isinstance(self.what, Exception):
                raise self.what
            return self.what

    kept = Finished(point=Point(), error="no", seconds=0.0)
    assert result_of(Stub(kept), "x") is kept
    assert result_of(Stub(KilledWorker("key", None, 3)), "x") is None
    with pytest.raises(InputError, match="the scheduler at x was lost"):
        result_of(Stub(FutureCancelledError("key", "lost")), "x")


# Killed, and resumed.


def test_what_is_done_is_not_run_again(expected: pd.DataFrame, tmp_path: Path) -> None:
    output = tmp_path / "r.parquet"
    part = {**GRID, "grid": {**GRID["grid"], "policy": ["static"]}}  # type: ignore[dict-item]
    sweep(part, output, 1)
    before = files(output)
    assert len(before) == 4

    swept = sweep(GRID, output, 1)
    pd.testing.assert_frame_equal(results(swept), expected)
    assert swept.earlier == 4
    assert before.items() <= files(output).items()
    assert len(files(output)) == 12

    again = files(output)
    pd.testing.assert_frame_equal(results(sweep(GRID, output, 1)), expected)
    assert files(output) == again


def test_a_broken_point_is_made_again(expected: pd.DataFrame, tmp_path: Path) -> None:
    output = tmp_path / "r.parquet"
    sweep(GRID, output, 1)
    broken = next(folder_of(output).glob("*.json"))
    broken.write_bytes(b"{")
    (folder_of(output) / "0123.99999.part").touch()
    before = files(output)

    pd.testing.assert_frame_equal(results(sweep(GRID, output, 1)), expected)
    after = files(output)
    assert {name for name in before if before[name] != after[name]} == {broken.name}
    assert not list(folder_of(output).glob("*.part"))


def test_a_killed_process_costs_only_its_point(tmp_path: Path) -> None:
    (tmp_path / "mortal.py").write_text(MORTAL, encoding="utf-8")
    output = tmp_path / "r.parquet"
    grid = {**FIXED, "cache_ratio": 0.5, "grid": {"seed": list(range(12))}}
    swept = sweep({**grid, "policy": str(tmp_path / "mortal.py")}, output, 2)

    assert (tmp_path / "deaths").read_text() == "x"
    assert not swept.failed
    assert list(swept.frame().seed) == list(range(12))
    assert len(files(output)) == 12
    names = ["tokens_per_s", "makespan_ns", "run.operations"]
    plain = sweep({**grid, "policy": "lru"}, None, 1)
    pd.testing.assert_frame_equal(swept.frame()[names], plain.frame()[names])


def test_a_point_that_kills_its_processes_is_failed(tmp_path: Path) -> None:
    """Few points are done in this process, but not those at which an earlier one was killed."""
    (tmp_path / "mortal.py").write_text(MORTAL, encoding="utf-8")
    policy = str(tmp_path / "mortal.py")
    grid = {**FIXED, "cache_ratio": 0.5, "policy": f"{policy}:lives=99", "grid": {"seed": [2, 3]}}
    output = tmp_path / "r.parquet"
    store = Store(folder_of(output))
    store.folder.mkdir()
    store.begin(plan_of(grid_of(grid), store).tasks[1].digest)
    swept = sweep(grid, output, 1)

    assert [row["seed"] for row in swept.failed] == [3]
    assert swept.failed[0]["error"].startswith("its process was killed 3 times")
    assert len(swept.good) == 1
    assert (tmp_path / "deaths").read_text() == "xxx"


def test_what_changes_while_it_is_swept_is_not_kept(tmp_path: Path) -> None:
    """A result would be kept as that of the file as it was."""
    trace = tmp_path / "trace.npz"
    trace.write_bytes(example_path().read_bytes())
    grid = {**FIXED, "trace": str(trace), "cache_ratio": 0.5, "grid": {"seed": [0, 1, 2]}}
    output = tmp_path / "r.parquet"

    def progress(done: int, total: int) -> None:
        write_trace(read_trace(trace).at(np.arange(2000)), trace)

    with pytest.raises(InputError, match="has changed since the sweep began"):
        sweep(grid, output, 1, progress=progress)
    assert len(files(output)) == 1
    assert not output.exists()
    assert sweep(grid, output, 1).earlier == 0


def test_the_table_is_written_before_another_sweep_may_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "r.parquet"

    def write_table(*_: Any) -> None:
        with pytest.raises(InputError, match="another sweep is writing there"):
            sweep({**FIXED, "cache_ratio": 0.5}, output, 1)

    with monkeypatch.context() as patched:
        patched.setattr("moesim.answers.sweep.write_table", write_table)
        sweep({**FIXED, "cache_ratio": 0.5}, output, 1)
    assert not output.exists()
    sweep({**FIXED, "cache_ratio": 0.5}, output, 1)
    assert output.exists()


# Failures.

FAULTY = """
from moesim.policies.lru import Lru


class Faulty(Lru):
    @classmethod
    def new(cls, setting, how: int = 0):
        if setting.seed == 1:
            raise MemoryError
        if setting.seed == 2:
            raise ZeroDivisionError("two\\nlines")
        if setting.seed == 3:
            raise SystemExit(0)
        made = Lru.new(setting)
        return cls(made.cache, made.staging)
"""


def test_failures_are_noted_and_stop_nothing(tmp_path: Path) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY, encoding="utf-8")
    output = tmp_path / "r.parquet"
    policy = str(tmp_path / "faulty.py")
    grid = {
        **FIXED,
        "grid": {"policy": [policy], "budget": [1, "4MiB"], "seed": [0, 1, 2, 3]},
    }
    swept = sweep(grid, output, 1)
    table = pq.read_table(output).to_pylist()

    assert [row["error"] is None for row in table] == [*[False] * 4, True, *[False] * 3]
    assert {row["error"].partition(" of 1 byte")[0] for row in table[:4]} == {"a budget"}
    assert "two lines" in table[6]["error"]
    assert table[7]["error"] == "SystemExit: 0"
    assert all("\n" not in (row["error"] or "") for row in table)
    assert [row["tokens_per_s"] is None for row in table] == [
        row["error"] is not None for row in table
    ]
    assert [row["budget"] for row in table] == [*["1"] * 4, *["4MiB"] * 4]
    assert len(swept.failed) == 7
    assert len(swept.good) == 1

    before = files(output)
    assert len(sweep(grid, output, 1).failed) == 7
    assert files(output) == before
    assert plan_of(grid_of(grid), Store(folder_of(output)), True).done == 1
    swept = sweep(grid, output, 1, retry_failed=True)
    after = files(output)
    assert len(swept.failed) == 7
    assert sum(before[name] == after[name] for name in before) == 1


def test_if_nothing_can_run(tmp_path: Path) -> None:
    swept = sweep({**FIXED, "grid": {"budget": [1, 2]}}, tmp_path / "r.parquet", 1)

    assert swept.best() is None
    assert swept.pareto().empty
    assert swept.by_policy() == []
    assert repr(swept).startswith("none of 2 points can run\na budget of 1 bytes")
    assert "none of 2 points" in swept._repr_html_()
    assert list(pd.read_parquet(tmp_path / "r.parquet").budget) == [1, 2]


def test_points_that_are_the_same_are_one(tmp_path: Path) -> None:
    grid = {**FIXED, "grid": {"hardware": ["rtx3090-pcie4-ddr4", "RTX3090-pcie4-ddr4"]}}
    del grid["hardware"]
    swept = sweep(grid, tmp_path / "r.parquet", 1)

    assert list(swept.frame().hardware) == ["rtx3090-pcie4-ddr4"]


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("r.csv", "the output is a Parquet file"),
        ("nowhere/r.parquet", "there is no folder"),
        ("folder.parquet", "is no regular file"),
    ],
)
def test_outputs_that_cannot_be_written(output: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "folder.parquet").mkdir()
    with pytest.raises(InputError, match=said):
        sweep(GRID, tmp_path / output)
    assert [path.name for path in tmp_path.iterdir()] == ["folder.parquet"]


def test_without_an_output_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    swept = sweep({**FIXED, "cache_ratio": 0.5})
    assert len(swept.frame()) == 1
    del swept
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setattr(runners, "CLUSTER_S", 0.2)
    with pytest.raises(InputError, match="no Dask scheduler answers"):
        sweep({**FIXED, "cache_ratio": 0.5}, scheduler="tcp://127.0.0.1:9")
    assert list(tmp_path.iterdir()) == []


# Which machine.


def test_the_machine_is_chosen_for_all_points_of_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each policy is compiled once, if all its points together are worth it."""
    asked: dict[str, int] = {}
    made: list[str] = []

    def choose_machine(wanted: str, prepared: Any, layer_steps: int) -> Choice:
        asked[prepared.chosen.name] = layer_steps
        return Choice("compiled", "", compiles=True)

    def machine_for(prepared: Any, wanted: str, say: Any) -> str:
        made.append(prepared.chosen.name)
        if prepared.chosen.name == "static":
            raise InputError("does not compile")
        return wanted

    monkeypatch.setattr(runners, "choose_machine", choose_machine)
    monkeypatch.setattr(runners, "machine_for", machine_for)
    monkeypatch.setattr(runners, "record_of", lambda _: True)
    points = [
        Point(policy=policy, cache_ratio=0.5, prompt=4, generate=4, seed=seed)
        for policy in ("lru", "static")
        for seed in range(3)
    ]
    broken = Point(policy="dali", budget=1)
    own = Point(policy="lru", machine="simpy")
    said: list[str] = []
    tasks = [Task(str(at), point) for at, point in enumerate([*points, broken, own])]
    found = with_machines(tasks, 1, said.append)

    assert [task.point.machine for task in found] == [
        *["compiled"] * 3, *["simpy"] * 3, "auto", "simpy",
    ]  # fmt: skip
    assert [task.digest for task in found] == [task.digest for task in tasks]
    assert asked == {"lru": 3 * 4 * 8, "static": 3 * 4 * 8}
    assert made == ["lru", "static"]
    assert said == ["compiling policy lru first, once", "compiling policy static first, once"]


def test_few_points_are_not_worth_processes() -> None:
    assert [processes(count, 2) for count in (1, 4, 5, 8, 9)] == [1, 1, 2, 2, 2]


# What came of it.


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=30))
def test_the_front_by_brute_force(pairs: list[tuple[int, int]]) -> None:
    rows = [{SPEED: speed, MEMORY: memory, "id": at} for at, (speed, memory) in enumerate(pairs)]
    found = front(rows)

    assert {row["id"] for row in found} == {
        one["id"]
        for one in rows
        if not any(
            other[SPEED] >= one[SPEED]
            and other[MEMORY] <= one[MEMORY]
            and (other[SPEED], other[MEMORY]) != (one[SPEED], one[MEMORY])
            for other in rows
        )
    }
    assert [row[MEMORY] for row in found] == sorted(row[MEMORY] for row in found)


def test_the_best_of_all_and_of_each_policy(swept: Swept, expected: pd.DataFrame) -> None:
    best, table = swept.best(), swept.by_policy()
    assert best is not None
    assert best[SPEED] == expected[SPEED].max()
    assert best["time_ns.wait_cpu"] >= 0

    speeds = expected.groupby("run.policy")[SPEED].max().sort_values(ascending=False)
    assert {row["run.policy"]: row[SPEED] for row in table} == speeds.to_dict()
    assert [row[SPEED] for row in table] == list(speeds)
    assert table[0]["share"] == 1
    most = expected.groupby(["cache_ratio", "seed"])[SPEED].transform("max")
    wins = expected[expected[SPEED] == most].groupby("run.policy").size()
    assert {row["run.policy"]: row["fastest_in"] for row in table} == {
        name: wins.get(name, 0) for name in speeds.index
    }
    assert {row["compared_in"] for row in table} == {4}


def test_the_front_is_of_speed_and_memory(swept: Swept, expected: pd.DataFrame) -> None:
    found = swept.pareto()

    least = expected[MEMORY].min()
    assert found[MEMORY].iloc[0] == least
    assert found[SPEED].iloc[0] == expected[expected[MEMORY] == least][SPEED].max()
    assert found[SPEED].iloc[-1] == expected[SPEED].max()


def test_what_notebooks_show(swept: Swept) -> None:
    best = swept.best()
    assert best is not None
    first, second = repr(swept).split("\n")
    assert first == f"{best['run.policy']}: {best[SPEED]:.2f} tokens/s, the fastest of 12 points"
    assert second == f"cache_ratio {best['cache_ratio']}, seed {best['seed']}"
    html = swept._repr_html_()
    assert f"<b>{first}</b>" in html
    assert html.count("<tr>") == 1 + 3


def test_a_row_is_that_of_its_point(swept: Swept) -> None:
    name = swept.good[5]["point"]
    found = swept.store.read(name)
    assert found is not None
    assert found.row is not None
    again = row_of(found.point)
    assert {k: v for k, v in found.row.items() if k not in ("run.wall_s", "why")} == {
        k: v for k, v in again.items() if k != "run.wall_s"
    }
    assert swept.store.folder.is_dir()
