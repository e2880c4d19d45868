"""Devices are opened by kind, with what they are told, or refused in one line."""

import pytest
import torch

from moesim.errors import CalibrationError
from moesim.real.devices import KINDS, open_device, processor_name, usable_threads
from moesim.real.emulated import Emulated, Throttle


def test_an_emulated_device_shares_the_threads_of_the_host() -> None:
    device = open_device("emulated", memory_bytes=1 << 20)
    threads = {name: lane.threads for name, lane in device.lanes.items()}
    device.close()
    assert threads.keys() == {"gpu", "cpu", "h2d", "d2h"}
    assert threads["gpu"] + threads["cpu"] == max(2, usable_threads())
    assert device.memory_bytes == 1 << 20


def test_an_emulated_device_is_what_it_is_told() -> None:
    link = Throttle(5, 1e6)
    device = open_device("emulated", memory_bytes=64, link=link, gpu_threads=3, cpu_threads=2)
    device.close()
    assert isinstance(device, Emulated)
    assert (device.label, device.link) == ("emulated", link)
    assert (device.lanes["gpu"].threads, device.lanes["cpu"].threads) == (3, 2)


def test_without_a_device_there_is_one_lane_and_no_memory() -> None:
    device = open_device("cpu")
    assert (device.label, device.name, device.memory_bytes) == ("cpu", processor_name(), 0)
    assert {name: lane.threads for name, lane in device.lanes.items()} == {"cpu": usable_threads()}
    assert device.host(2, 3, dtype=torch.bfloat16).shape == (2, 3)
    with pytest.raises(CalibrationError, match="no device memory"):
        device.empty(1, dtype=torch.uint8)
    with pytest.raises(CalibrationError, match="no link"):
        device.copy(None, None)
    device.free_all()
    device.close()


def test_a_lane_of_the_processor_computes_with_its_threads() -> None:
    device = open_device("cpu", cpu_threads=1)
    found: list[int] = []
    device.lanes["cpu"].submit(lambda: found.append(torch.get_num_threads())).wait()
    device.close()
    assert found == [1]


def test_cuda_is_refused_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(CalibrationError, match=r"sees none here; there are: cpu, emulated"):
        open_device("cuda")


def test_what_is_no_device_is_refused() -> None:
    with pytest.raises(CalibrationError, match=f"no device 'tpu'; there are: {', '.join(KINDS)}"):
        open_device("tpu")
    with pytest.raises(CalibrationError, match="memory_bytes must be at least 1, not 0"):
        open_device("emulated", memory_bytes=0)
    with pytest.raises(CalibrationError, match="gpu_threads must be at least 1, not -1"):
        open_device("emulated", gpu_threads=-1)
    with pytest.raises(CalibrationError, match=r"bytes_per_s must be at least 1, not nan"):
        open_device("emulated", link=Throttle(0, float("nan")))
    with pytest.raises(CalibrationError, match="latency_ns must be at least 0, not -1"):
        open_device("emulated", link=Throttle(-1, 1e9))
