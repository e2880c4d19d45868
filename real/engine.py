"""Run a prepared run on a device: the same host program and policy, with weights and kernels."""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moesim.errors import MoesimError
from moesim.host import run_steps
from moesim.log import Contents
from moesim.real.account import totals
from moesim.real.dense import Dense
from moesim.real.device import Device
from moesim.real.forward import Forward
from moesim.real.store import Experts
from moesim.real.torch_machine import TorchMachine
from moesim.real.weights import Held, Shape, Slot, copy_in, random_expert
from moesim.real.works import Works, slot_memory
from moesim.residency import contents
from moesim.run import Prepared
from moesim.sim.replay import Replayed, log_of, policy_failure, replay
from moesim.state import OK, host_error
from moesim.types import BITS, COPY_IN, EXPERT_GPU, MOVE, WHOLE, IntArray, as_scalars

Progress = Callable[[int, int], None]
"""Called with the steps done and the steps in all."""
Watch = Callable[[int, Forward], None]
WARM_UP_STEPS = 2
"""The prompts' step, and one of decode."""


class Demands(NamedTuple):
    """What a run asks of the weights."""

    precisions: tuple[int, ...]
    """Bits in which experts are copied or computed, those of the store among them."""
    parts: bool
    """Whether experts are copied in parts."""


def demands(prepared: Prepared) -> Demands:
    """Return what a run will ask for, by simulating it; it cannot be run afterwards."""
    log = replay(prepared, record=True).log
    assert log is not None
    moved = log.operations[np.isin(log.operations["kind"], (COPY_IN, MOVE, EXPERT_GPU))]
    precisions = {prepared.setting.precision, *moved["precision"].tolist()}
    precisions |= {one.precision for one in log.initial}
    parts = bool((moved["part"] != WHOLE).any()) or any(c.part != WHOLE for c in log.initial)
    return Demands(tuple(sorted((BITS[p] for p in precisions), reverse=True)), parts)


class Engine:
    """A device and random experts in the host's memory, for one run after the other.

    Experts stay from run to run while their model and precision stay. `folder` is where those go
    whose home is the disk.
    """

    def __init__(self, device: Device, *, seed: int = 0, folder: Path | None = None) -> None:
        """Take a device, whose lanes are idle."""
        self.device = device
        self.seed = seed
        self.folder = folder or Path(tempfile.gettempdir())
        self.experts: Experts | None = None
        self._made_for: object = None
        self._dense: Dense | None = None
        self._dense_for: object = None
        self._dense_bytes = 0
        """Of device memory."""

    def experts_for(self, prepared: Prepared, asked: Demands) -> Experts:
        """Return experts of a run's model, in all precisions that it asks for."""
        model, placement = prepared.model, prepared.placement
        # Parts are columns of a matrix, too, which CUDA brings from pinned memory by neuron only.
        by_neuron = asked.parts and self.device.label == "cuda"
        shape = Shape(model.hidden, model.expert_width, by_neuron)
        bits = BITS[prepared.setting.precision]
        on_disk = placement.on_disk
        wanted = (
            shape,
            model.layers,
            model.experts,
            bits,
            None if on_disk is None else on_disk.tobytes(),
        )
        if self.experts is None or self._made_for != wanted:
            self.forget()
            make = partial(random_expert, model.hidden, model.expert_width, self.seed)
            self.experts = Experts(
                self.device, shape, model.layers, model.experts, make, bits, on_disk=on_disk,
                folder=self.folder,
            )  # fmt: skip
            self._made_for = wanted
        self.experts.prepare(asked.precisions)
        return self.experts

    def dense_for(self, prepared: Prepared) -> Dense:
        """Return the weights outside the experts of a run's model, where its placement has them."""
        import torch

        model, on_host = prepared.model, prepared.placement.dense_on_host
        if self._dense is None or self._dense_for != (model, on_host):
            self._dense = None
            self.device.free_all()
            self._dense = Dense(self.device, model, on_host, torch.bfloat16, self.seed)
            self._dense_for = model, on_host
            self._dense_bytes = self.device.taken_bytes
        return self._dense

    def run(
        self, make: Callable[[], Prepared], *, warm_up: int = WARM_UP_STEPS,
        progress: Progress | None = None, watch: Watch | None = None,
    ) -> Replayed:  # fmt: skip
        """Run what `make` prepares, called anew each time; the result is a simulator's, with a log.

        First it is simulated, to know what it asks for, and its first `warm_up` steps are run
        without counting: kernels are chosen and memory is taken at the first call. After each step
        `watch` is called. Raises PolicyError, DeadlockError, or RealError for what goes wrong on a
        lane; the device's memory is given back in any case.
        """
        asked = demands(make())
        if warm_up:
            self._run(make(), asked, warm_up, None, None)
        prepared = make()
        return self._run(prepared, asked, len(prepared.host.steps.phase), progress, watch)

    def forget(self) -> None:
        """Give back the memory of all weights."""
        if self.experts is not None:
            self.experts.close()
        self.experts = self._dense = None
        self.device.free_all()

    def close(self) -> None:
        """Give back everything, and end the lanes."""
        self.forget()
        self.device.close()

    def _run(
        self, prepared: Prepared, asked: Demands, steps: int, progress: Progress | None,
        watch: Watch | None,
    ) -> Replayed:  # fmt: skip
        host, placement, device = prepared.host, prepared.placement, self.device
        experts = self.experts_for(prepared, asked)
        initial, slot_bytes = contents(host.res), host.res.slot_bytes.copy()
        dense = self.dense_for(prepared)
        with cleared(device, self._dense_bytes), uncollected():
            forward = Forward(
                prepared.model, device, prepared.feed.steps, kv_on_host=placement.kv_on_host,
                dense_on_host=placement.dense_on_host,
                attention_on_cpu=placement.attention_on_cpu, seed=self.seed, dense=dense,
            )  # fmt: skip
            slots = filled_slots(device, experts, slot_bytes, initial, asked.precisions)
            works = Works(
                device, experts, forward, slots, host.res, prepared.chunk_bytes, asked.precisions
            )
            fast = as_scalars(host)._replace(seen=host.seen)
            machine = TorchMachine(device, prepared.feed, works)
            started = time.perf_counter()
            for step in range(min(steps, len(host.steps.phase))):
                walk(machine, prepared, fast, step)
                if watch is not None:
                    watch(step, forward)
                if progress is not None:
                    progress(step + 1, steps)
            machine.drain()
            wall_s = time.perf_counter() - started
            return replayed(prepared, machine, device.label, initial, slot_bytes, wall_s)


