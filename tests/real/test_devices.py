"""Devices are opened by a text, with what it tells them, or refused in one line."""

import os
from pathlib import Path

import pytest
import torch

from moesim.errors import CalibrationError
from moesim.real import devices
from moesim.real.devices import (
    KINDS,
    LINK,
    MEMORY_BYTES,
    OPTIONS,
    open_device,
    parse_device,
    processor_name,
    usable_cores,
    usable_threads,
)
from moesim.real.emulated import Emulated, Throttle


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four cores of two threads each, and 16 GiB."""
    monkeypatch.setattr(devices, "usable_threads", lambda: 8)
    monkeypatch.setattr(devices, "usable_cores", lambda: 4)
    monkeypatch.setattr(devices, "host_memory_bytes", lambda: 1 << 34)


def threads_of(text: str) -> dict[str, int]:
    device = open_device(text)
    device.close()
    return {name: lane.threads for name, lane in device.lanes.items()}


@pytest.mark.parametrize(
    ("cores", "options", "gpu", "cpu"),
    [
        (4, "", 2, 2),
        (5, "", 2, 3),
        (1, "", 1, 1),
        (4, ",gpu_threads=1", 1, 3),
        (4, ",cpu_threads=1", 3, 1),
        (4, ",gpu_threads=8", 8, 1),
        (4, ",gpu_threads=4,cpu_threads=3", 4, 3),
    ],
)
@pytest.mark.usefixtures("eight")
def test_an_emulated_device_shares_the_cores_of_the_host(
    monkeypatch: pytest.MonkeyPatch, cores: int, options: str, gpu: int, cpu: int
) -> None:
    monkeypatch.setattr(devices, "usable_cores", lambda: cores)
    found = threads_of(f"emulated:memory=1MiB{options}")
    assert (found["gpu"], found["cpu"]) == (gpu, cpu)
    assert {"h2d", "d2h"} <= found.keys()


def test_an_emulated_device_is_what_it_is_told() -> None:
    device = open_device("emulated:memory=1.5MiB,bandwidth=1e6,latency_ns=5")
    device.close()
    assert isinstance(device, Emulated)
    assert (device.label, device.link) == ("emulated", Throttle(5, 1e6))
    assert device.memory_bytes == 3 << 19


def test_what_it_is_not_told_is_a_default() -> None:
    device = open_device("emulated")
    device.close()
    assert isinstance(device, Emulated)
    assert (device.memory_bytes, device.link) == (MEMORY_BYTES, LINK)


@pytest.mark.usefixtures("eight")
def test_without_a_device_the_processor_computes_with_a_thread_per_core() -> None:
    assert threads_of("cpu")["cpu"] == 4
    assert threads_of("cpu:cpu_threads=7")["cpu"] == 7


def test_without_a_device_there_is_no_memory_and_no_link() -> None:
    device = open_device("cpu")
    assert (device.label, device.name, device.memory_bytes) == ("cpu", processor_name(), 0)
    assert not {"gpu", "h2d", "d2h"} & device.lanes.keys()
    assert device.host(2, 3, dtype=torch.bfloat16).shape == (2, 3)
    with pytest.raises(CalibrationError, match="no device memory"):
        device.empty(1, dtype=torch.uint8)
    with pytest.raises(CalibrationError, match="no link"):
        device.copy(None, None)
    device.free_all()
    device.close()


def test_a_lane_of_the_processor_computes_with_its_threads() -> None:
    device = open_device("cpu:cpu_threads=1")
    found: list[int] = []
    device.lanes["cpu"].submit(lambda: found.append(torch.get_num_threads())).wait()
    device.close()
    assert found == [1]


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CalibrationError, match=r"sees none here; there are: cpu, emulated"):
        open_device("cuda")


def topology(folder: Path, *siblings: str) -> None:
    for thread, text in enumerate(siblings):
        (folder / f"cpu{thread}" / "topology").mkdir(parents=True)
        (folder / f"cpu{thread}" / "topology" / "thread_siblings_list").write_text(text + "\n")


def test_threads_of_one_core_are_one_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Six threads on three cores, of which the process may use four threads on two cores."""
    topology(tmp_path, "0,3", "1,4", "2,5", "0,3", "1,4", "2,5")
    monkeypatch.setattr(devices, "CPUS", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 3, 4}, raising=False)
    assert (usable_threads(), usable_cores()) == (4, 2)


def test_where_cores_are_not_told_they_are_the_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(devices, "CPUS", tmp_path)
    assert usable_cores() == usable_threads()
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert usable_cores() == usable_threads()


def test_a_kind_has_its_options_only() -> None:
    for kind, options in OPTIONS.items():
        values = {"memory": "2MB", "bandwidth": "1e6"}
        given = ",".join(f"{key}={values.get(key, '1')}" for key in options)
        found = {"memory": 2 * 10**6, "bandwidth": 1e6}
        assert parse_device(f"{kind}:{given}") == (kind, {k: found.get(k, 1) for k in options})


@pytest.mark.usefixtures("eight")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tpu", f"no device 'tpu'; there are: {', '.join(KINDS)}"),
        ("", "no device ''; there are: "),
        ("cpu:memory=1GiB", "device cpu: no option 'memory=1GiB'; there are: cpu_threads"),
        ("emulated:gpus=1", "no option 'gpus=1'; there are: memory, bandwidth, latency_ns, gpu_"),
        ("emulated:memory", "no option 'memory'; there are: "),
        ("emulated:memory=", "memory='' is not legal; a size from 1MiB to the host's 16.0GiB"),
        ("emulated:memory=0", "memory='0' is not legal"),
        ("emulated:memory=17GiB", "memory='17GiB' is not legal"),
        ("emulated:bandwidth=nan", "bandwidth='nan' is not legal; bytes per second from 1e6 to"),
        ("emulated:bandwidth=0", "bandwidth='0' is not legal"),
        ("emulated:bandwidth=1e999", "bandwidth='1e999' is not legal"),
        ("emulated:latency_ns=-1", "latency_ns='-1' is not legal; a whole number from 0 to 10000"),
        ("emulated:latency_ns=1.5", "latency_ns='1.5' is not legal"),
        ("emulated:gpu_threads=0", "gpu_threads='0' is not legal; a whole number from 1 to 8 is"),
        ("cpu:cpu_threads=9", "cpu_threads='9' is not legal; a whole number from 1 to 8 is"),
        ("cuda:cpu_threads=one", "device cuda: cpu_threads='one' is not legal"),
        ("cpu:cpu_threads=1,cpu_threads=2", "device cpu: cpu_threads is given twice"),
    ],
)
def test_what_is_not_legal_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(CalibrationError) as refused:
        open_device(text)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
