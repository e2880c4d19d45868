"""Lanes: one operation at a time, in order, after what it waits for; and an emulated device."""

import threading
import time
from itertools import pairwise

import pytest
import torch

from moesim.errors import CalibrationError
from moesim.real.emulated import Emulated, Throttle, wait_until
from moesim.real.lanes import Lane, Ticket, overlap_ns


def test_a_lane_does_one_after_the_other_in_order() -> None:
    seen: list[int] = []
    with Lane("gpu") as lane:
        tickets = [lane.submit(lambda i=i: seen.append(i)) for i in range(50)]  # type: ignore[misc]
        tickets[-1].wait()
    assert seen == list(range(50))
    for before, after in pairwise(tickets):
        assert before.start_ns <= before.end_ns <= after.start_ns


def test_an_operation_begins_when_what_it_waits_for_is_over() -> None:
    """The lane behind waits for an event that the test gives; what it does then is seen."""
    go = threading.Event()
    with Lane("h2d") as first, Lane("gpu") as second:
        copy = first.submit(go.wait)
        run = second.submit(lambda: None, after=[copy])
        assert not run.done
        go.set()
        run.wait()
        assert copy.done
        assert copy.end_ns <= run.start_ns


def test_errors_come_to_whoever_waits_and_the_lane_goes_on() -> None:
    def fail() -> None:
        raise RuntimeError("no such kernel")

    with Lane("gpu") as lane, Lane("cpu") as other:
        failed = lane.submit(fail)
        behind = other.submit(lambda: pytest.fail("was done"), after=[failed])
        fine = lane.submit(lambda: None)
        for ticket in (failed, behind):
            with pytest.raises(RuntimeError, match="no such kernel"):
                ticket.wait()
        fine.wait()


def test_what_is_queued_is_done_before_a_lane_closes() -> None:
    seen: list[int] = []
    lane = Lane("d2h")
    for i in range(20):
        lane.submit(lambda i=i: seen.append(i))  # type: ignore[misc]
    lane.close()
    assert seen == list(range(20))


def test_a_lane_has_its_own_number_of_threads() -> None:
    with Lane("gpu", threads=1) as one, Lane("cpu", threads=2) as two:
        found: dict[str, int] = {}
        for lane in (one, two):
            name = lane.name
            lane.submit(lambda name=name: found.update({name: torch.get_num_threads()})).wait()  # type: ignore[misc]
    assert found == {"gpu": 1, "cpu": 2}


def ran(lane: str, *spans: tuple[int, int]) -> list[Ticket]:
    tickets = []
    for start, end in spans:
        ticket = Ticket(lane)
        ticket.start_ns, ticket.end_ns = start, end
        tickets.append(ticket)
    return tickets


def test_overlap_is_the_time_in_which_both_were_busy() -> None:
    """0-10 and 12-20 against 5-15 and 18-30: 5, 3 and 2."""
    first, second = ran("gpu", (0, 10), (12, 20)), ran("h2d", (5, 15), (18, 30))
    assert overlap_ns(first, second) == overlap_ns(second, first) == 5 + 3 + 2
    assert overlap_ns(first, ran("h2d", (30, 40))) == 0
    assert overlap_ns(first, []) == 0


# The emulated device.


@pytest.fixture
def device() -> Emulated:
    return Emulated(1 << 20, Throttle(latency_ns=1000, bytes_per_s=1e9))


def test_a_copy_takes_no_less_than_the_link_allows(device: Emulated) -> None:
    """1,000 ns and 1 ns per byte; more it may always take on a busy machine."""
    source = torch.arange(1 << 16, dtype=torch.uint8)
    target = device.empty(1 << 16, dtype=torch.uint8)
    copy = device.lanes["h2d"].submit(lambda: device.copy(target, source)).wait()
    assert copy.ns >= 1000 + (1 << 16)
    assert (target == source).all()
    device.close()


@pytest.mark.parametrize(("latency_ns", "rate", "size", "ns"), [(5, 1e9, 0, 5), (5, 2e9, 8, 9)])
def test_the_link_by_hand(latency_ns: int, rate: float, size: int, ns: int) -> None:
    assert Throttle(latency_ns, rate).ns(size) == ns


def test_memory_is_its_own_and_has_an_end(device: Emulated) -> None:
    first = device.empty(3, 100, dtype=torch.float32)
    second = device.empty(7, dtype=torch.bfloat16)
    first.fill_(1)
    second.fill_(2)
    assert first.sum() == 300
    assert second.data_ptr() % 64 == first.data_ptr() % 64
    with pytest.raises(CalibrationError, match="1048576 bytes do not fit into the 1048576"):
        device.empty(1 << 20, dtype=torch.uint8)
    device.free_all()
    device.empty(1 << 20, dtype=torch.uint8)
    device.close()


def test_waiting_ends_after_the_deadline() -> None:
    for ns in (0, 20_000, 2_000_000):
        deadline = time.perf_counter_ns() + ns
        wait_until(deadline)
        assert time.perf_counter_ns() >= deadline
