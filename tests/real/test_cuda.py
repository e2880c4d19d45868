"""Lanes of a CUDA device, on a stand-in that notes what is called and in which order."""

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from moesim.real.cuda import CudaClock, CudaLane, CudaTicket
from moesim.real.lanes import Lane


class Stream:
    def __init__(self, driver: "Driver") -> None:
        self.driver = driver
        self.number = len(driver.streams)
        driver.streams.append(self)

    def wait_event(self, event: "Event") -> None:
        assert event.recorded, "waiting for what was not recorded waits for nothing"
        self.driver.note(f"stream {self.number} waits for {event.name}")


class Event:
    def __init__(self, driver: "Driver") -> None:
        self.driver = driver
        self.recorded = False
        self.name = ""
        self.ms = 0.0

    def record(self, stream: Stream | None = None) -> None:
        self.recorded = True
        self.ms = self.driver.tick()
        self.name = f"event {self.ms:.0f}"
        if stream is not None:
            self.driver.note(f"stream {stream.number} records {self.name}")

    def synchronize(self) -> None:
        assert self.recorded

    def query(self) -> bool:
        return self.recorded and self.driver.finished

    def elapsed_time(self, other: "Event") -> float:
        return other.ms - self.ms


class Driver:
    """As much of `torch.cuda` as lanes use; every recorded event is a ms after the one before."""

    def __init__(self) -> None:
        self.streams: list[Stream] = []
        self.calls: list[str] = []
        self.ms = 0
        self.current: list[int] = []
        self.finished = True
        self.Stream, self.Event = self.make_stream, self.make_event
        self._lock = threading.Lock()

    def tick(self) -> int:
        with self._lock:
            self.ms += 1
            return self.ms

    def note(self, call: str) -> None:
        self.calls.append(call)

    def make_stream(self) -> Stream:
        return Stream(self)

    def make_event(self, enable_timing: bool) -> Event:
        assert enable_timing
        return Event(self)

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        self.current.append(stream.number)
        yield
        self.current.pop()


@pytest.fixture
def driver() -> Driver:
    return Driver()


def lanes(driver: Driver, *names: str) -> list[CudaLane]:
    clock = CudaClock(driver)
    return [CudaLane(name, driver, clock) for name in names]


def test_work_is_issued_on_the_lane_s_stream_between_two_events(driver: Driver) -> None:
    (gpu,) = lanes(driver, "gpu")
    gpu.submit(lambda: driver.note(f"work on {driver.current}")).wait()
    gpu.close()
    assert driver.calls == ["stream 0 records event 2", "work on [0]", "stream 0 records event 3"]


def test_times_are_those_of_the_events_on_the_host_s_clock(driver: Driver) -> None:
    """The clock's own event is at 1 ms; events follow a ms apart."""
    (gpu,) = lanes(driver, "gpu")
    first, second = (gpu.submit(lambda: None) for _ in range(2))
    second.wait()
    first.wait()
    gpu.close()
    assert (first.ns, second.ns) == (1_000_000, 1_000_000)
    assert second.start_ns - first.start_ns == 2_000_000


def test_a_stream_waits_for_the_event_of_another_lane_once_it_is_recorded(driver: Driver) -> None:
    """The copy is held up before it is issued; the run must not be issued before it."""
    h2d, gpu = lanes(driver, "h2d", "gpu")
    go = threading.Event()
    copy = h2d.submit(go.wait)
    run = gpu.submit(lambda: driver.note("run"), after=[copy])
    go.set()
    run.wait()
    for lane in (h2d, gpu):
        lane.close()
    assert isinstance(copy, CudaTicket)
    ended = copy.marks[-1][1].name
    waits = driver.calls.index(f"stream 1 waits for {ended}")
    assert driver.calls.index(f"stream 0 records {ended}") < waits
    assert waits < driver.calls.index("run")


def test_a_lane_does_not_wait_for_itself_on_the_device(driver: Driver) -> None:
    (gpu,) = lanes(driver, "gpu")
    first = gpu.submit(lambda: None)
    gpu.submit(lambda: None, after=[first]).wait()
    gpu.close()
    assert not any("waits" in call for call in driver.calls)


def test_the_host_s_work_is_over_before_a_kernel_that_needs_it_is_issued(driver: Driver) -> None:
    (gpu,) = lanes(driver, "gpu")
    with Lane("cpu") as cpu:
        computed = cpu.submit(lambda: driver.note("computed"))
        gpu.submit(lambda: driver.note("combine"), after=[computed]).wait()
    gpu.close()
    assert driver.calls.index("computed") < driver.calls.index("combine")


