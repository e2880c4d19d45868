"""The README says what is true: its output is what the command prints, its policy runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from moesim.traces.bundled import example_path

README = Path(__file__).resolve().parent.parent / "README.md"
SWEEPS = README.parent / "docs" / "sweep.md"

pytestmark = pytest.mark.skipif(not README.exists(), reason="needs the checkout, not a wheel")

POLICIES = (
    "hybrimoe", "moepic", "lru", "static:by=expert,order=popularity", "dali", "static",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _nothing_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The README shows what a new user sees."""
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path / "cache"))


def moesim(*arguments: str, cwd: Path | None = None) -> str:
    """Return what a command prints on a terminal of 80 columns."""
    code = "from moesim.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd=cwd,
        env=os.environ | {"COLUMNS": "80", "XDG_CONFIG_HOME": str(README.parent / "nowhere")},
    )
    return done.stdout


def block(after: str, page: Path = README) -> str:
    """Return the first fenced block after a text."""
    found = re.search(r"```\w*\n(.*?)```", page.read_text().partition(after)[2], re.DOTALL)
    assert found is not None
    return found[1]


def comparable(text: str) -> list[str]:
    """Return the lines without trailing blanks and without the time that the run took."""
    return [re.sub(r" in [\d.]+ s$", "", line.rstrip()) for line in text.strip().splitlines()]


def test_the_output_is_what_the_command_prints() -> None:
    command = "replay --policy dali --cache-ratio 0.25"
    shown = block(f"<!-- output of: moesim {command} -->")
    assert comparable(shown) == comparable(moesim(*command.split()))
    assert f"moesim {command} $" in (README.parent / "Makefile").read_text()


def test_the_curves_are_what_the_command_prints() -> None:
    shown = block("<!-- output of: moesim cache -->")
    assert comparable(shown) == comparable(moesim("cache"))


@pytest.mark.parametrize(
    "command",
    [
        "compare --cache-ratio 0.25 --policies static,lru,dali,fate,klotski,hybrimoe",
        "advise qwen3-30b-a3b --hardware rtx3090-pcie4-ddr4",
    ],
)
def test_the_answers_are_what_the_commands_print(command: str) -> None:
    shown = block(f"<!-- output of: moesim {command} -->")
    assert comparable(shown) == comparable(moesim(*command.split()))


def test_the_sweep_is_what_the_command_prints(tmp_path: Path) -> None:
    command = "sweep grid.yaml -o sweep.parquet"
    (tmp_path / "grid.yaml").write_text(block("A grid is a YAML file", SWEEPS))
    shown = block(f"<!-- output of: moesim {command} -->", SWEEPS)
    assert comparable(shown) == comparable(moesim(*command.split(), cwd=tmp_path))


def test_the_library_does_what_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example runs as it stands."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    shutil.copy(example_path(), "trace.npz")
    code = block("## From Python")
    names: dict[str, object] = {}
    exec(code, names)
    assert {path.name for path in tmp_path.iterdir()} >= {"run.json.gz", "report.html"}
    assert names["run"].data["policy"] == "dali"  # type: ignore[attr-defined]
    assert len(names["found"].rows) == 4 + 2  # type: ignore[attr-defined]


def test_the_table_holds_what_the_policies_give(tmp_path: Path) -> None:
    made = re.search(r"^moesim (trace synth -o qwen3.npz .*)$", README.read_text(), re.M)
    assert made is not None
    moesim(*made[1].split(), cwd=tmp_path)
    text = README.read_text().partition("<!-- output of: moesim replay qwen3.npz --json -->")[2]
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")]
        for line in text.partition("\n\n")[0].strip().splitlines()[2:]
    ]
    assert [row[0] for row in rows] == list(POLICIES)
    for row in rows:
        result = json.loads(
            moesim("replay", "qwen3.npz", "--policy", row[0], "--json", cwd=tmp_path)
        )
        waits = {k: v for k, v in result["time_ns"].items() if k.startswith("wait_")}
        most = max(waits, key=lambda name: waits[name])
        expected = [
            f"{result['tokens_per_s']:.1f}",
            f"{result['ttft_ms']:.0f}",
            f"{result['tpot_ms']:.1f}",
        ]
        assert row[1:4] == expected
        assert row[4].startswith(f"{most.removeprefix('wait_')} ")


def test_the_policy_runs(tmp_path: Path) -> None:
    code = block("save it as `cheaper.py`")
    body = [line for line in code.partition("class ")[2].splitlines() if line]
    assert len(body) <= 20
    (tmp_path / "cheaper.py").write_text(code)

    words = ("--policy", "./cheaper.py", "--cache-ratio", "0.25", "--json")
    result = json.loads(moesim("replay", *words, cwd=tmp_path))
    assert result["activations"]["resident"] > 0
    assert result["activations"]["cpu"] > 0
    assert result["activations"]["fetched"] > 0


def test_the_policy_keeps_the_laws_that_it_is_tested_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cheaper.py").write_text(block("save it as `cheaper.py`"))
    (tmp_path / "test_cheaper.py").write_text(block("is tested by inheriting"))
    monkeypatch.chdir(tmp_path)
    assert pytest.main(["-q", "-p", "no:cacheprovider", "-c", os.devnull, "test_cheaper.py"]) == 0


def test_every_command_shown_exists() -> None:
    """Options and names in the examples are legal, apart from the user's own trace."""
    from moesim.cli.replay import command
    from moesim.policies.registry import choose

    options = {option for parameter in command.params for option in parameter.opts}
    shown = re.findall(r"^moesim replay .*$", README.read_text(), re.MULTILINE)
    assert shown
    for line in shown:
        words = line.partition("#")[0].split()
        assert {word for word in words if word.startswith("--")} <= options
        if "--policy" in words and not words[words.index("--policy") + 1].endswith(".py"):
            choose(words[words.index("--policy") + 1])
