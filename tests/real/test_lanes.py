"""Lanes: one operation at a time, in order, after what it waits for; and an emulated device."""

import threading
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch

from moesim.errors import CalibrationError
from moesim.real.emulated import Emulated, Throttle, wait_until
from moesim.real.lanes import BACKGROUND, URGENT, Lane, Ticket, back_to_back, overlap_ns


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


# Two queues.


class Gate:
    """Work that blocks the lane until the test opens it, and notes that it was done."""

    def __init__(self, seen: list[str], name: str) -> None:
        self.seen = seen
        self.name = name
        self.reached, self.go = threading.Event(), threading.Event()

    def __call__(self) -> None:
        self.reached.set()
        self.go.wait()
        self.seen.append(self.name)


def noting(seen: list[str], *names: str) -> list[Callable[[], None]]:
    return [lambda name=name: seen.append(name) for name in names]  # type: ignore[misc]


def test_what_is_urgent_goes_first_and_each_queue_keeps_its_order() -> None:
    seen: list[str] = []
    with Lane("h2d") as lane:
        first = Gate(seen, "first")
        lane.submit(first)
        tickets = [
            lane.submit(noting(seen, name), queue=BACKGROUND if name.islower() else URGENT)
            for name in ("a", "b", "A", "c", "B")
        ]
        first.go.set()
        for ticket in tickets:
            ticket.wait()
    assert seen == ["first", "A", "B", "a", "b", "c"]


def test_between_two_pieces_the_background_makes_way() -> None:
    """Urgent work that comes while the second of four pieces is done goes before the third."""
    seen: list[str] = []
    with Lane("h2d") as lane:
        second = Gate(seen, "2")
        pieces: list[Callable[[], None]] = [*noting(seen, "1"), second, *noting(seen, "3", "4")]
        copy = lane.submit(pieces, queue=BACKGROUND)
        second.reached.wait()
        urgent = lane.submit(noting(seen, "urgent 1", "urgent 2"))
        second.go.set()
        copy.wait()
    assert seen == ["1", "2", "urgent 1", "urgent 2", "3", "4"]
    assert len(copy.stretches) == 2
    assert copy.start_ns == copy.stretches[0][0] <= copy.stretches[0][1] <= urgent.start_ns
    assert urgent.end_ns <= copy.stretches[1][0] <= copy.stretches[1][1] == copy.end_ns


def test_a_piece_may_bring_more_which_are_done_before_the_others() -> None:
    seen: list[str] = []

    def first() -> list[Callable[[], None]]:
        seen.append("1")
        return noting(seen, "1a", "1b")

    with Lane("h2d") as lane:
        lane.submit([first, *noting(seen, "2")], queue=BACKGROUND).wait()
    assert seen == ["1", "1a", "1b", "2"]


def test_a_blocked_head_blocks_its_own_queue_only() -> None:
    seen: list[str] = []
    with Lane("disk") as other, Lane("h2d") as lane:
        read = Gate(seen, "read")
        ticket = other.submit(read)
        blocked = lane.submit(noting(seen, "urgent"), after=[ticket])
        behind = lane.submit(noting(seen, "behind"))
        lane.submit(noting(seen, "background"), queue=BACKGROUND).wait()
        assert not blocked.done
        read.go.set()
        behind.wait()
    assert seen == ["background", "read", "urgent", "behind"]


def test_what_has_not_begun_can_be_taken_back() -> None:
    seen: list[str] = []
    with Lane("h2d") as lane:
        first = Gate(seen, "first")
        running = lane.submit([first, *noting(seen, "more")], queue=BACKGROUND)
        queued = lane.submit(noting(seen, "never"), queue=BACKGROUND)
        first.reached.wait()
        assert not lane.cancel(running)
        assert lane.cancel(queued)
        assert queued.wait().cancelled
        assert not lane.cancel(queued)
        first.go.set()
        running.wait()
        assert not lane.cancel(running)
    assert seen == ["first", "more"]
    assert not queued.stretches


def test_what_was_interrupted_cannot_be_taken_back() -> None:
    seen: list[str] = []
    with Lane("h2d") as lane:
        first, urgent = Gate(seen, "1"), Gate(seen, "urgent")
        copy = lane.submit([first, *noting(seen, "2")], queue=BACKGROUND)
        first.reached.wait()
        lane.submit(urgent)
        first.go.set()
        urgent.reached.wait()
        assert not lane.cancel(copy)
        urgent.go.set()
        copy.wait()
    assert seen == ["1", "urgent", "2"]


def test_a_promoted_operation_is_the_last_of_the_urgent_ones() -> None:
    seen: list[str] = []
    with Lane("disk") as other, Lane("h2d") as lane:
        read, first = Gate(seen, "read"), Gate(seen, "first")
        reading = other.submit(read)
        lane.submit(first)
        first.reached.wait()
        a, b, waits = (
            lane.submit(noting(seen, name), after, queue=BACKGROUND)
            for name, after in (("a", ()), ("b", ()), ("waits", [reading]))
        )
        lane.submit(noting(seen, "urgent"))
        assert not lane.promote(waits)
        assert lane.promote(b)
        assert not lane.promote(b)
        lane.submit(noting(seen, "later"), after=[reading])
        assert not lane.promote(a)
        first.go.set()
        a.wait()
        read.go.set()
        waits.wait()
    assert seen == ["first", "urgent", "b", "a", "read", "later", "waits"]


def test_a_lane_remembers_its_first_error() -> None:
    def fail(text: str) -> None:
        raise RuntimeError(text)

    with Lane("gpu") as lane:
        assert lane.error is None
        lane.submit(lambda: fail("one"))
        lane.submit(lambda: fail("two"))
        lane.submit(lambda: None).wait()
        assert str(lane.error) == "one"


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


class Clock:
    """Goes on by 50 ns at each reading, and by what is slept."""

    now = 0

    def perf_counter_ns(self) -> int:
        self.now += 50
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += round(seconds * 1e9)


def test_an_operation_is_one_transfer_whatever_its_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """1,000 ns, and 1 ns per byte: 4,000 bytes take 5,000 ns in one piece as in four.

    What follows at once begins when the link is done; what copies nothing does not occupy it.
    """
    clock = Clock()
    monkeypatch.setattr("moesim.real.lanes.time", clock)
    monkeypatch.setattr("moesim.real.emulated.time", clock)
    monkeypatch.setattr("moesim.real.emulated.SPIN_NS", 0)
    device = Emulated(1 << 20, Throttle(latency_ns=1000, bytes_per_s=1e9))
    source = torch.arange(4000, dtype=torch.int16).view(torch.uint8)[:4000]
    target = device.empty(4000, dtype=torch.uint8)
    whole = partial(device.copy, target, source)
    parts = [
        partial(device.copy, new, old)
        for new, old in zip(target.split(1000), source.split(1000), strict=True)
    ]
    lane = device.lanes["h2d"]
    first, second, third = back_to_back(lane, [whole, lambda: parts, whole])
    assert (target == source).all()
    for ticket in (first, second, third):
        assert 0 <= 5000 - ticket.ns < 1000  # the lane notices a little late
    assert third.end_ns - first.start_ns == pytest.approx(15_000, abs=100)
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
