"""What a command imports decides how long one waits for it."""

import subprocess
import sys
from pathlib import Path

import pytest


def imported(*words: object, cwd: Path) -> set[str]:
    """Return the modules in memory when the command has ended."""
    code = """
import sys
from moesim.cli import main
try:
    main()
finally:
    print(*sys.modules, file=sys.stderr)
"""
    ended = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        cwd=cwd,
        check=True,
        capture_output=True,
        text=True,
    )
    return set(ended.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("words", [[], ["--help"], ["--version"]], ids=str)
def test_help_imports_nothing_heavy(words: list[str], tmp_path: Path) -> None:
    modules = imported(*words, cwd=tmp_path)
    packages = {name.partition(".")[0] for name in modules}

    assert "click" in packages
    assert packages & {"msgspec", "numpy", "pandas", "rich", "simpy", "torch", "yaml"} == set()
    assert {name for name in modules if name.startswith("moesim")} <= {
        "moesim",
        "moesim.cli",
        "moesim.cli.common",
        "moesim.errors",
    }


def test_help_of_a_command_imports_nothing_heavy(tmp_path: Path) -> None:
    packages = {name.partition(".")[0] for name in imported("replay", "--help", cwd=tmp_path)}

    assert packages & {"numpy", "pandas", "rich", "simpy", "torch", "yaml"} == set()


def test_replay_on_simpy_imports_nothing_heavy(small: Path, tmp_path: Path) -> None:
    words = ["replay", small, "--machine", "simpy", "--csv", "steps.csv", "--timeline", "t.json"]
    packages = {name.partition(".")[0] for name in imported(*words, cwd=tmp_path)}

    assert {"numpy", "simpy"} <= packages
    heavy = {"distributed", "joblib", "matplotlib", "numba", "pandas", "torch", "transformers"}
    assert packages & heavy == set()
