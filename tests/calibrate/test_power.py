"""Power: counters in fake files, and what is made of two readings."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from moesim.calibrate.power import Counter, Reading, cuda_counter, packages, reading, watts
from moesim.real.device import Device


def package(folder: Path, zone: str, name: str, energy: str, wraps: str = "262143328850") -> None:
    (folder / zone).mkdir()
    for file, text in (("name", name), ("energy_uj", energy), ("max_energy_range_uj", wraps)):
        (folder / zone / file).write_text(f"{text}\n")


def test_packages_count_and_nothing_else(tmp_path: Path) -> None:
    """Not their cores, which are part of them, nor the board, nor the other way to the same."""
    package(tmp_path, "intel-rapl:0", "package-0", "1500000")
    package(tmp_path, "intel-rapl:0:0", "core", "1")
    package(tmp_path, "intel-rapl:0:1", "package-0-dram", "1")
    package(tmp_path, "intel-rapl:1", "package-1", "2000000", "4000000")
    package(tmp_path, "intel-rapl:2", "psys", "1")
    package(tmp_path, "intel-rapl-mmio:0", "package-0", "1")
    (tmp_path / "intel-rapl").mkdir()
    assert packages(tmp_path) == {
        "package-0": Counter(1.5, 262143.32885),
        "package-1": Counter(2.0, 4.0),
    }


def test_what_cannot_be_read_is_not_told(tmp_path: Path) -> None:
    """As for anybody but root: a file that is none is read by nobody."""
    package(tmp_path, "intel-rapl:0", "package-0", "1500000")
    (tmp_path / "intel-rapl:0" / "energy_uj").unlink()
    (tmp_path / "intel-rapl:0" / "energy_uj").mkdir()
    package(tmp_path, "intel-rapl:1", "package-1", "much")
    assert packages(tmp_path) == packages(tmp_path / "nowhere") == {}


def test_energy_over_time_is_power() -> None:
    """30 J in 2 s; a counter that wraps at 100 J goes from 90 to 10; one went, one came."""
    before = Reading(5.0, {"a": Counter(10.0), "b": Counter(90.0, 100.0), "gone": Counter(1.0)})
    after = Reading(7.0, {"a": Counter(40.0), "b": Counter(10.0, 100.0), "new": Counter(9.0)})
    assert watts(before, after) == {"a": 15.0, "b": 10.0}


def test_nothing_is_made_up() -> None:
    """Neither where a counter went back and does not say where it wraps, nor in no time."""
    before = Reading(0.0, {"a": Counter(10.0)})
    assert watts(before, Reading(1.0, {"a": Counter(9.0)})) == {}
    assert watts(before, Reading(0.1, {"a": Counter(11.0)})) == {}
    assert watts(before, before) == {}


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    made = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda text: text,
        nvmlDeviceGetTotalEnergyConsumption={"GPU-12-34": 2500}.__getitem__,
    )
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="12-34")
    )
    return made


def device(label: str) -> Device:
    return cast(Device, SimpleNamespace(label=label))


def test_a_device_counts_in_millijoules(nvml: SimpleNamespace, tmp_path: Path) -> None:
    moments = iter([3.0, 4.0]).__next__
    assert reading(device("cuda"), tmp_path, moments) == Reading(3.0, {"gpu": Counter(2.5)})
    assert reading(device("emulated"), tmp_path, moments) == Reading(4.0, {})


def test_a_device_that_does_not_count_is_not_told(
    nvml: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise RuntimeError("driver/library version mismatch")

    nvml.nvmlInit = refuse
    assert cuda_counter() is None
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert cuda_counter() is None
