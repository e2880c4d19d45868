"""The compiled machine next to the SimPy machine: equal results are asserted, times are printed."""

import os
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from moesim.model import load_model
from moesim.policies.registry import choose, names
from moesim.profile import load_profile
from moesim.run import Prepared, prepare
from moesim.sim.metrics import summarize
from moesim.sim.replay import Replayed, replay
from moesim.traces.format import Trace
from moesim.traces.importers import load_trace
from moesim.traces.synthetic import synthesize
from moesim.traces.workload import cut

pytestmark = pytest.mark.bench

RECORDED = Path(__file__).resolve().parents[2] / "shared/traces/qwen3-30b-a3b-code.npz"
POLICIES = [
    *(name for name in names() if name != "all-gpu"),  # which refuses what does not fit
    "all-gpu:rest=on-demand",
    "dali:cache=lru",
    "static:by=expert",
]
SHORT, LONG = 64, 1024
"""Tokens to generate: what SimPy does in a second, and what lasts long enough when compiled."""
PROMPT = 64
REPETITIONS = 3


@cache
def routing() -> Trace:
    """Return the trace that all runs share."""
    if RECORDED.exists():
        return load_trace(RECORDED)
    return synthesize(sequences=5, distances=1, width=12, seed=1)


def prepared(policy: str, generate: int) -> Prepared:
    """Return a replay on the default preset, a quarter of all experts cached.

    A made-up trace is shorter than LONG: there it is as much as the trace holds.
    """
    trace = routing()
    model = load_model("qwen3-30b-a3b")
    profile, _ = load_profile("rtx3090-pcie4-ddr4")
    workload = cut(trace, prompt=PROMPT, generate=min(generate, trace.tokens - PROMPT))
    budget_bytes = 48 * 128 // 4 * 9437184
    return prepare(trace, workload, model, profile, choose(policy), budget_bytes=budget_bytes)


def comparable(run: Replayed) -> dict[str, Any]:
    """Return a run's summary without the two entries that name the machine and its wall time."""
    summary = summarize(run)
    about = {k: v for k, v in summary["run"].items() if k not in ("machine", "wall_s")}
    return summary | {"run": about}


def operations_per_s(run: Replayed) -> float:
    """Return how many operations were simulated in a second."""
    return run.operations / run.wall_s


def layer_steps_per_s(run: Replayed) -> float:
    """Return how many layer steps were simulated in a second."""
    return len(run.heads) * run.prepared.setting.layers / run.wall_s


@pytest.mark.parametrize("policy", POLICIES)
def test_compiled_against_simpy(policy: str) -> None:
    replay(prepared(policy, SHORT), machine="compiled")  # compiles, if that was never done
    simpy, short, long = [], [], []
    for _ in range(REPETITIONS):
        simpy.append(replay(prepared(policy, SHORT)))
        short.append(replay(prepared(policy, SHORT), machine="compiled"))
        long.append(replay(prepared(policy, LONG), machine="compiled"))
    assert {run.operations for run in short} == {run.operations for run in simpy}
    assert len({run.operations for run in long}) == 1
    assert comparable(short[-1]) == comparable(simpy[-1])
    slow, same, fast = (max(runs, key=operations_per_s) for runs in (simpy, short, long))
    print(
        f"\n{policy}: compiled {operations_per_s(fast):,.0f} operations/s, "
        f"{layer_steps_per_s(fast):,.0f} layer steps/s; SimPy {operations_per_s(slow):,.0f} and "
        f"{layer_steps_per_s(slow):,.0f}: {operations_per_s(fast) / operations_per_s(slow):.0f} "
        f"times as many operations ({slow.wall_s / same.wall_s:.0f} times on the same {SHORT} "
        f"tokens)"
    )


def command_s(machine: str, cache_dir: Path) -> float:
    """Return the wall time of `moesim replay` on the bundled example, in a fresh process."""
    code = "from moesim.cli import main; main()"
    arguments = ("replay", "--policy", "dali", "--machine", machine, "--json")
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True, capture_output=True, env=os.environ | {"MOESIM_CACHE_DIR": str(cache_dir)},
    )  # fmt: skip
    return time.perf_counter() - began


def test_first_and_warm_start(tmp_path: Path) -> None:
    """With nothing compiled before, then with everything; SimPy needs neither."""
    first_s = command_s("compiled", tmp_path)
    warm_s, simpy_s = [], []
    for _ in range(REPETITIONS):
        warm_s.append(command_s("compiled", tmp_path))
        simpy_s.append(command_s("simpy", tmp_path))
    print(
        f"\nfirst run, compiling: {first_s:.1f} s"
        f"\nwarm start: {min(warm_s):.2f} s for the bundled example; SimPy {min(simpy_s):.2f} s"
    )
    assert any((tmp_path / "compiled").glob("engine_*.py"))


def in_threads(chains: list[list[Prepared]], machine: str, done: list[Replayed]) -> float:
    """Return the wall time of replaying chains of runs, each chain in a thread of its own."""

    def replay_all(chain: list[Prepared]) -> None:
        done.extend(replay(one, machine=machine) for one in chain)

    threads = [Thread(target=replay_all, args=(chain,)) for chain in chains]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


@pytest.mark.parametrize(("machine", "generate", "runs"), [("compiled", LONG, 8), ("simpy", 16, 2)])
def test_two_threads(machine: str, generate: int, runs: int) -> None:
    """The compiled machine releases the GIL: with two free cores, two runs take the time of one.

    A chain of runs per thread, since systems need a moment to give a process its second core.
    """
    replay(prepared("lru", 1), machine=machine)
    done: list[Replayed] = []
    ratios = []
    for _ in range(REPETITIONS):
        one, two, three, four = ([prepared("lru", generate) for _ in range(runs)] for _ in range(4))
        at_once_s = in_threads([one, two], machine, done)
        ratios.append(at_once_s / in_threads([three + four], machine, done))
    print(
        f"\ntwo threads, {machine}: {min(ratios):.2f} to {max(ratios):.2f} of the time of one; "
        f".5 is the best there is, {os.cpu_count()} cores"
    )
    assert len(done) == 4 * runs * REPETITIONS
    assert len({run.operations for run in done}) == 1
