"""Assignment rules: which device computes each active expert of a layer step.

All work on the same arrays: for each active expert its time on the CPU, and its cost on the GPU,
which contains the copy of weights that are not there; `hss` keeps the two apart. They set
`on_gpu[expert]` to 1 or 0.
"""

import numpy as np

from moesim.policies.api import View, arriving_ns
from moesim.policies.parts.order import IDS, sort_by
from moesim.types import NONE, WHOLE, IntArray

EXACT_STATES = 1 << 16
"""`exact` is exact as long as so many different sums, none better than another, are enough."""


def all_on(active: IntArray, n_active: int, on_gpu: IntArray, gpu: int) -> None:
    """Put every active expert on one device."""
    for i in range(n_active):
        on_gpu[active[i]] = gpu


def threshold(
    active: IntArray, n_active: int, cpu_ns: IntArray, gpu_ns: IntArray, on_gpu: IntArray
) -> None:
    """Take the cheaper device for each expert alone; equal costs go to the GPU.

    What the DALI paper calls a static workload threshold; per expert as in Fiddler
    (arXiv 2402.07033).
    """
    for i in range(n_active):
        expert = active[i]
        on_gpu[expert] = 1 if gpu_ns[expert] <= cpu_ns[expert] else 0


def greedy(
    active: IntArray, n_active: int, cpu_ns: IntArray, gpu_ns: IntArray, on_gpu: IntArray
) -> tuple[int, int]:
    """Give each expert, largest difference of costs first, to the device done with it first.

    DALI, arXiv 2602.03495, Algorithm 1: equal ends go to the GPU; equal differences are visited by
    ascending id. Returns the summed times of GPU and CPU.
    """
    visit = active[:n_active].copy()
    for i in range(n_active):  # until it is decided, on_gpu holds what to sort by
        on_gpu[visit[i]] = abs(gpu_ns[visit[i]] - cpu_ns[visit[i]])
    sort_by(visit, n_active, n_active, on_gpu, -1)
    gpu_end = 0
    cpu_end = 0
    for i in range(n_active):
        expert = visit[i]
        if gpu_end + gpu_ns[expert] <= cpu_end + cpu_ns[expert]:
            on_gpu[expert] = 1
            gpu_end += gpu_ns[expert]
        else:
            on_gpu[expert] = 0
            cpu_end += cpu_ns[expert]
    return gpu_end, cpu_end


def exact(  # noqa: PLR0912  a merge and a search, which share their arrays
    active: IntArray, n_active: int, cpu_ns: IntArray, gpu_ns: IntArray, on_gpu: IntArray
) -> int:
    """Minimise the later of both devices' ends (DALI's problem, Eq. 3-9) and return it.

    Goes through the experts and keeps every pair of sums (CPU, GPU) that no other pair beats in
    both, at most `EXACT_STATES` of them: beyond, those with the smallest later end so far. Pairs
    are in order of rising CPU and falling GPU sums, so that adding an expert merges two such lists.
    """
    room = 1
    for _ in range(n_active):
        room = min(2 * room, 2 * EXACT_STATES)
    cpu = np.zeros(room, np.int64)
    gpu = np.zeros(room, np.int64)
    new_cpu = np.zeros(room, np.int64)
    new_gpu = np.zeros(room, np.int64)
    origins = np.zeros((n_active, room), np.int64)
    states = 1
    for i in range(n_active):
        expert = active[i]
        origin = origins[i]
        found = 0
        on = 0
        off = 0
        while on < states or off < states:
            # The next pair has the smaller CPU sum, or of equals the smaller GPU sum.
            take_on = off == states
            if on < states and off < states:
                ahead = cpu[on] - cpu[off] - cpu_ns[expert]
                take_on = ahead < 0 or (ahead == 0 and gpu[on] + gpu_ns[expert] <= gpu[off])
            cpu_end = cpu[on] if take_on else cpu[off] + cpu_ns[expert]
            gpu_end = gpu[on] + gpu_ns[expert] if take_on else gpu[off]
            if found == 0 or gpu_end < new_gpu[found - 1]:
                new_cpu[found] = cpu_end
                new_gpu[found] = gpu_end
                origin[found] = on if take_on else -1 - off
                found += 1
            if take_on:
                on += 1
            else:
                off += 1
        # The later end falls, then rises: the largest are at the two ends.
        first = 0
        while found - first > EXACT_STATES:
            if new_gpu[first] >= new_cpu[found - 1]:
                first += 1
            else:
                found -= 1
        states = found - first
        for at in range(states):
            cpu[at] = new_cpu[first + at]
            gpu[at] = new_gpu[first + at]
            origin[at] = origin[first + at]
    best = 0
    for at in range(1, states):
        if max(cpu[at], gpu[at]) < max(cpu[best], gpu[best]):
            best = at
    end: int = max(cpu[best], gpu[best])
    for i in range(n_active - 1, -1, -1):
        origin_of_best = origins[i, best]
        on_gpu[active[i]] = 1 if origin_of_best >= 0 else 0
        best = origin_of_best if origin_of_best >= 0 else -1 - origin_of_best
    return end


