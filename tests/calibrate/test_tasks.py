"""A bench is opened by the text that names its device; tasks are those of models and precisions."""

from collections.abc import Iterator

import pytest
import torch

from moesim.calibrate.calibration import digest
from moesim.calibrate.facts import machine_facts
from moesim.calibrate.series import Bench, Task
from moesim.calibrate.tasks import QUICK, open_bench, tasks_of
from moesim.calibrate.timing import DEFAULT
from moesim.errors import CalibrationError
from moesim.model import load_model
from moesim.real import devices


@pytest.fixture(autouse=True)
def _eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "usable_threads", lambda: 8)
    monkeypatch.setattr(devices, "usable_cores", lambda: 8)


@pytest.fixture
def bench() -> Iterator[Bench]:
    found = open_bench("emulated:memory=16MiB", quick=True)
    yield found
    found.device.close()


def test_without_a_text_the_device_is_the_one_that_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = open_bench(None, quick=False)
    found.device.close()
    assert found.device.label == "cpu"
    assert (found.limits, found.quick) == (DEFAULT, False)
    with pytest.raises(CalibrationError, match="no device ''"):
        open_bench("", quick=True)


def test_quick_is_quick(bench: Bench) -> None:
    assert (bench.limits, bench.quick) == (QUICK, True)


def test_experts_are_measured_in_the_precisions_asked_for(bench: Bench) -> None:
    models = [load_model("qwen3-30b-a3b")]

    def experts(found: list[Task]) -> set[str]:
        return {task.name for task in found if task.name.startswith("expert/")}

    plain = {"expert/gpu/2048x768/16", "expert/cpu/2048x768/16"}
    packed = {"expert/gpu/2048x768/4", "expert/cpu/2048x768/4"}
    assert experts(tasks_of(bench, models)) == plain
    assert experts(tasks_of(bench, models, ("int4", "bf16", "int4"))) == plain | packed
    with pytest.raises(CalibrationError, match="no precision 'int3'"):
        tasks_of(bench, models, ("int3",))


def test_a_device_of_other_options_is_measured_anew() -> None:
    """What is kept of one must not be taken for the other's."""
    facts = machine_facts()
    task = Task("copy/h2d/pinned", 1.0, lambda _: pytest.fail("is not to be run"))
    options = (
        "", "memory=3MiB", "bandwidth=3e9", "latency_ns=30000", "gpu_threads=3", "cpu_threads=3"
    )  # fmt: skip
    found = set()
    for text in (*(f"emulated:{option}" for option in options), "cpu", "cpu:cpu_threads=3"):
        bench = open_bench(text, quick=True)
        found.add(digest(task, bench, facts))
        bench.device.close()
    assert len(found) == len(options) + 2
