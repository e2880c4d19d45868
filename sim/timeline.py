"""A run as a Chrome trace in the words of PyTorch's profiler, for Perfetto and trace tools."""

import gzip
import json
from pathlib import Path
from typing import Any

from moesim.errors import InputError
from moesim.log import Log
from moesim.sim.replay import Replayed
from moesim.types import (
    CAUSES,
    COMBINE,
    D2H,
    DISK,
    GPU,
    H2D,
    HEAD,
    KINDS,
    LANE_OF_QUEUE,
    PHASES,
)

DEVICE, HOST = 0, 1
"""Process ids: the GPU, and everything of the host."""
THREADS = {GPU: (DEVICE, 7), H2D: (DEVICE, 20), D2H: (DEVICE, 21), DISK: (HOST, 3)}
CPU_THREAD = (HOST, 2)
HOST_THREAD = (HOST, 1)
PAUSE_THREAD = (HOST, 4)
"""A pause may reach over the end of a layer, so it cannot share a thread with the spans."""
NAMES = {
    (DEVICE, 7): "stream 7 (gpu)",
    (DEVICE, 20): "stream 20 (h2d)",
    (DEVICE, 21): "stream 21 (d2h)",
    HOST_THREAD: "steps and layers",
    PAUSE_THREAD: "host program",
    CPU_THREAD: "cpu experts",
    (HOST, 3): "disk",
}
COPIES = {H2D: "Memcpy HtoD (Pinned -> Device)", D2H: "Memcpy DtoH (Device -> Pinned)"}


def microseconds(ns: int) -> float:
    """Return ns as microseconds, which three decimals hold exactly up to 2**43 ns."""
    return int(ns) / 1000


def timeline(run: Replayed) -> dict[str, Any]:
    """Return the Chrome trace of a run that was recorded."""
    log = run.log
    if log is None:
        raise InputError("a timeline needs a recorded run: replay(..., record=True)")
    gpu = run.prepared.profile.gpu
    events = [
        {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "ts": 0, "args": {"name": name}}
        for pid, name in ((DEVICE, f"GPU 0 ({gpu.name})"), (HOST, "host (simulated)"))
    ]
    events += [
        {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "ts": 0, "args": {"name": name}}
        for (pid, tid), name in NAMES.items()
    ]
    return {
        "schemaVersion": 1,
        "displayTimeUnit": "ms",
        "baseTimeNanoseconds": 0,
        "deviceProperties": [{"id": DEVICE, "name": gpu.name, "totalGlobalMem": gpu.memory_bytes}],
        "traceEvents": events + operations(log) + spans(run, log),
    }


def complete(
    cat: str, name: str, thread: tuple[int, int], start: int, end: int, args: dict[str, Any]
) -> dict[str, Any]:
    """Return one event with a beginning and a duration."""
    pid, tid = thread
    ts, dur = microseconds(start), microseconds(end - start)
    return {
        "ph": "X", "cat": cat, "name": name, "pid": pid, "tid": tid, "ts": ts, "dur": dur,
        "args": args,
    }  # fmt: skip


def operations(log: Log) -> list[dict[str, Any]]:
    """Return an event for each stretch in which a lane worked on an operation."""
    events = []
    rows = log.operations
    moved = bytes_of(log)
    for row, (ticket, start, end, _) in enumerate(log.segments.tolist()):
        if ticket == 0:
            events.append(complete("cpu_op", "moesim::pause", PAUSE_THREAD, start, end, {}))
            continue
        op = rows[ticket - 1]
        lane = LANE_OF_QUEUE[op["queue"]]
        kind = KINDS[op["kind"]]
        args: dict[str, Any] = {"step": int(op["step"])}
        args |= {key: int(op[key]) for key in ("layer", "expert", "batch") if op[key] >= 0}
        thread = THREADS.get(lane, CPU_THREAD)
        if thread[0] == DEVICE:
            args |= {"device": DEVICE, "stream": thread[1], "correlation": ticket}
        if lane in COPIES:
            args |= {"bytes": moved[row], "cause": CAUSES[op["cause"]] or kind}
            events.append(complete("gpu_memcpy", COPIES[lane], thread, start, end, args))
        elif lane == GPU:
            args["tokens"] = int(op["amount"])
            events.append(complete("kernel", f"moesim::{kind}", thread, start, end, args))
        else:
            args |= {"bytes": moved[row]} if lane == DISK else {"tokens": int(op["amount"])}
            events.append(complete("cpu_op", f"moesim::{kind}", thread, start, end, args))
    return events


def bytes_of(log: Log) -> list[int]:
    """Return the bytes of each segment: a preempted copy's are split by time, and sum exactly."""
    amounts = log.operations["amount"].tolist()
    spent = [0] * (len(amounts) + 1)
    for ticket, start, end, _ in log.segments.tolist():
        spent[ticket] += end - start
    run = [0] * len(spent)
    given = [0] * len(spent)
    moved = []
    for ticket, start, end, done in log.segments.tolist():
        run[ticket] += end - start
        if ticket == 0:
            part = 0
        elif done:
            part = amounts[ticket - 1] - given[ticket]
        else:
            part = amounts[ticket - 1] * run[ticket] // spent[ticket] - given[ticket]
        given[ticket] += part
        moved.append(part)
    return moved


def spans(run: Replayed, log: Log) -> list[dict[str, Any]]:
    """Return an event for each step and each of its layers."""
    phases = [PHASES[phase] for phase in run.prepared.feed.steps.phase]
    ends = {
        (int(op["step"]), int(op["layer"])): int(end)
        for ticket, _, end, done in log.segments.tolist()
        if ticket and done and (op := log.operations[ticket - 1])["kind"] in (COMBINE, HEAD)
    }
    events = []
    begin = 0
    for step, phase in enumerate(phases):
        args = {"step": step, "phase": phase}
        head = ends[step, -1]
        name = f"step {step} {phase}"
        events.append(complete("user_annotation", name, HOST_THREAD, begin, head, args))
        for layer in range(run.prepared.setting.layers):
            end = ends[step, layer]
            span = complete(
                "user_annotation",
                f"layer {layer}",
                HOST_THREAD,
                begin,
                end,
                args | {"layer": layer},
            )
            events.append(span)
            begin = end
        begin = head
    return events


def write_timeline(run: Replayed, path: Path) -> None:
    """Write the Chrome trace of a recorded run, compressed if the name ends in .gz."""
    write_trace(timeline(run), path)


def write_trace(trace: dict[str, Any], path: Path) -> None:
    """Write a Chrome trace, compressed if the name ends in .gz."""
    text = json.dumps(trace, separators=(",", ":"))
    data = text.encode()
    unfinished = path.with_name(path.name + ".part")
    unfinished.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    unfinished.replace(path)