def apart(view: View, cpu_ns: IntArray, gpu_ns: IntArray, arrival_ns: IntArray) -> None:
    """Fill in each active expert's computation on either device, and when its weights arrive.

    0: they are there; NONE: nobody has asked for them.
    """
    for i in range(view.n_active):
        expert = view.active[i]
        cpu_ns[expert] = view.cpu_ns[expert]
        gpu_ns[expert] = view.gpu_ns[expert]
        arrival_ns[expert] = NONE
        if view.cached[view.layer, expert] == WHOLE or view.staged[view.layer, expert] == WHOLE:
            arrival_ns[expert] = arriving_ns(view, view.layer, expert)


def line_up(
    active: IntArray, n_active: int, loads: IntArray, arrival_ns: IntArray, key: IntArray,
    queue: IntArray,
) -> None:  # fmt: skip
    """List active experts for `hss`: those whose weights are there, are coming, then the others.

    Each by falling load, equal loads in the order of `active`. `key` (experts,) is scratch space.
    """
    for i in range(n_active):
        expert = active[i]
        queue[i] = expert
        key[expert] = loads[expert] * IDS + n_active - i
        if arrival_ns[expert] != NONE:
            key[expert] += 1 << (42 if arrival_ns[expert] > 0 else 43)
    sort_by(queue, n_active, n_active, key, -1)


def hss(
    queue: IntArray, n_active: int, cpu_ns: IntArray, gpu_ns: IntArray, arrival_ns: IntArray,
    copy_ns: int, link_ns: int, first_cpu_ns: int, on_gpu: IntArray,
) -> tuple[int, int]:  # fmt: skip
    """Let the GPU take experts from the front of a queue and the CPU from its back.

    HybriMoE's released code (`PKU-SEC-Lab/HybriMoE`, `operators/experts.py`, HSS): whoever would be
    done first with its next expert takes it, the GPU if both would. `queue` is that of `line_up`;
    the GPU waits for weights, which are copied in `copy_ns` each, one after the other, from
    `link_ns` on; the first expert on the CPU takes `first_cpu_ns` more. Returns when GPU and CPU
    are done.
    """
    gpu_end = 0
    cpu_end = 0
    front = 0
    back = n_active - 1
    while front <= back:
        expert = queue[front]
        arrival = arrival_ns[expert]
        if arrival == NONE:
            arrival = link_ns + copy_ns
        gpu_next = max(gpu_end, arrival) + gpu_ns[expert]
        other = queue[back]
        cpu_next = cpu_end + cpu_ns[other]
        if back == n_active - 1:
            cpu_next += first_cpu_ns
        if gpu_next <= cpu_next:
            gpu_end = gpu_next
            if arrival_ns[expert] == NONE:
                link_ns += copy_ns
            on_gpu[expert] = 1
            front += 1
        else:
            cpu_end = cpu_next
            on_gpu[other] = 0
            back -= 1
    return gpu_end, cpu_end