def test_the_host_waits_for_the_device_before_it_computes(driver: Driver) -> None:
    (d2h,) = lanes(driver, "d2h")
    with Lane("cpu") as cpu:
        sent = d2h.submit(lambda: driver.note("send"))
        cpu.submit(lambda: driver.note("compute"), after=[sent]).wait()
    d2h.close()
    assert driver.calls.index("send") < driver.calls.index("compute")


def test_errors_come_to_whoever_waits(driver: Driver) -> None:
    h2d, gpu = lanes(driver, "h2d", "gpu")

    def fail() -> Any:
        raise RuntimeError("out of memory")

    failed = h2d.submit(fail)
    behind = gpu.submit(lambda: pytest.fail("was issued"), after=[failed])
    for ticket in (failed, behind):
        with pytest.raises(RuntimeError, match="out of memory"):
            ticket.wait()
        assert ticket.done
    for lane in (h2d, gpu):
        lane.close()


def test_issued_is_not_done(driver: Driver) -> None:
    (gpu,) = lanes(driver, "gpu")
    driver.finished = False
    ticket = gpu.submit(lambda: None)
    gpu.close()
    assert not ticket.done
    driver.finished = True
    assert ticket.done


class Stamp:
    """An event of a device that stamps whole nanoseconds and tells milliseconds as CUDA does."""

    def __init__(self, ns: int) -> None:
        self.ns = ns

    def record(self) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: "Stamp") -> float:
        return float(np.float32((other.ns - self.ns) / 1e6))


class Stamps:
    def Event(self, enable_timing: bool) -> Stamp:  # noqa: N802
        return Stamp(0)


def errors_ns(clock: CudaClock, moments: Iterable[int]) -> list[int]:
    """Return by how many ns a clock is wrong about each moment, asked for in this order."""
    start_ns = clock.ns(Stamp(0))
    return [clock.ns(Stamp(ns)) - start_ns - ns for ns in moments]


HOUR_NS = 3600 * 10**9


def test_an_hour_of_events_is_exact_while_they_follow_closely() -> None:
    """Gaps of up to 8 ms; the sum of two, at most 16 ms, is what the base moves by."""
    gaps = np.random.default_rng(1).integers(1, 8_000_000, 900_000)
    moments = np.cumsum(gaps)
    assert moments[-1] >= HOUR_NS * 0.99
    assert not any(errors_ns(CudaClock(Stamps()), map(int, moments)))


@pytest.mark.parametrize("gap_ns", [16_777_217, 999_970_000, 1_023_999_961, 60 * 10**9 + 1])
def test_rarer_events_are_right_to_a_tenth_of_a_microsecond_per_second(gap_ns: int) -> None:
    """The same gap for an hour: whatever its rounding is, it adds up."""
    moments = range(gap_ns, HOUR_NS, gap_ns)
    found = errors_ns(CudaClock(Stamps()), moments)
    assert all(abs(error) <= 1e-7 * ns for error, ns in zip(found, moments, strict=True))


def test_neighbours_keep_their_distance_an_hour_later() -> None:
    """Counted from the beginning both would be rounded to quarters of a millisecond."""
    late = [HOUR_NS + 1_000, HOUR_NS + 2_000, HOUR_NS + 100_000]
    assert Stamp(0).elapsed_time(Stamp(late[0])) == Stamp(0).elapsed_time(Stamp(late[2]))
    clock = CudaClock(Stamps())
    clock.ns(Stamp(HOUR_NS))
    first, second, third = (clock.ns(Stamp(ns)) for ns in late)
    assert (second - first, third - first) == (1_000, 99_000)


def test_events_may_be_asked_for_in_any_order_by_any_thread() -> None:
    """What is d seconds before the base is off by at most 0.1 µs x d."""
    moments = [int(ns) for ns in np.random.default_rng(2).integers(0, 10**10, 4_000)]
    clock = CudaClock(Stamps())
    start_ns = clock.ns(Stamp(0))
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda ns: clock.ns(Stamp(ns)), moments))
    # The chain of bases is 10 s long at most, and no event is more than 10 s before its base.
    assert all(
        abs(found_ns - start_ns - ns) <= 2_000 for found_ns, ns in zip(found, moments, strict=True)
    )
