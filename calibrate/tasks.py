"""What a calibration measures on a device, in which order, and for how long."""

from collections.abc import Sequence

from moesim.calibrate import (
    copies,
    disk,
    experts,
    host,
    interference,
    layers,
    memory,
)
from moesim.calibrate.series import Bench, Task
from moesim.calibrate.timing import DEFAULT, Limits
from moesim.errors import CalibrationError
from moesim.model import ModelSpec
from moesim.real.devices import open_device

QUICK = Limits(warm_ups=2, least=5, most=100, seconds=0.2, spread=0.05)


def open_bench(device: str | None, *, quick: bool) -> Bench:
    """Return a device, of the kind that the machine has if none is named, and limits.

    `device` is a text for `open_device`.

    Raises CalibrationError for a device that is not legal or not there, or without PyTorch.
    """
    try:
        import torch
    except ImportError:
        raise CalibrationError(
            "calibrating needs PyTorch and SciPy: pip install 'moesim[torch]'"
        ) from None
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Bench(open_device(device), QUICK if quick else DEFAULT, quick)


def tasks_of(
    bench: Bench, models: Sequence[ModelSpec], precisions: Sequence[str] = ("bf16",)
) -> list[Task]:
    """Return all tasks; those of two models with the same shapes are there once.

    `precisions` are those of experts, of `experts.PRECISIONS`.
    """
    found = [
        *memory.tasks(bench),
        *experts.tasks(bench, models, precisions),
        *layers.tasks(bench, models),
    ]
    hidden, width = models[0].hidden, models[0].expert_width
    found += [*copies.tasks(bench), *interference.tasks(bench, hidden, width)]
    found += [*disk.tasks(bench), *host.tasks(bench)]
    return list({task.name: task for task in found}.values())
