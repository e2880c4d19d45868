"""What the lanes of a recorded run did in some layers of one step."""

from typing import NamedTuple

from moesim.errors import InputError
from moesim.sim.replay import Replayed
from moesim.sim.timeline import spans
from moesim.types import CAUSES, COPY_IN, DECODE, DISK, KINDS, LANE_OF_QUEUE, LANES

HOST = "host"
"""The lane of the host program, which is busy in its pauses."""


class Stretch(NamedTuple):
    """What a lane did in one go."""

    lane: str
    kind: str
    """Of the operation, or the cause of a copy."""
    begin_ns: int
    end_ns: int
    layer: int
    expert: int


class Window(NamedTuple):
    """The part of a run that is drawn."""

    step: int
    begin_ns: int
    end_ns: int
    layers: dict[int, tuple[int, int]]
    """Begin and end of each MoE layer in ns."""
    work: list[Stretch]


def window_of(
    run: Replayed, step: int | None = None, first_layer: int = 0, layers: int = 4
) -> Window:
    """Return the stretches of some layers of a step; see `lanes` for defaults and errors."""
    if run.log is None:
        raise InputError("a picture of the lanes needs a recorded run: replay(..., record=True)")
    phases = list(run.prepared.feed.steps.phase)
    if step is None:
        decoded = [number for number, phase in enumerate(phases) if phase == DECODE]
        step = decoded[len(decoded) // 2] if decoded else 0
    if not 0 <= step < len(phases):
        raise InputError(f"step {step} is not in 0..{len(phases) - 1}")
    last = run.prepared.setting.layers - 1
    if not 0 <= first_layer <= last or layers < 1:
        raise InputError(
            f"first layer {first_layer}, {layers} layers: the run has layers 0..{last}"
        )
    borders = {}
    for event in spans(run, run.log):
        where = event["args"]
        if where["step"] == step and first_layer <= where.get("layer", -1) < first_layer + layers:
            begin_ns = round(event["ts"] * 1000)
            borders[where["layer"]] = begin_ns, begin_ns + round(event["dur"] * 1000)
    begin_ns, end_ns = borders[first_layer][0], borders[max(borders)][1]
    if max(borders) == last:
        end_ns = run.heads[step].now_ns
    return Window(step, begin_ns, end_ns, borders, stretches(run, begin_ns, end_ns))


def stretches(run: Replayed, begin_ns: int, end_ns: int) -> list[Stretch]:
    """Return what lanes and host did from one time to another, cut off there, of a recorded run."""
    assert run.log is not None
    operations, segments = run.log.operations, run.log.segments
    found = []
    inside = (segments["end_ns"] > begin_ns) & (segments["start_ns"] < end_ns)
    for ticket, start, end, _ in segments[inside].tolist():
        cut = max(start, begin_ns), min(end, end_ns)
        if ticket == 0:
            found.append(Stretch(HOST, "pause", *cut, -1, -1))
            continue
        op = operations[ticket - 1]
        kind = CAUSES[op["cause"]] if op["kind"] == COPY_IN else KINDS[op["kind"]]
        lane = LANES[LANE_OF_QUEUE[op["queue"]]]
        found.append(Stretch(lane, kind, *cut, int(op["layer"]), int(op["expert"])))
    return found


def expert_in_words(stretch: Stretch, window: Window) -> str:
    """Return the expert of a stretch, with its layer if another one was in progress."""
    if stretch.expert < 0:
        return ""
    begin_ns, end_ns = window.layers.get(stretch.layer, (0, 0))
    if begin_ns <= stretch.begin_ns < end_ns:
        return str(stretch.expert)
    return f"{stretch.layer}:{stretch.expert}"


def shown_lanes(window: Window) -> list[str]:
    """Return the lanes that are drawn, the first on top; host and disk only if they are used."""
    used = {stretch.lane for stretch in window.work}
    return [name for name in (HOST, *LANES) if name not in (HOST, LANES[DISK]) or name in used]
