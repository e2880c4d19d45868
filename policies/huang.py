"""Huang, Lin, Lee, arXiv 2512.16473: the CPU computes what a small cache on the GPU misses."""

from typing import Literal, NamedTuple

import numpy as np

from moesim.errors import InputError
from moesim.policies.api import (
    CACHE,
    Placement,
    Plan,
    Setting,
    View,
    arriving_ns,
    evict,
    fetch,
    layer_caches,
    run_on_cpu,
    run_on_gpu,
)
from moesim.policies.parts.cache import Ways, new_ways, way_fill, way_of, way_use, way_victim
from moesim.types import NONE, PREFILL, IntArray

RULES = ("counter", "lru", "fifo")
"""In the order of `parts.cache.COUNTER`, `LRU` and `FIFO`."""


class Huang(NamedTuple):
    """The first layers have a set of ways each; misses run on the CPU and are copied in afterwards.

    Paper and released code: sets are private to their layer, begin empty and belong to the first
    layers; other layers always run on the CPU. Released code (`src/model.py`): an expert on its way
    is a hit, and is waited for; hits run first; a miss is computed by the host, then copied into
    the victim's way behind everything else, for later tokens; a token has a quota of fills; a
    prompt runs on the CPU and leaves the sets alone; the victim may be in use or on its way; the
    "LRU" is a counter (`parts.cache.COUNTER`).

    Inferred: for any number of experts per token, all hits run first, then misses in the order of
    the router. In batches above one, a decode step counts as one token and an expert counts once,
    however many tokens chose it. By default the ways are half of the experts, as in the recommended
    (14, 4) for Mixtral-8x7B, and as many layers have them as the budget holds.

    Deviations: a hit on its way holds up the GPU, and not the host before it computes a miss; the
    copy of a victim that has not begun is taken back, where the code lets it run to no effect.
    """

    covered: int
    """Layers that have a set."""
    rule: int
    quota_max: int
    hit_first: int
    waits: int
    """1: an expert on its way is a hit."""
    protect: int
    ways: Ways
    quota: IntArray
    """(1,): what is left of it in this step."""
    hit: IntArray
    """(experts,): scratch, 1 for the hits of this layer step."""
    held: IntArray
    """(experts,): scratch, 1 for who must not be the victim now."""
    link: str

    @classmethod
    def new(
        cls,
        setting: Setting,
        layers: int = 0,
        ways: int = 0,
        rule: Literal["counter", "lru", "fifo"] = "counter",
        quota: int = 64,
        hit_first: bool = True,
        in_flight: Literal["hit", "miss"] = "hit",
        protect: bool = False,
        link: Literal["priority", "fifo"] = "priority",
    ) -> "Huang":
        """`layers` (the paper's number of indexes) and `ways`: 0 is what the budget holds.

        `quota`: one more than the fills of a token. `hit_first=false`: the older code. An expert
        `in_flight` that is a `miss` runs on the CPU. `protect`: neither the experts of this step
        nor those on their way are victims.
        """
        covered, per_layer = geometry(setting, layers, ways)
        return cls(
            covered=covered,
            rule=RULES.index(rule),
            quota_max=quota,
            hit_first=int(hit_first),
            waits=int(in_flight == "hit"),
            protect=int(protect),
            ways=new_ways(setting.layers, per_layer),
            quota=np.zeros(1, np.int64),
            hit=np.zeros(setting.experts, np.int64),
            held=np.zeros(setting.experts, np.int64),
            link=link,
        )

    def place(self, setting: Setting) -> Placement:
        """Give the first layers their ways; a copy goes straight into its way."""
        slots = np.zeros(setting.layers, np.int64)
        slots[: self.covered] = self.ways.tag.shape[1]
        return layer_caches(
            setting,
            cached=np.zeros((setting.layers, setting.experts), np.int64),
            slots=slots,
            staging_slots=0,
            link=self.link,
            host_computes=True,
        )

    def dispatch(self, view: View, plan: Plan) -> None:
        """Run hits on the GPU and misses on the CPU, each of which then fills a way."""
        if view.layer == 0:
            self.quota[0] = self.quota_max
        if view.layer >= self.covered or (view.phase == PREFILL and view.tokens > 1):
            for i in range(view.n_active):
                run_on_cpu(plan, view.active[i])
            return
        look_up(view, self.ways, self.rule, self.waits, self.hit)
        hold(view, self.ways, self.protect, self.held)
        if self.hit_first:
            for i in range(view.n_active):
                if self.hit[view.active[i]]:
                    run_on_gpu(plan, view.active[i])
                    self.held[view.active[i]] = self.protect
        for i in range(view.n_active):
            expert = view.active[i]
            if self.hit[expert] == 0:
                run_on_cpu(plan, expert)
                self.held[expert] = self.protect
                if way_of(self.ways, view.layer, expert) == NONE:
                    fill(view, plan, self.ways, self.quota, self.held, expert)
            elif self.hit_first == 0:
                run_on_gpu(plan, expert)
                self.held[expert] = self.protect


def geometry(setting: Setting, layers: int, ways: int) -> tuple[int, int]:
    """Return how many layers have a set, and of how many ways; 0 for either is what fits."""
    slots = setting.slots
    layers = min(layers, setting.layers)
    ways = min(ways, setting.experts)
    if layers * ways > slots:
        raise InputError(
            f"policy huang: layers={layers} with ways={ways} take {layers * ways} slots of "
            f"{setting.expert_bytes} bytes, and the budget of {setting.budget_bytes} bytes holds "
            f"{slots}"
        )
    if layers > 0 and ways == 0:
        ways = min(slots // layers, setting.experts)
    elif ways == 0:
        half = (setting.experts + 1) // 2
        ways = min(max(half, slots // setting.layers), setting.experts, slots)
    if layers == 0 and ways > 0:
        layers = min(slots // ways, setting.layers)
    return (layers, ways) if ways > 0 else (0, 0)


def look_up(view: View, ways: Ways, rule: int, waits: int, hit: IntArray) -> None:
    """Find the hits among the active experts, and count them at once."""
    for i in range(view.n_active):
        expert = view.active[i]
        way = way_of(ways, view.layer, expert)
        hit[expert] = 0
        if way != NONE and (waits or arriving_ns(view, view.layer, expert) == 0):
            hit[expert] = 1
            way_use(ways, view.layer, way, rule)


def hold(view: View, ways: Ways, protect: int, held: IntArray) -> None:
    """Hold the active experts until their runs are ordered; with `protect` also who is coming."""
    held[:] = 0
    for i in range(view.n_active):
        held[view.active[i]] = 1
    if protect:
        for way in range(ways.tag.shape[1]):
            expert = ways.tag[view.layer, way]
            if expert != NONE and arriving_ns(view, view.layer, expert) > 0:
                held[expert] = 1


def fill(view: View, plan: Plan, ways: Ways, quota: IntArray, held: IntArray, expert: int) -> None:
    """Copy a missed expert, once it is computed, over the victim, if the quota allows."""
    quota[0] -= 1
    way = way_victim(ways, view.layer, held)
    if quota[0] <= 0 or way == NONE:
        return
    victim = ways.tag[view.layer, way]
    if victim != NONE:
        evict(plan, view.layer, victim)
    way_fill(ways, view.layer, way, expert)
    fetch(plan, view.layer, expert, into=CACHE, after_compute=1)
