"""Rules that are bent on purpose: for each there is a test that notices.

A copy of the package has one line changed, and the tests of that rule are run on it.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import moesim

TESTS = Path(__file__).parents[1]


class Mutation(NamedTuple):
    """One change of a source file below the package, and the tests that must fail."""

    what: str
    file: str
    was: str
    becomes: str
    tests: str


MUTATIONS = [
    Mutation(
        "equal ends go to the CPU",
        "policies/parts/assign.py",
        "if gpu_end + gpu_ns[expert] <= cpu_end + cpu_ns[expert]:",
        "if gpu_end + gpu_ns[expert] < cpu_end + cpu_ns[expert]:",
        "policies/test_assign.py",
    ),
    Mutation(
        "the smallest difference of costs comes first",
        "policies/parts/assign.py",
        "sort_by(visit, n_active, n_active, on_gpu, -1)",
        "sort_by(visit, n_active, n_active, on_gpu, 1)",
        "policies/test_assign.py",
    ),
    Mutation(
        "equal costs go to the CPU",
        "policies/parts/assign.py",
        "on_gpu[expert] = 1 if gpu_ns[expert] <= cpu_ns[expert] else 0",
        "on_gpu[expert] = 1 if gpu_ns[expert] < cpu_ns[expert] else 0",
        "policies/test_assign.py",
    ),
    Mutation(
        "DALI's window is never emptied",
        "policies/dali.py",
        "            window.score[view.layer, :] = 0\n",
        "",
        "policies/test_dali.py",
    ),
    Mutation(
        "the youngest leaves",
        "policies/parts/cache.py",
        "    expert: int = order.after[layer, end]\n    while expert != end:\n"
        "        if protected[expert] == 0:\n",
        "    expert: int = order.before[layer, end]\n    while expert != end:\n"
        "        if protected[expert] == 0:\n",
        "policies/test_mixtral_offloading.py",
    ),
    Mutation(
        "Huang's way of the highest count is filled next",
        "policies/parts/cache.py",
        "ways.counts[layer, way] < ways.counts[layer, victim]",
        "ways.counts[layer, way] > ways.counts[layer, victim]",
        "policies/test_huang.py",
    ),
    Mutation(
        "MoEpic's expert of the highest priority leaves",
        "policies/parts/cache.py",
        "                or priority < lowest\n",
        "                or priority > lowest\n",
        "policies/test_moepic.py",
    ),
    Mutation(
        "a use never fades",
        "policies/parts/cache.py",
        "priority: float = lcp.uses[layer, expert] * lcp.decay[idle]",
        "priority: float = lcp.uses[layer, expert] * 1.0",
        "policies/test_moepic.py",
    ),
    Mutation(
        "MoEpic takes the layout that completes fewest experts",
        "policies/parts/split.py",
        "best = np.lexsort((tops, late_ns, -complete))[0]",
        "best = np.lexsort((tops, late_ns, -complete))[-1]",
        "policies/test_split.py",
    ),
    Mutation(
        "ARC takes from T1 when it is as long as p",
        "policies/parts/arc.py",
        "in_t1 > 0 and (in_t1 > target or",
        "in_t1 > 0 and (in_t1 >= target or",
        "policies/test_arc.py",
    ),
    Mutation(
        "Fate prefetches one expert more than a layer's time holds",
        "policies/fate.py",
        "ranks = window_ns // copy_ns",
        "ranks = window_ns // copy_ns + 1",
        "policies/test_fate.py",
    ),
    Mutation(
        "the one used again first leaves",
        "policies/belady.py",
        "            if step > last:\n",
        "            if last == -1 or step < last:\n",
        "policies/test_belady.py",
    ),
    Mutation(
        "one more copy than the window hides is enough for Klotski's planner",
        "policies/klotski_plan.py",
        "return bool(self.left >= self.right)",
        "return bool(1.1 * self.left >= self.right)",
        "policies/test_klotski.py",
    ),
]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a copy of the package, which Python finds before the package itself."""
    folder = tmp_path_factory.mktemp("mutated")
    ignore = shutil.ignore_patterns("__pycache__", "*.npz")
    shutil.copytree(Path(moesim.__file__).parent, folder / "moesim", ignore=ignore)
    return folder


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.what.replace(" ", "-"))
def test_a_bent_rule_is_noticed(
    mutation: Mutation, copy: Path, request: pytest.FixtureRequest
) -> None:
    file = copy / "moesim" / mutation.file
    source = file.read_text(encoding="utf-8")
    assert source.count(mutation.was) == 1, f"{mutation.file} has another rule now"
    file.write_text(source.replace(mutation.was, mutation.becomes), encoding="utf-8")
    try:
        ended = subprocess.run(
            [
                sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider",
                "-p", "no:xdist", "-c", str(request.config.inipath),
                "--rootdir", str(request.config.rootpath), str(TESTS / mutation.tests),
            ],
            env=os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    finally:
        file.write_text(source, encoding="utf-8")
    assert ended.returncode == pytest.ExitCode.TESTS_FAILED, ended.stdout + ended.stderr
    assert "AssertionError" in ended.stdout or "assert" in ended.stdout
