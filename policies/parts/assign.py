"""Assignment rules: which device computes each active expert of a layer step.

All work on the same arrays: for each active expert its time on the CPU, and its cost on the GPU,
which contains the copy of weights that are not there. They set `on_gpu[expert]` to 1 or 0.
"""

import numpy as np

from moesim.types import IntArray

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
    chosen = np.sort(active[:n_active])
    visit = np.argsort(-np.abs(gpu_ns[chosen] - cpu_ns[chosen]), kind="mergesort")
    gpu_end = 0
    cpu_end = 0
    for i in range(n_active):
        expert = chosen[visit[i]]
        if gpu_end + gpu_ns[expert] <= cpu_end + cpu_ns[expert]:
            on_gpu[expert] = 1
            gpu_end += gpu_ns[expert]
        else:
            on_gpu[expert] = 0
            cpu_end += cpu_ns[expert]
    return gpu_end, cpu_end


def exact(
    active: IntArray, n_active: int, cpu_ns: IntArray, gpu_ns: IntArray, on_gpu: IntArray
) -> int:
    """Minimise the later of both devices' ends (DALI's problem, Eq. 3-9) and return it.

    Goes through the experts and keeps every pair of sums (CPU, GPU) that no other pair beats in
    both, at most `EXACT_STATES` of them: beyond, those with the smallest later end so far.
    """
    cpu = np.zeros(1, np.int64)
    gpu = np.zeros(1, np.int64)
    came_from: list[IntArray] = []
    for i in range(n_active):
        expert = active[i]
        states = len(cpu)
        cpu = np.concatenate((cpu, cpu + cpu_ns[expert]))
        gpu = np.concatenate((gpu + gpu_ns[expert], gpu))
        by_gpu = np.argsort(gpu, kind="mergesort")
        by_cpu = by_gpu[np.argsort(cpu[by_gpu], kind="mergesort")]
        keep = np.zeros(len(by_cpu), np.bool_)
        smallest = gpu[by_cpu[0]] + 1
        for at in range(len(by_cpu)):
            if gpu[by_cpu[at]] < smallest:
                smallest = gpu[by_cpu[at]]
                keep[at] = True
        kept = by_cpu[keep]
        if len(kept) > EXACT_STATES:
            later = np.maximum(cpu[kept], gpu[kept])
            kept = kept[np.argsort(later, kind="mergesort")[:EXACT_STATES]]
        came_from.append(np.where(kept < states, kept, -1 - (kept - states)))
        cpu, gpu = cpu[kept], gpu[kept]
    best = int(np.argmin(np.maximum(cpu, gpu)))
    end = int(max(cpu[best], gpu[best]))
    for i in range(n_active - 1, -1, -1):
        origin = int(came_from[i][best])
        on_gpu[active[i]] = 1 if origin >= 0 else 0
        best = origin if origin >= 0 else -1 - origin
    return end
