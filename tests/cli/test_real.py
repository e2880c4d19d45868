"""`moesim real`, on the emulated device: what it prints is a replay's, but for the times."""

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Cli = Callable[..., CompletedProcess[str]]
DEVICE = "emulated:memory=64MiB,bandwidth=8e9,latency_ns=1000"


def run(cli: Cli, command: str, small: Path, *more: object) -> CompletedProcess[str]:
    device = ("--device", DEVICE) if command == "real" else ()
    return cli(
        command, small, *device, "--hardware", "rtx3090-pcie4-ddr4", "--batch", 2, "--prompt", 3,
        "--generate", 4, "--layers", 3, "--cache-ratio", 0.25, *more,
    )  # fmt: skip


def test_it_counts_what_the_simulator_counts(cli: Cli, small: Path) -> None:
    """All but times, and what hangs on them: `on-demand` decides without looking at any."""
    real, simulated = (
        json.loads(run(cli, command, small, "--policy", "on-demand", "--json").stdout)
        for command in ("real", "replay")
    )
    assert real.keys() == simulated.keys()
    for key in ("activations", "link_bytes", "output_tokens", "prompt_tokens", "sequences"):
        assert real[key] == simulated[key]
    assert real["run"]["operations"] == simulated["run"]["operations"]
    assert real["run"]["machine"] == "emulated"
    assert real["provenance"]["measured"] == 1
    assert sum(real["time_ns"].values()) == real["makespan_ns"] > 0


def test_it_prints_and_writes_what_a_replay_does(cli: Cli, small: Path, tmp_path: Path) -> None:
    steps, timeline = tmp_path / "steps.csv", tmp_path / "run.json.gz"
    done = run(cli, "real", small, "--policy", "lru", "--csv", steps, "--timeline", timeline)
    assert done.returncode == 0
    assert "TTFT" in done.stdout.splitlines()[0]
    assert "operations on machine emulated" in done.stdout
    assert "the policy decides by the profile of NVIDIA GeForce RTX 3090" in done.stderr
    with steps.open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    with gzip.open(timeline, "rt") as file:
        assert json.load(file)["traceEvents"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--device", "cpu"), "device cpu copies nothing, and runs no policy; legal are cuda and"),
        (("--device", "tpu"), "no device 'tpu'; there are: cuda, cpu, emulated"),
        (("--layers", 5), "small has 4 MoE layers; 1..4 can be taken"),
        (("--policy", "nosuch"), "no policy named 'nosuch'"),
        (("--device", "emulated:memory=1MiB"), "do not fit into the 1048576 of the emulated"),
        (("--csv", "a.csv", "--timeline", "a.csv"), "must be different files"),
    ],
)
def test_bad_input_is_one_line(
    cli: Cli, small: Path, words: tuple[object, ...], line: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    done = run(cli, "real", small, *words)
    assert done.returncode == 2
    assert not done.stdout
    assert line in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("a.csv"))
