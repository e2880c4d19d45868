"""`moesim validate`, once on the emulated device, whose times nobody can know beforehand."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import msgspec
import pytest

from measured import machine, tasks
from moesim.calibrate.assembly import profile_text
from moesim.cli.validate import check_profile, order_in_words
from moesim.errors import InputError
from moesim.profile import load_profile
from moesim.real.engine import Engine

Cli = Callable[..., CompletedProcess[str]]
DEVICE = "emulated:memory=64MiB,bandwidth=8e9,latency_ns=1000"


@pytest.fixture
def emulated(tmp_path: Path) -> Path:
    """Return a profile that passes for one of an emulated device."""
    profile = msgspec.structs.replace(load_profile("rtx3090-pcie4-ddr4")[0], name="emulated-toy")
    path = tmp_path / "emulated.yaml"
    path.write_text(profile_text(profile), encoding="utf-8")
    return path


@pytest.fixture
def words(small: Path, emulated: Path) -> tuple[object, ...]:
    return (
        "validate", small, "--device", DEVICE, "--hardware", emulated, "--batch", 2, "--prompt", 3,
        "--generate", 3, "--layers", 2, "--cache-ratio", 0.5,
    )  # fmt: skip


def test_one_command_measures_simulates_and_compares(
    cli: Cli, words: tuple[object, ...], tmp_path: Path
) -> None:
    folder, both = tmp_path / "evidence", tmp_path / "both.json.gz"
    done = cli(
        *words, "--policies", "static,lru", "--policy", "dali:prefetch_size=2", "--repeats", 2,
        "--json", "--evidence", folder, "--timelines", both,
    )  # fmt: skip
    assert done.returncode == 0
    result = json.loads(done.stdout)

    assert result["device"] == "emulated"
    assert result["hardware"] == "emulated-toy"
    assert result["model"] == "small"
    assert result["repeats"] == 2
    assert result["workload"]["layers"] == 2
    assert result["workload"]["sequences"] == 2
    assert [row["policy"] for row in result["policies"]] == [
        "static",
        "lru",
        "dali:prefetch_size=2",
    ]
    assert -1 <= result["kendall_tau"] <= 1
    assert len(result["kendall_tau_by_repeat"]) == 2
    for row in result["policies"]:
        assert len(row["tpot_ms"]["repeats"]) == 2
        assert row["tpot_ms"]["simulated"] > 0
        assert row["tpot_error"] > -1
        parts = sum(one["part"] for one in row["time_ns"].values())
        assert parts > -1
        assert not [one for one in row["differences"] if not one["timing"]]
        counts = {k["measured_count"] - k["simulated_count"] for k in row["kinds"].values()}
        assert counts == {0} or row["policy"].startswith("dali")

    assert {path.name for path in folder.iterdir()} == {
        "machine.json", "profile.yaml", "result.json", "table.md", "tpot.png"
    }  # fmt: skip
    assert json.loads((folder / "result.json").read_text(encoding="utf-8")) == result
    assert load_profile(str(folder / "profile.yaml"))[0].name == "emulated-toy"
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert "| dali:prefetch_size=2 |" in table
    assert "device     emulated" in table
    assert both.stat().st_size > 0


class Interrupted:
    """An engine that is interrupted in its second run."""

    def __init__(self) -> None:
        self.runs = 0

    def __call__(self, engine: Engine, make: Any, *, progress: Any) -> Any:
        from moesim.sim.replay import replay

        self.runs += 1
        if self.runs == 2:
            raise KeyboardInterrupt
        return replay(make(), record=True)


def test_an_interruption_writes_nothing(
    cli: Cli, words: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted = Interrupted()
    monkeypatch.setattr(
        Engine, "run", lambda self, make, *, progress: interrupted(self, make, progress=progress)
    )
    plot = tmp_path / "plot.svg"
    done = cli(*words, "--plot", plot)
    assert done.returncode == 130
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "moesim: interrupted"
    assert not plot.exists()
    assert interrupted.runs == 2


def test_the_table_has_the_errors_first(
    cli: Cli, words: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that is the simulator has no error."""
    from moesim.sim.replay import replay

    monkeypatch.setattr(Engine, "run", lambda _, make, **__: replay(make(), record=True))
    done = cli(*words)
    assert done.returncode == 0
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "TPOT ms TTFT ms tokens/s"
    assert lines[1] == "policy measured simulated error spread measured error measured error"
    assert [line.split()[0] for line in lines[2:5]] == ["static", "lru", "dali"]
    for line in lines[2:5]:
        assert re.findall(r"[+-]\d+\.\d%", line) == ["+0.0%"] * 3
    assert (
        "The order of the policies is the same: Kendall's tau 1.00, 1.00 to 1.00 by repeat" in lines
    )
    assert "lru: simulated and measured times are the same" in lines
    assert any(line.startswith("device emulated") and "any GPU" in line for line in lines)


