"""Small logs written by hand: the correct ones pass, and each broken law is named."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from moesim.audit import audit
from moesim.errors import AuditError
from moesim.log import OPERATION, SEGMENT, Contents, Log
from moesim.types import (
    ATTENTION,
    COMBINE,
    COPY_IN,
    CPU,
    D2H,
    DENSE_IN,
    DISK,
    DISK_READ,
    EXPERT_CPU,
    EXPERT_GPU,
    GATE,
    GPU,
    H2D,
    H2D_BACKGROUND,
    HEAD,
    KV_IN,
    KV_OUT,
    LANES,
    MOVE,
    PREDICT,
    RESIZE,
    RETURN,
    SEND,
    SHARED,
    WHOLE,
)

QUEUE = {COPY_IN: H2D, RETURN: H2D, KV_IN: H2D, DENSE_IN: H2D, SEND: D2H, KV_OUT: D2H}
QUEUE |= {EXPERT_CPU: CPU, DISK_READ: DISK}
EXPERT_BYTES = 1024
FULL = np.full((32, len(LANES)), 1024)

Spans = list[tuple[int, int]]


class Draft:
    """A log in the making. By default: one step, one batch of 2 tokens, one slot per expert."""

    def __init__(self, loads: Any = (((2, 2),),), slots: int = 2) -> None:
        loads = np.array(loads, dtype=np.int64)
        if loads.ndim == 3:  # one batch
            loads = loads[:, :, None]
        steps, layers, batches, experts = loads.shape
        self.rows: dict[str, dict[str, Any]] = {}
        self.spans: dict[str, Spans] = {}
        self.rules: dict[str, Any] = {
            "initial": (),
            "slot_bytes": np.full(slots, EXPERT_BYTES),
            "budget_bytes": slots * EXPERT_BYTES,
            "loads": loads,
            "batch_tokens": np.full((steps, batches), 2),
            "expert_bytes": np.full((layers, 2), EXPERT_BYTES),
            "kv_on_host": False,
            "dense_on_host": False,
            "on_disk": np.zeros((layers, experts), dtype=np.int64),
            "fifo_link": False,
            "chunk_bytes": EXPERT_BYTES,
            "rates": FULL,
            "exact": True,
        }

    def add(self, name: str, kind: int, *spans: tuple[int, int], **fields: Any) -> None:
        """Submit an operation that runs in the given spans; `after` takes names."""
        row = {
            "duration_ns": sum(end - start for start, end in spans),
            "promote_ns": -1,
            "cancel_ns": -1,
            "slot": -1,
            "expert": -1,
            "queue": QUEUE.get(kind, GPU),
            "kind": kind,
        }
        row |= {"batch": 0 if kind in {ATTENTION, GATE, KV_IN, KV_OUT} else -1}
        if kind in {COPY_IN, EXPERT_GPU, MOVE}:
            row |= {"part": WHOLE, "amount": 2 if kind == EXPERT_GPU else EXPERT_BYTES}
        if kind in {ATTENTION, EXPERT_CPU}:
            row |= {"amount": 2}
        self.rows[name] = row | fields
        self.spans[name] = list(spans)

    def change(self, name: str, **fields: Any) -> "Draft":
        """Change what was submitted."""
        self.rows[name] |= fields
        return self

    def run(self, name: str, *spans: tuple[int, int]) -> "Draft":
        """Change when it ran, and not how long it should take."""
        self.spans[name] = list(spans)
        return self

    def drop(self, *names: str) -> "Draft":
        """Leave out operations; nobody waits for them."""
        for name in names:
            del self.rows[name], self.spans[name]
        return self

    def rule(self, **rules: Any) -> "Draft":
        """Change what the run had to obey."""
        self.rules |= rules
        return self

    def lax(self) -> "Draft":
        """Let it be the log of a real machine, whose lanes may be idle and its times inexact.

        Nobody waits for anybody, so that only laws about what operations mean can be broken.
        """
        for row in self.rows.values():
            row["after"] = ()
        return self.rule(exact=False)

    def swap(self, a: str, b: str) -> "Draft":
        """Let two operations of one lane run, and be submitted, in place of each other."""
        names = {a: b, b: a}
        times = {name: row.get("submit_ns", 0) for name, row in self.rows.items()}
        self.rows = {names.get(n, n): self.rows[names.get(n, n)] for n in self.rows}
        self.spans[a], self.spans[b] = self.spans[b], self.spans[a]
        return self.change(a, submit_ns=times[b]).change(b, submit_ns=times[a])

    def log(self) -> Log:
        """Return the log. Tickets are in order of `add`; the default submission is at 0 ns."""
        tickets = {name: ticket for ticket, name in enumerate(self.rows, start=1)}
        operations = np.zeros(len(self.rows), dtype=OPERATION)
        for i, row in enumerate(self.rows.values()):
            waits = [tickets[name] for name in row.get("after", ()) if name in tickets]
            filled = {"ticket": i + 1} | row | {"after": waits + [0] * (3 - len(waits))}
            for field, value in filled.items():
                operations[field][i] = value
        segments = [
            (tickets[name], start, end, number == len(spans))
            for name, spans in self.spans.items()
            for number, (start, end) in enumerate(spans, start=1)
        ]
        segments.sort(key=lambda segment: segment[2])
        return Log(operations, np.array(segments, dtype=SEGMENT), **self.rules)


def one_miss() -> Draft:
    """Expert 0 is resident; expert 1 is copied when the router has asked for it."""
    d = Draft()
    d.rules["initial"] = (Contents(0, 0, 0, WHOLE, 0),)
    d.add("attention", ATTENTION, (0, 10))
    d.add("gate", GATE, (10, 12), after=["attention"])
    d.add("copy", COPY_IN, (12, 52), submit_ns=12, expert=1, slot=1)
    d.add("run0", EXPERT_GPU, (12, 20), submit_ns=12, expert=0, slot=0)
    d.add("run1", EXPERT_GPU, (52, 60), submit_ns=12, expert=1, slot=1, after=["copy"])
    d.add("shared", SHARED, (60, 61), submit_ns=12)
    d.add("combine", COMBINE, (61, 63), submit_ns=12)
    d.add("head", HEAD, (63, 70), submit_ns=12)
    return d


def preempted() -> Draft:
    """A prefetch of four chunks of 10 ns gives way at its second border, and goes on."""
    d = Draft()
    d.rules |= {"chunk_bytes": EXPERT_BYTES // 4, "initial": (Contents(0, 0, 0, WHOLE, 0),)}
    d.rules |= {"slot_bytes": np.full(3, EXPERT_BYTES), "budget_bytes": 3 * EXPERT_BYTES}
    d.add("attention", ATTENTION, (0, 10))
    d.add("gate", GATE, (10, 12), after=["attention"])
    background = {"queue": H2D_BACKGROUND, "expert": 0}
    d.add("prefetch", COPY_IN, (0, 20), (50, 70), slot=2, **background)
    d.add("idle", COPY_IN, slot=2, cancel_ns=11, submit_ns=1, **background)
    d.add("copy", COPY_IN, (20, 50), submit_ns=12, expert=1, slot=1)
    d.add("run0", EXPERT_GPU, (12, 20), submit_ns=12, expert=0, slot=0)
    d.add("run1", EXPERT_GPU, (50, 60), submit_ns=12, expert=1, slot=1, after=["copy"])
    d.add("combine", COMBINE, (60, 62), submit_ns=12)
    d.add("head", HEAD, (62, 70), submit_ns=12)
    return d


def promoted() -> Draft:
    """Two prefetches wait; the second is promoted and overtakes the first at a border."""
    d = preempted()
    d.drop("idle", "copy", "run1", "combine", "head")
    late = {"queue": H2D_BACKGROUND, "submit_ns": 12}
    d.add("behind", COPY_IN, (70, 80), expert=0, slot=2, after=["prefetch"], **late)
    d.add("copy", COPY_IN, (20, 50), expert=1, slot=1, promote_ns=13, **late)
    d.add("run1", EXPERT_GPU, (50, 60), submit_ns=12, expert=1, slot=1, after=["copy"])
    d.add("combine", COMBINE, (60, 62), submit_ns=12)
    d.add("head", HEAD, (62, 70), submit_ns=12)
    return d


def two_pieces() -> Draft:
    """Of expert 1 the first 410/1024 are resident; they run while the rest is copied."""
    d = Draft()
    d.rules["initial"] = (Contents(0, 0, 0, WHOLE, 0), Contents(0, 1, 1, 410, 0))
    d.add("attention", ATTENTION, (0, 10))
    d.add("gate", GATE, (10, 12), after=["attention"])
    rest = {"context": 410, "part": 614}
    d.add("copy", COPY_IN, (12, 36), submit_ns=12, expert=1, slot=1, amount=614, **rest)
    d.add("top", EXPERT_GPU, (12, 16), submit_ns=12, expert=1, slot=1, part=410)
    d.add("run0", EXPERT_GPU, (16, 24), submit_ns=12, expert=0, slot=0)
    d.add("rest", EXPERT_GPU, (36, 42), submit_ns=12, expert=1, slot=1, after=["copy"], **rest)
    d.add("combine", COMBINE, (42, 44), submit_ns=12)
    d.add("head", HEAD, (44, 50), submit_ns=12)
    return d


def on_the_cpu(rates: bool = False) -> Draft:
    """Expert 1 runs on the CPU, in the first of two layers for the second; all others are resident.

    With rates, the GPU slows the CPU down to 1/4: of 8 ns of work, 2 are done until it is idle.
    """
    d = Draft(loads=[[[2, 2], [2, 0]]])
    d.rules["initial"] = (Contents(0, 0, 0, WHOLE, 0), Contents(1, 0, 1, WHOLE, 0))
    if rates:
        d.rules["rates"] = FULL.copy()
        d.rules["rates"][0b00011] = [1024, 256, 0, 0, 0]
    d.add("attention", ATTENTION, (0, 10))
    d.add("gate", GATE, (10, 12), after=["attention"])
    d.add("send", SEND, (12, 15), submit_ns=12, after=["attention"])
    d.add("cpu1", EXPERT_CPU, (15, 29 if rates else 23), submit_ns=12, expert=1, after=["send"])
    d.change("cpu1", context=1, duration_ns=8)
    d.add("return", RETURN, (29, 32) if rates else (23, 26), submit_ns=12, after=["cpu1"])
    d.change("return", context=1)
    d.add("run0", EXPERT_GPU, (12, 18), submit_ns=12, expert=0, slot=0)
    d.add("combine", COMBINE, (18, 19), submit_ns=12, after=["run0"])
    d.add("attention1", ATTENTION, (19, 20), submit_ns=12, layer=1, after=["combine"])
    d.add("gate1", GATE, (20, 21), submit_ns=12, layer=1)
    d.add("run2", EXPERT_GPU, (21, 23), submit_ns=21, layer=1, expert=0, slot=1)
    end = 32 if rates else 26
    d.add("combine1", COMBINE, (end, end + 1), submit_ns=21, layer=1, after=["return"])
    d.add("head", HEAD, (end + 1, end + 1), submit_ns=21)
    return d


def interference() -> Draft:
    """The same while the GPU slows the CPU down: 2 ns of 8 are done in (15, 23), 6 in (23, 29)."""
    return on_the_cpu(rates=True)


def offloaded() -> Draft:
    """Two steps with keys, values and attention weights on the host, and an expert on disk."""
    d = Draft(loads=[[[2, 0]], [[2, 0]]], slots=1)
    d.rules |= {"kv_on_host": True, "dense_on_host": True, "on_disk": np.array([[1, 0]])}
    for step, begin in enumerate((0, 100)):
        s = {"step": step, "submit_ns": begin}
        d.add(f"dense{step}", DENSE_IN, (begin, begin + 5), **s)
        d.add(f"kv_in{step}", KV_IN, (begin + 5, begin + 5 + 3 * step), amount=step, **s)
        waits = [f"dense{step}", f"kv_in{step}"]
        t = begin + 3 * step
        d.add(f"attention{step}", ATTENTION, (t + 5, t + 10), after=waits, **s)
        d.add(f"kv_out{step}", KV_OUT, (t + 10, t + 14), after=[f"attention{step}"], **s)
        d.add(f"gate{step}", GATE, (t + 10, t + 12), **s)
        s["submit_ns"] = t + 12
        d.add(f"read{step}", DISK_READ, (t + 12, t + 30), expert=0, **s)
        reads = [f"read{step}"]
        d.add(f"copy{step}", COPY_IN, (t + 30, t + 40), expert=0, slot=0, after=reads, **s)
        run = {"expert": 0, "slot": 0, "after": [f"copy{step}"]}
        d.add(f"run{step}", EXPERT_GPU, (t + 40, t + 45), **run, **s)
        d.add(f"combine{step}", COMBINE, (t + 45, t + 46), **s)
        d.add(f"head{step}", HEAD, (t + 46, t + 50), **s)
    return d


def three_batches() -> Draft:
    """Keys and values of three batches pass through two buffers."""
    d = Draft(loads=[[[[2], [2], [2]]]] * 2)
    d.rules |= {"kv_on_host": True, "initial": (Contents(0, 0, 0, WHOLE, 0),)}
    for step, t in enumerate((0, 100)):
        s = {"step": step, "submit_ns": t}
        begin = t + 3 * step
        for batch in range(3):
            name, end, b = f"{step}_{batch}", begin + 5 * (batch + 1), {"batch": batch}
            if step:
                filled = max(t + 3 * batch, end - 10 if batch == 2 else 0)
                frees = [f"attention{step}_{batch - 2}"] if batch == 2 else []
                d.add(f"kv_in{name}", KV_IN, (filled, filled + 3), amount=1, after=frees, **s, **b)
            waits = [f"kv_in{name}"] if step else []
            d.add(f"attention{name}", ATTENTION, (end - 5, end), after=waits, **s, **b)
            waits = [f"attention{name}"]
            d.add(f"kv_out{name}", KV_OUT, (end, end + 3), after=waits, **s, **b)
        for batch in range(3):
            d.add(f"gate{step}_{batch}", GATE, (begin + 15, begin + 15), batch=batch, **s)
        s["submit_ns"] = begin + 15
        d.add(f"run{step}", EXPERT_GPU, (begin + 15, begin + 20), amount=6, expert=0, slot=0, **s)
        d.add(f"combine{step}", COMBINE, (begin + 20, begin + 21), **s)
        d.add(f"head{step}", HEAD, (begin + 21, begin + 22), **s)
    return d


def moved() -> Draft:
    """Expert 1 arrives in slot 1, is moved to slot 2, and slot 1 is used for the next guess."""
    d = Draft(slots=3)
    d.rules["initial"] = (Contents(0, 0, 0, WHOLE, 0),)
    d.add("copy", COPY_IN, (0, 8), expert=1, slot=1, queue=H2D_BACKGROUND)
    d.add("attention", ATTENTION, (0, 10))
    d.add("send", SEND, (10, 11), after=["attention"])
    d.add("guess", PREDICT, (11, 12), queue=CPU, after=["send"])
    d.add("gate", GATE, (10, 12), after=["attention"])
    d.add("run0", EXPERT_GPU, (12, 20), submit_ns=12, expert=0, slot=0)
    d.add("move", MOVE, (20, 21), submit_ns=12, expert=1, slot=2, after=["copy"])
    d.add("run1", EXPERT_GPU, (21, 30), submit_ns=12, expert=1, slot=2)
    d.add("next", COPY_IN, (21, 29), submit_ns=12, expert=0, slot=1, after=["move"])
    d.change("next", queue=H2D_BACKGROUND)
    d.add("combine", COMBINE, (30, 31), submit_ns=12)
    d.add("head", HEAD, (31, 32), submit_ns=12)
    return d


def divided() -> Draft:
    """After step 0 the memory of slot 1 becomes slot 2, into which expert 1 is copied again."""
    d = Draft(loads=[[[2, 0]], [[0, 2]]], slots=2)
    d.rules["slot_bytes"] = np.array([EXPERT_BYTES, EXPERT_BYTES, 0])
    d.rules["initial"] = (Contents(0, 0, 0, WHOLE, 0), Contents(0, 1, 1, WHOLE, 0))
    for step, begin in ((0, 0), (1, 30)):
        s: dict[str, Any] = {"step": step, "submit_ns": begin}
        if step == 1:
            d.add("shrink", RESIZE, (30, 30), slot=1, amount=0, **s)
            d.add("grow", RESIZE, (30, 30), slot=2, amount=EXPERT_BYTES, **s)
            d.add("copy", COPY_IN, (30, 38), expert=1, slot=2, after=["grow"], **s)
        d.add(f"attention{step}", ATTENTION, (begin, begin + 10), **s)
        d.add(f"gate{step}", GATE, (begin + 10, begin + 12), after=[f"attention{step}"], **s)
        s["submit_ns"] = begin + 12
        slot, after = (2, ["copy"]) if step else (0, [])
        run = (begin + 12, begin + 22)
        d.add(f"run{step}", EXPERT_GPU, run, expert=step, slot=slot, after=after, **s)
        d.add(f"combine{step}", COMBINE, (begin + 22, begin + 24), **s)
        d.add(f"head{step}", HEAD, (begin + 24, begin + 30), **s)
    return d


DRAFTS = [one_miss, preempted, promoted, two_pieces, on_the_cpu, interference, offloaded, moved]
DRAFTS += [three_batches, divided]


@pytest.mark.parametrize("draft", DRAFTS)
@pytest.mark.parametrize("exact", [True, False])
def test_a_correct_log_passes(draft: Callable[[], Draft], exact: bool) -> None:
    d = draft()
    d.rules["exact"] = exact
    audit(d.log())


def broken(draft: Callable[[], Draft], law: str, edit: Callable[[Draft], Any]) -> Any:
    """Return a test case: after the edit, the audit names the law."""
    return pytest.param(draft, law, edit, id=f"{draft.__name__}-{law}")


def repeat(name: str, start_ns: int, end_ns: int, **fields: Any) -> Callable[[Draft], Any]:
    """Return an edit that submits an operation a second time, after all others."""

    def edit(d: Draft) -> None:
        last_ns = max(row.get("submit_ns", 0) for row in d.rows.values())
        d.rows["again"] = d.rows[name] | {"submit_ns": last_ns} | fields
        d.lax().run("again", (start_ns, end_ns))

    return edit


def finish_at(d: Draft, copied_ns: int) -> Draft:
    """Let what follows the demand copy of `preempted` begin later."""
    d.run("run1", (copied_ns, copied_ns + 10))
    d.run("combine", (copied_ns + 10, copied_ns + 12))
    return d.run("head", (copied_ns + 12, copied_ns + 20))


def cancel_late(d: Draft) -> Draft:
    """Let the lane be idle before a copy is cancelled that could have run."""
    d.add("never", COPY_IN, submit_ns=12, cancel_ns=90, queue=H2D_BACKGROUND, expert=0, slot=2)
    return d


def outgrown(d: Draft) -> Draft:
    """Let a copy into slot 1 be under way when that slot is given up."""
    rows = {"early": {**d.rows["copy"], "step": 0, "submit_ns": 12, "slot": 1}}
    at = list(d.rows).index("shrink")
    d.rows = dict([*list(d.rows.items())[:at], *rows.items(), *list(d.rows.items())[at:]])
    return d.lax().run("early", (12, 35)).run("copy", (35, 38))


def keep_in_one_layer(d: Draft) -> Draft:
    """Leave only the layer that defers a result."""
    d.lax().drop("attention1", "gate1", "run2", "combine1")
    return d.rule(loads=np.array([[[[2, 2]]]]))


FORM = [
    broken(one_miss, "this should be ticket 3", lambda d: d.change("copy", ticket=4)),
    broken(one_miss, "submit times never decrease", lambda d: d.change("run0", submit_ns=11)),
    broken(one_miss, "not an earlier one", lambda d: d.change("gate", after=["head"])),
    broken(one_miss, "what was not cancelled runs", lambda d: d.run("copy")),
    broken(preempted, "what was cancelled never runs", lambda d: d.run("idle", (70, 80))),
    broken(
        preempted,
        "nothing waits for what was cancelled",
        lambda d: d.change("run0", after=["idle"]),
    ),
    broken(one_miss, "no such kind in queue 5", lambda d: d.change("gate", queue=H2D_BACKGROUND)),
    broken(one_miss, "no such kind in queue 1", lambda d: d.change("run0", queue=CPU)),
    broken(preempted, "a FIFO link has one queue", lambda d: d.rule(fifo_link=True)),
    broken(one_miss, "only a waiting background copy", lambda d: d.change("copy", promote_ns=12)),
    broken(one_miss, "form: step, layer, expert", lambda d: d.change("run0", layer=1)),
    broken(one_miss, "form: step, layer, expert", lambda d: d.change("copy", slot=2)),
]

LANES_AND_QUEUES = [
    broken(one_miss, "one operation at a time", lambda d: d.run("run0", (11, 19))),
    broken(one_miss, "after what it waits for", lambda d: d.run("run1", (51, 60))),
    broken(one_miss, "after its submission, at 12 ns", lambda d: d.run("copy", (11, 51))),
    broken(preempted, "only a background copy is ever", lambda d: d.change("prefetch", queue=H2D)),
    broken(
        one_miss,
        "a queue is served in order",
        lambda d: d.run("shared", (61, 62)).run("combine", (60, 61)),
    ),
    broken(one_miss, "a lane is idle from 63 to 64 ns", lambda d: d.run("head", (64, 71))),
    broken(
        on_the_cpu,
        "a lane is idle from 23 to 24 ns",
        lambda d: d.run("return", (24, 27)).run("combine1", (27, 28)).run("head", (28, 28)),
    ),
    broken(preempted, "a lane is idle", lambda d: d.run("prefetch", (0, 20), (51, 71))),
    broken(preempted, "a lane is idle from 70 to inf ns", cancel_late),
    broken(
        preempted,
        "a background copy starts while an urgent one could",
        lambda d: finish_at(d.run("prefetch", (0, 20), (20, 40)).run("copy", (40, 70)), 70),
    ),
    broken(
        preempted,
        "a chunk border is passed",
        lambda d: finish_at(d.run("prefetch", (0, 30), (60, 70)).run("copy", (30, 60)), 60),
    ),
    broken(
        preempted,
        "preempted at 15 ns, which is no chunk border",
        lambda d: finish_at(d.run("prefetch", (0, 15), (45, 70)).run("copy", (15, 45)), 45),
    ),
    broken(
        preempted,
        "preempted at 60 ns, but by nobody",
        lambda d: d.run("prefetch", (0, 20), (50, 60), (60, 70)),
    ),
    broken(promoted, "it is not queued or preempted", lambda d: d.change("prefetch", promote_ns=9)),
    broken(promoted, "it still waits", lambda d: d.change("behind", promote_ns=60)),
]

WORK = [
    broken(one_miss, "work: too little", lambda d: d.change("run0", duration_ns=9)),
    broken(one_miss, "work: too much", lambda d: d.change("head", duration_ns=6)),
    broken(preempted, "work: too little", lambda d: d.run("prefetch", (0, 20), (50, 69))),
    broken(interference, "work: too much", lambda d: d.rule(rates=FULL)),
    broken(interference, "work: too little", lambda d: d.change("cpu1", duration_ns=10)),
]

WEIGHTS = [
    broken(
        divided,
        "weights: slots of 3072 bytes, a budget of 2048",
        lambda d: d.change("shrink", amount=EXPERT_BYTES),
    ),
    broken(divided, "weights: slots of 2049 bytes", lambda d: d.change("grow", amount=1025)),
    broken(divided, "a slot of 1023 bytes cannot hold", lambda d: d.change("grow", amount=1023)),
    broken(divided, "form: step, layer, expert", lambda d: d.change("grow", slot=3)),
    broken(
        divided,
        "a slot is resized after its last use",
        outgrown,
    ),
    broken(
        divided,
        "reused after its last use",
        lambda d: d.lax().run("grow", (31, 31)).run("attention1", (31, 40)),
    ),
    broken(
        moved,
        "reused after its last use",
        lambda d: d.lax().change("next", slot=2).run("next", (28, 36)),
    ),
    broken(moved, "no slot holds what is moved", lambda d: d.lax().run("copy", (13, 21))),
    broken(moved, "no slot holds what is moved", lambda d: d.change("copy", precision=1)),
    broken(
        moved,
        "no slot holds what is moved, all the time",
        lambda d: d.lax().run("next", (20, 28)),
    ),
    broken(one_miss, "does not hold parts (0, 1024)", lambda d: d.change("run1", precision=1)),
    broken(one_miss, "does not hold parts", lambda d: d.change("run1", slot=0)),
    broken(one_miss, "does not hold parts", lambda d: d.lax().drop("copy")),
    broken(one_miss, "does not hold parts", lambda d: d.rule(initial=())),
    broken(two_pieces, "does not hold parts", lambda d: d.lax().change("copy", context=400)),
    broken(
        one_miss,
        "a run starts after its weights have arrived",
        lambda d: d.lax().run("copy", (13, 53)),
    ),
    broken(one_miss, "a budget of 2047", lambda d: d.rule(budget_bytes=2047)),
    broken(two_pieces, "cannot hold 1024", lambda d: d.rule(slot_bytes=np.array([1024, 1023]))),
    broken(one_miss, "begins with more than", lambda d: d.rule(slot_bytes=np.array([1023, 1024]))),
    broken(one_miss, "1000 bytes are copied of 1024", lambda d: d.change("copy", amount=1000)),
    broken(offloaded, "is read anew", lambda d: d.lax().drop("read0")),
    broken(offloaded, "is read anew", lambda d: d.lax().drop("read1")),
    broken(
        offloaded,
        "is read anew",
        lambda d: d.lax().run("read1", (118, 136)),
    ),
]

COMPLETENESS = [
    broken(one_miss, "layer 0 has 0 combine", lambda d: d.lax().drop("combine")),
    broken(one_miss, "has 0 head, not one", lambda d: d.drop("head")),
    broken(one_miss, "HEAD starts after", lambda d: d.lax().swap("combine", "head")),
    broken(one_miss, "not one ATTENTION and one GATE", lambda d: d.lax().drop("gate")),
    broken(one_miss, "not one ATTENTION and one GATE", repeat("attention", 70, 71)),
    broken(one_miss, "ATTENTION over 1 tokens of 2", lambda d: d.change("attention", amount=1)),
    broken(one_miss, "expert 1 has tokens", lambda d: d.lax().drop("run1")),
    broken(one_miss, "runs part 0 not exactly once", repeat("run1", 70, 71)),
    broken(two_pieces, "expert 1 has tokens", lambda d: d.lax().drop("rest")),
    broken(two_pieces, "runs part 0 not exactly once", lambda d: d.lax().drop("top")),
    broken(two_pieces, "runs part 410 not exactly once", repeat("rest", 70, 71)),
    broken(one_miss, "a run over 1 tokens of 2", lambda d: d.change("run1", amount=1)),
    broken(offloaded, "a run over 2 tokens of 0", lambda d: d.rule(loads=np.zeros((2, 1, 1, 2)))),
    broken(one_miss, "a run starts after its GATEs", lambda d: d.lax().swap("gate", "run0")),
    broken(on_the_cpu, "once, on one device", repeat("cpu1", 70, 71)),
    broken(on_the_cpu, "1 operations on the CPU and 0 SENDs", lambda d: d.lax().drop("send")),
    broken(
        on_the_cpu,
        "the CPU starts after SEND",
        lambda d: d.lax().run("send", (16, 19)),
    ),
    broken(
        on_the_cpu,
        "SEND starts after the ATTENTIONs",
        lambda d: d.lax().change("send", submit_ns=0).run("send", (9, 12)),
    ),
    broken(on_the_cpu, "0 RETURNs of 1 CPU results", lambda d: d.lax().drop("return")),
    broken(
        on_the_cpu,
        "COMBINE starts after RETURN",
        lambda d: d.lax().run("return", (24, 27)),
    ),
    broken(
        on_the_cpu,
        "RETURN starts after its results",
        lambda d: d.lax().run("return", (22, 25)),
    ),
    broken(
        on_the_cpu,
        "COMBINE starts after RETURN",  # a result that is not deferred belongs to its own layer
        lambda d: d.change("cpu1", context=0).change("return", context=0),
    ),
    broken(on_the_cpu, "the last layer defers nothing", keep_in_one_layer),
    broken(on_the_cpu, "a layer starts after", lambda d: d.lax().swap("combine", "attention1")),
    broken(one_miss, "SHARED runs at most once", repeat("shared", 70, 71)),
    broken(
        two_pieces,
        "COMBINE starts after all runs",
        repeat("gate", 70, 70, kind=SHARED, batch=-1),
    ),
    broken(offloaded, "a layer starts after", lambda d: d.lax().swap("head0", "attention1")),
]

OFFLOAD = [
    broken(offloaded, "keys and values are on the GPU", lambda d: d.rule(kv_on_host=False)),
    broken(one_miss, "0 KV_OUT of an ATTENTION", lambda d: d.rule(kv_on_host=True)),
    broken(offloaded, "0 KV_IN of an ATTENTION", lambda d: d.lax().drop("kv_in1")),
    broken(three_batches, "0 KV_IN of an ATTENTION", lambda d: d.lax().drop("kv_in1_2")),
    broken(offloaded, "2 KV_OUT of an ATTENTION", repeat("kv_out1", 150, 154)),
    broken(offloaded, "belong to an ATTENTION", repeat("kv_out1", 150, 154, batch=-1)),
    broken(offloaded, "no keys and values to copy in", lambda d: d.change("kv_in0", amount=1)),
    broken(offloaded, "after its KV_IN", lambda d: d.lax().run("kv_in1", (106, 109))),
    broken(offloaded, "after its ATTENTION", lambda d: d.lax().run("kv_out0", (9, 13))),
    broken(offloaded, "the KV_OUT of the step", lambda d: d.lax().run("kv_out0", (103, 107))),
    broken(three_batches, "with two buffers", lambda d: d.lax().run("kv_in1_2", (106, 109))),
    broken(offloaded, "step 1, layer 0 has 0 DENSE_IN", lambda d: d.lax().drop("dense1")),
    broken(offloaded, "has 1 DENSE_IN", lambda d: d.rule(dense_on_host=False)),
    broken(
        offloaded,
        "ATTENTION starts after DENSE_IN",
        lambda d: d.lax().run("dense0", (2, 7)).run("kv_in0", (7, 7)),
    ),
]


@pytest.mark.parametrize(
    ("draft", "law", "edit"),
    [*FORM, *LANES_AND_QUEUES, *WORK, *WEIGHTS, *COMPLETENESS, *OFFLOAD],
)
def test_a_broken_law_is_named(
    draft: Callable[[], Draft], law: str, edit: Callable[[Draft], Any]
) -> None:
    d = draft()
    edit(d)
    with pytest.raises(AuditError) as error:
        audit(d.log())
    assert law in str(error.value)
    assert "\n" not in str(error.value)
