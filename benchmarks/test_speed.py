"""How fast the simulator is. Counts are asserted; rates are printed, to be read side by side."""

import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import simpy

from moesim.model import load_model
from moesim.policies.registry import choose
from moesim.profile import load_profile
from moesim.run import Prepared, prepare
from moesim.sim.replay import replay
from moesim.traces.importers import load_trace
from moesim.traces.workload import cut

pytestmark = pytest.mark.bench

RECORDED = Path(__file__).resolve().parents[2] / "shared/traces/qwen3-30b-a3b-code.npz"
EVENTS = 200_000


def prepared(policy: str, trace: Path, batch: int = 1) -> Prepared:
    """Return a replay of 64 + 64 tokens on the default preset, a quarter of all experts cached."""
    routing = load_trace(trace)
    model = load_model("qwen3-30b-a3b")
    profile, _ = load_profile("rtx3090-pcie4-ddr4")
    budget_bytes = 48 * 128 // 4 * 9437184
    workload = cut(routing, batch, prompt=64, generate=64)
    return prepare(routing, workload, model, profile, choose(policy), budget_bytes=budget_bytes)


def bare_timeouts_per_s() -> float:
    """Return how many timeouts plain SimPy fires in a second."""
    env = simpy.Environment()

    def ticking() -> simpy.events.ProcessGenerator:
        for _ in range(EVENTS):
            yield env.timeout(1)

    env.process(ticking())
    began = time.perf_counter()
    env.run()
    assert env.now == EVENTS
    return EVENTS / (time.perf_counter() - began)


@pytest.mark.parametrize(
    ("policy", "operations"), [("static", 41008), ("lru", 43_539), ("dali", 57_632)]
)
def test_rate_of_the_simpy_machine(made: Path, policy: str, operations: int) -> None:
    bare = bare_timeouts_per_s()
    run = replay(prepared(policy, made))
    rate = run.operations / run.wall_s
    layer_steps = len(run.heads) * run.prepared.setting.layers
    print(
        f"\n{policy}: {rate:,.0f} operations/s, {layer_steps / run.wall_s:,.0f} layer steps/s; "
        f"bare SimPy {bare:,.0f} timeouts/s, {bare / rate:.1f} times as many"
    )
    assert layer_steps == 64 * 48
    assert run.operations == operations


@pytest.mark.skipif(not RECORDED.exists(), reason="a recorded trace that is not part of moesim")
def test_rate_on_a_recorded_trace() -> None:
    bare = bare_timeouts_per_s()
    run = replay(prepared("dali", RECORDED))
    rate = run.operations / run.wall_s
    print(
        f"\ndali, Qwen3 trace, batch 1: {rate:,.0f} operations/s, "
        f"{64 * 48 / run.wall_s:,.0f} layer steps/s; bare SimPy {bare:,.0f} timeouts/s"
    )
    assert run.operations == 62_077


def test_memory(recorded_or_made: Path) -> None:
    """At most twice the trace and 150 MB, in a process of its own."""
    path = recorded_or_made
    arguments = ["replay", str(path), "--prompt", "64", "--generate", "256", "--json"]
    arguments += ["--machine", "simpy"]
    # ru_maxrss would be that of the process that started this one, if that was larger.
    code = (
        "import sys; from moesim.cli import main\n"
        f"sys.argv = ['moesim', *{arguments!r}]\n"
        "try: main()\n"
        "finally: print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0],"
        " file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    peak_bytes = int(done.stderr.split()[-1]) * 1024
    trace = load_trace(path)
    trace_bytes = trace.experts.nbytes + sum(ids.nbytes for ids in trace.candidates.values())
    print(f"\npeak {peak_bytes / 1e6:.0f} MB for a trace of {trace_bytes / 1e6:.1f} MB")
    assert peak_bytes <= 2 * trace_bytes + 150e6


def test_start_up() -> None:
    """`moesim --help`, next to a Python that does nothing."""
    spent = {}
    for name, code in (("python", "pass"), ("help", "from moesim.cli import main; main()")):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        began = time.perf_counter()
        for _ in range(10):
            subprocess.run(
                [sys.executable, "-c", f"import sys; sys.argv = ['moesim', '--help']; {code}"],
                check=True, stdout=subprocess.DEVNULL,
            )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent[name] = (time.perf_counter() - began) / 10, (after.ru_utime - before.ru_utime) / 10
    print(
        "\n"
        + "; ".join(
            f"{name}: {wall:.3f} s, {user:.3f} s of CPU" for name, (wall, user) in spent.items()
        )
    )