def test_without_a_profile_the_device_is_calibrated(
    cli: Cli, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moesim.sim.replay import replay

    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr("moesim.calibrate.tasks.tasks_of", lambda *_: tasks(machine()))
    monkeypatch.setattr(Engine, "run", lambda _, make, **__: replay(make(), record=True))
    words = ("validate", small, "--device", DEVICE, "--policies", "lru", "--cache-ratio", 0.5)
    done = cli(*words, "--json", "--set", "link.h2d.latency_ns=12345")
    assert done.returncode == 0
    count = len(machine())
    assert f"calibrating: {count} of {count} series are missing" in done.stderr
    result = json.loads(done.stdout)
    assert result["hardware"].startswith("emulated-")
    assert result["kendall_tau"] is None

    again = cli(*words)
    assert again.returncode == 0
    assert "calibrating" not in again.stderr
    assert "Two policies or more are needed to compare orders" in again.stdout


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (("--policies", "static,lruu"), "no policy named 'lruu'; there are: "),
        (("--policies", "dali:cache=lru"), "takes names alone; --policy dali:... takes parameters"),
        (("--policies", ","), "names no policy"),
        (("--policy", "lru:nothing=1"), "lru"),
        (("--hardware", "rtx3090-pcie4-ddr4"), "is no emulated device's, and emulated runs"),
        (("--plot", "picture.txt"), "a picture's name ends in .png, .svg, .pdf"),
        (("--timelines", "nowhere/both.json"), "there is no folder"),
        (("--device", "abacus"), "abacus"),
        (("--budget", "much"), "budget much"),
        (("--repeats", "0"), "--repeats"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    cli: Cli, words: tuple[object, ...], wrong: tuple[str, str], said: str
) -> None:
    kept = list(words)
    for option in ("--hardware", "--cache-ratio"):
        if wrong[0] in (option, "--budget") and option in kept:
            at = kept.index(option)
            del kept[at : at + 2]
    done = cli(*kept, *wrong)
    assert done.returncode == 2
    assert done.stdout == ""
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr


def test_an_emulated_profile_says_nothing_about_a_gpu(emulated: Path) -> None:
    class Cuda:
        label = "cuda"

    device: Any = Cuda()
    with pytest.raises(InputError, match="is an emulated device's, and cuda runs"):
        check_profile(load_profile(str(emulated))[0], device)
    check_profile(load_profile("rtx3090-pcie4-ddr4")[0], device)


def test_swapped_pairs_are_told() -> None:
    pair = {
        "faster": "a", "slower": "b", "measured": [1.0, 2.0], "simulated": [1.51, 1.5],
        "within_spread": True,
    }  # fmt: skip
    lines = order_in_words(
        {
            "ranked_by": "tpot_ms",
            "kendall_tau": -1.0,
            "kendall_tau_by_repeat": [-1.0, 1.0],
            "swapped": [pair],
        }
    )
    assert list(lines) == [
        "The order of the policies is not the same: Kendall's tau -1.00, -1.00 to 1.00 by repeat",
        "Swapped: a is faster than b (1.00 and 2.00 ms), simulated slower (1.51 and 1.50 ms); their"
        " repeats overlap",
    ]