def replayed(
    prepared: Prepared, machine: TorchMachine, label: str, initial: tuple[Contents, ...],
    slot_bytes: IntArray, wall_s: float,
) -> Replayed:  # fmt: skip
    """Return a run that is over as the simulator returns its own; `label` is the device's.

    `initial` and `slot_bytes` are those before the run.
    """
    operations, segments = machine.logged()
    *heads, drained = totals(operations, segments, machine.waited)
    return Replayed(
        prepared=prepared,
        machine=label,
        heads=tuple(heads),
        drained=drained,
        operations=len(operations),
        preemptions=int((segments["done"] == 0).sum()),
        paused_ns=0,
        wall_s=wall_s,
        log=log_of(prepared, operations, segments, initial, slot_bytes, exact=False),
    )


def walk(machine: TorchMachine, prepared: Prepared, fast: Any, step: int) -> None:
    """Walk one step."""
    try:
        with np.errstate(divide="raise", over="raise", invalid="raise"):
            rule = run_steps(machine, prepared.policy, fast, step, step + 1)
    except MoesimError:
        raise
    except Exception as error:
        raise policy_failure(prepared.chosen.name, error) from error
    if rule != OK:
        raise host_error(prepared.host, prepared.chosen.name)


def filled_slots(
    device: Device, experts: Experts, slot_bytes: Any, initial: Sequence[Contents],
    precisions: Sequence[int],
) -> list[Slot]:  # fmt: skip
    """Return the slots of a run, with what they hold before the first step."""
    slots = [
        Slot(number, slot_memory(device, experts, size, precisions), size)
        for number, size in enumerate(map(int, slot_bytes))
    ]
    for own in initial:
        bits = BITS[own.precision]
        image = experts.image_at_once(own.layer, own.expert, bits)
        wanted = Held(own.layer, own.expert, bits, 0, own.part)
        fill = partial(copy_in, device.copy, image, slots[own.slot], experts.shape, wanted)
        device.lanes["h2d"].submit(fill).wait()
    return slots


@contextmanager
def cleared(device: Device, but: int = 0) -> Iterator[None]:
    """Take back what lanes have queued when something goes wrong, and give back all memory but so
    many bytes that were taken before.
    """
    try:
        yield
    finally:
        for lane in device.lanes.values():
            lane.drop()
        device.free_all(but)


@contextmanager
def uncollected() -> Iterator[None]:
    """Collect what Python has to, and then nothing: looking through a large heap takes it half a
    second, in which no lane begins anything."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
