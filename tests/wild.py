"""A policy that orders anything legal at random, and random runs to try it on."""

import random
from typing import Any, NamedTuple

import hypothesis.strategies as st
import msgspec
import numpy as np

import moesim.policies.testing as lab
from moesim.costs import Costs
from moesim.policies import api
from moesim.policies.api import CACHE, FIRST, REST, Placement, Plan, Prediction, Setting, View
from moesim.policies.registry import Chosen
from moesim.profile import HardwareProfile
from moesim.types import CPU, GPU, LANES, NONE, WHOLE, IntArray

PARTS = (1, 256, 410, 1000, WHOLE, WHOLE, WHOLE)


class Wild(NamedTuple):
    """Whatever is legal, at random; remembers only the precisions that it has asked for."""

    random: random.Random
    capacity: IntArray
    """(pools,)"""
    pool_of_layer: IntArray
    slot_bytes: int
    precision: dict[tuple[int, int], int]
    placement: Placement

    @classmethod
    def new(cls, setting: Setting) -> "Wild":
        rng = random.Random(setting.seed)
        layers, experts = setting.layers, setting.experts
        shared = rng.random() < 0.3
        pools = 1 if shared else layers
        staging = rng.randint(1, max(1, min(4, setting.slots)))
        capacity = api.even_split(max(0, setting.slots - staging), pools)
        capacity = np.minimum(capacity, experts * layers if shared else experts)
        pool_of_layer = np.zeros(layers, np.int64) if shared else np.arange(layers)
        cached = np.zeros((layers, experts), np.int64)
        room = capacity.copy()
        for layer in range(layers):
            for expert in range(experts):
                if room[pool_of_layer[layer]] > 0 and rng.random() < 0.5:
                    cached[layer, expert] = rng.choice(PARTS)
                    room[pool_of_layer[layer]] -= 1
        on_disk = np.array([[rng.random() < 0.3 for _ in range(experts)] for _ in range(layers)])
        names = ("auto", "previous", "popularity", "oracle", "noisy-oracle")
        placement = Placement(
            cached=cached,
            cache_slots=capacity,
            cache_slot_bytes=np.full(pools, setting.expert_bytes),
            pool_of_layer=pool_of_layer,
            spare_slots=rng.randint(0, 3),
            staging_slots=staging,
            batches=rng.randint(1, setting.sequences),
            predictions=tuple(
                Prediction(
                    rng.choice(names), rng.random() < 0.5, rng.randint(1, 2), rng.choice((GPU, CPU))
                )
                for _ in range(rng.randint(0, 2))
            ),
            link=rng.choice(("priority", "priority", "fifo")),
            host_computes=rng.random() < 0.2,
            gemm_per_batch=rng.random() < 0.3,
            kv_on_host=rng.random() < 0.3,
            dense_on_host=rng.random() < 0.3,
            on_disk=on_disk.astype(np.int64) if rng.random() < 0.3 else None,
            sync_batches=rng.random() < 0.2,
        )
        if placement.kv_on_host and rng.random() < 0.5:
            placement = msgspec.structs.replace(placement, attention_on_cpu=True)
        return cls(rng, capacity, pool_of_layer, setting.expert_bytes, {}, placement)

    def place(self, setting: Setting) -> Placement:
        return self.placement

    def before_attention(self, view: View, plan: Plan) -> None:
        if view.layer == 0 and self.random.random() < 0.2:
            resize_pools(self, view, plan)
            return
        around(self, view, plan, gate=True)

    def before_gate(self, view: View, plan: Plan) -> None:
        around(self, view, plan)

    def routed(self, view: View, plan: Plan) -> None:
        around(self, view, plan, busy=True)

    def after_layer(self, view: View, plan: Plan) -> None:
        around(self, view, plan)

    def dispatch(self, view: View, plan: Plan) -> None:
        rng = self.random
        todo: list[tuple[int, int]] = []
        for expert in view.active[: view.n_active].tolist():
            cached, staged = view.cached[view.layer, expert], view.staged[view.layer, expert]
            if rng.random() < 0.4:
                todo.append((expert, NONE))
            elif 0 < cached < WHOLE and staged == 0 and rng.random() < 0.6:
                todo += [(expert, FIRST), (expert, REST)]
            else:
                todo.append((expert, api.BOTH))
        rng.shuffle(todo)
        shared = rng.randint(0, 2 * len(todo))
        deferrable = view.layer < len(view.cached) - 1
        done: set[int] = set()
        for at, (expert, piece) in enumerate(todo):
            if at == shared:
                api.run_shared(plan)
            if piece == NONE:
                api.run_on_cpu(plan, expert, int(deferrable and rng.random() < 0.3))
            elif piece in (FIRST, REST):
                api.run_on_gpu(plan, expert, REST if expert in done else FIRST)
            else:
                api.run_on_gpu(plan, expert)
            done.add(expert)
        around(self, view, plan)


def resize_pools(self: Wild, view: View, plan: Plan) -> None:
    """Take a slot from one pool, which loses what it holds; another one, or nobody, gets it."""
    rng = self.random
    layers = [rng.randrange(len(self.pool_of_layer)) for _ in range(2)]
    for layer, change in zip(layers, (-1, rng.randint(0, 1)), strict=True):
        pool = self.pool_of_layer[layer]
        if self.capacity[pool] + change < 0:
            return
        self.capacity[pool] += change
        api.resize(plan, layer, int(self.capacity[pool]), self.slot_bytes)
        for at in [at for at in self.precision if self.pool_of_layer[at[0]] == pool]:
            del self.precision[at]


def around(  # noqa: PLR0912  one branch per command
    self: Wild, view: View, plan: Plan, *, gate: bool = False, busy: bool = False
) -> None:
    """Order what may be ordered in any hook; with `busy`, active experts still have to run."""
    rng = self.random
    layers, experts = view.cached.shape
    cached = view.cached.copy()
    used = np.bincount(
        self.pool_of_layer, weights=(cached > 0).sum(axis=1), minlength=len(self.capacity)
    )
    free = (self.capacity - used).astype(int)
    if rng.random() < 0.3:
        whole = np.argwhere((view.staged == WHOLE) & (cached == 0))
        settled = len(plan.rows) and plan.length[0] == 0
        for layer, expert in whole.tolist()[:1]:
            if free[self.pool_of_layer[layer]] > 0 and settled:
                part = rng.choice(PARTS)
                api.admit(plan, layer, expert, part)
                cached[layer, expert] = WHOLE
                free[self.pool_of_layer[layer]] -= 1
                self.precision[layer, expert] = NONE
    gates, most_gates = 0, 2 if self.placement.attention_on_cpu else 3
    for _ in range(rng.randint(0, 3)):
        layer, expert = rng.randrange(layers), rng.randrange(experts)
        pool = self.pool_of_layer[layer]
        needed = busy and layer == view.layer and view.loads[expert] > 0
        match rng.randint(0, 8):
            case 0 | 1 | 2:
                precision = rng.choice((NONE, NONE, view.precision, 3))
                api.fetch(
                    plan, layer + rng.choice((0, layers)), expert, precision=precision,
                    urgent=rng.randint(0, 1), after_compute=rng.randint(0, 1),
                )  # fmt: skip
            case 3 | 4:
                part = rng.choice(PARTS)
                if cached[layer, expert] == 0 and free[pool] > 0:
                    free[pool] -= 1
                    self.precision[layer, expert] = rng.choice((view.precision, 3))
                elif cached[layer, expert] == 0 or self.precision.get((layer, expert)) == NONE:
                    continue
                asked = self.precision.get((layer, expert), view.precision)
                api.fetch(plan, layer, expert, part, asked, CACHE, urgent=rng.randint(0, 1))
                cached[layer, expert] = max(cached[layer, expert], part)
            case 5 if cached[layer, expert] > 0 and not needed:
                api.evict(plan, layer, expert)
                cached[layer, expert] = 0
                free[pool] += 1
                self.precision.pop((layer, expert), None)
            case 6:
                api.cancel(plan, layer, expert)
            case 7:
                api.promote(plan, layer, expert)
            case 8 if gate and gates < most_gates and view.cached[view.layer, expert] > 0:
                if cached[view.layer, expert] > 0:
                    api.gate_after(plan, expert)
                    gates += 1
            case _:
                api.read(plan, layer, expert)


VARIANTS = (
    "adapmoe:predictor=previous",
    "adapmoe:ahead=3,predictor=oracle",
    "adapmoe:ahead=0",
    "all-cpu",
    "all-gpu:rest=on-demand",
    "fate",
    "fate:predictor=noisy-oracle,width=3,link=priority,shallow=1",
    "fate:arc=textbook,percentile=50,demand=int2,int2_rate=.9,shallow=0,staging=2,gate=cpu",
    "fiddler",
    "fiddler:cost=code,order=overlap",
    "flexgen",
    "flexgen:form=released,batches=2",
    "flexgen:batches=3,kv=host",
    "flexgen:form=released,batches=3,kv=host,cpu_attention=true",
    "huang",
    "huang:ways=2,rule=lru,quota=3,hit_first=false,link=fifo",
    "huang:rule=fifo,in_flight=miss,protect=true",
    "hybrimoe:predictor=previous",
    "hybrimoe:prefetch=score,when=one-row,rows=first,cost=deepseek,link=priority",
    "hybrimoe:predictor=oracle,ahead=2,assign=threshold,cache=lru,staging=1",
    "ktransformers",
    "ktransformers:mask=frequency,deferred=1",
    "ktransformers:mask=random,deferred=9",
    "klotski",
    "klotski:bs=1,hot=9,vote=port,kv=host",
    "klotski:bs=2,hot=1,order=id,gate_waits_for_hot=false,merge_gemm=true",
    "mixtral-offloading:predictor=previous",
    "mixtral-offloading:cached=1,speculative=1,predictor=oracle",
    "moe-lightning",
    "moe-lightning:batches=2,pages=false",
    "moe-lightning:batches=1,attention=gpu",
    "moe-infinity",
    "moe-infinity:evict=code,match=code,staging=1",
    "moe-infinity:evict=request",
    "moepic:predictor=previous,period=2,epsilon=0.1",
    "moepic:predictor=oracle,theta=0.4",
    "moepic:predictor=popularity,theta=1,link=fifo,buffer=1",
    "moepic:predictor=oracle,theta=0",
    "moepic:prefetch=false,period=2",
    "on-demand",
    "lru",
    "lru:rule=lfu",
    "lru:rule=fifo,staging=1",
    "oracle",
    "oracle:staging=1",
    "pregated",
    "pregated:ahead=2",
    "static",
    "static:by=expert",
    "belady",
    "belady:staging=1",
    "dali",
    "dali:cache=lru,prefetch_size=2",
    "dali:cache=lfu",
    "dali:assign=exact,swap=guarded,link=priority,w_size=1",
    "dali:assign=hss,prefetch_size=2",
    "dali:predictor=noisy-oracle,prefetch_size=3,w_size=2,u_size=2,link=priority",
)
"""Every built-in policy, with its rules in turn."""


class Case(NamedTuple):
    """Everything of a run but the policy."""

    choices: IntArray
    experts: int
    prompts: tuple[int, ...]
    slots: int
    costs: Costs
    machine: HardwareProfile
    seed: int
    jitter: int
    drawn: str
    """What was drawn, in words."""

    def __repr__(self) -> str:
        return f"Case({self.choices.tolist()}, {self.drawn}, seed={self.seed})"

    def run(self, policy: type | Chosen, on: str = "simpy", **changes: Any) -> Any:
        """Replay it on a machine, audited."""
        case = self._replace(**changes)
        return lab.run(
            policy, case.choices, case.costs, experts=case.experts, slots=case.slots,
            prompts=case.prompts, machine=case.machine, seed=case.seed, jitter=case.jitter,
            on=on,
        )  # fmt: skip


def factor(draw: st.DrawFn) -> float:
    return draw(st.sampled_from((1.0, 0.9, 0.5, 0.333, 0.01)))


@st.composite
def cases(draw: st.DrawFn, *, calm: bool = False) -> Case:
    """Draw a small run; a calm one has no interference, jitter, preemption or rounding."""
    layers = draw(st.integers(1, 3))
    experts = draw(st.integers(1, 6))
    top_k = draw(st.integers(1, min(3, experts)))
    sequences = draw(st.integers(1, 3))
    length = draw(st.integers(1, 5))
    prompts = tuple(draw(st.integers(1, length)) for _ in range(sequences))
    seed = draw(st.integers(0, 2**31 - 1))
    rng = np.random.default_rng(seed)
    choices = np.array(
        [
            [rng.permutation(experts)[:top_k] for _ in range(layers)]
            for _ in range(sequences * length)
        ]
    )
    ns = {name: draw(st.integers(0, 300)) for name in ("attention", "gate", "gpu", "cpu")}
    ns |= {
        "combine": draw(st.integers(0, 9)),
        "head": draw(st.integers(1, 9)),
        "shared": draw(st.sampled_from((0, 30))),
        "copy_ns_per_kib": draw(st.sampled_from((0, 16, 64, 320))),
        "latency": draw(st.sampled_from((0, 7))),
        "token_bytes": draw(st.sampled_from((0, 64))),
    }
    if calm:  # whole ns per byte, and for each 1/1024 of an expert: k times the costs is exact
        ns |= {"copy_ns_per_kib": 1024 * draw(st.sampled_from((1, 2, 5))), "gpu": 1024 * ns["gpu"]}
    ns |= {"cpu_context": draw(st.sampled_from((0, 20, 300)))}
    costs = lab.make_costs(layers, **ns, kv_bytes=100, dense_bytes=700)
    gate_token_ns, context_ns = draw(st.sampled_from(((0, 0), (90, 0), (90, 900))))
    costs = costs._replace(
        gate_ns=costs.gate_ns + gate_token_ns * np.arange(len(costs.gate_ns)),
        context_fp=lab.per_attended(context_ns, context_ns),
    )
    settings = [f"link.chunk_bytes={1 << 40 if calm else draw(st.sampled_from((1, 100, 256)))}"]
    if not calm:
        settings += [
            f"host.{name}={draw(st.sampled_from((0, 0, 9)))}"
            for name in ("per_layer_ns", "per_launch_ns", "per_sync_ns", "decision_ns")
        ]
        pairs = [(a, b) for i, a in enumerate(LANES) for b in LANES[i + 1 :]]
        chosen = draw(st.lists(st.sampled_from(pairs), max_size=4, unique=True))
        entries = ", ".join(
            f"{{busy: [{a}, {b}], slow: {{{a}: {factor(draw)}, {b}: {factor(draw)}}}}}"
            for a, b in chosen
        )
        settings.append(f"interference=[{entries}]")
    slots = draw(st.integers(1, layers * experts + 4))
    jitter = 0 if calm else draw(st.sampled_from((0, 0, 300)))
    by_token = f"{gate_token_ns=}, {context_ns=}"
    drawn = f"experts={experts}, {prompts=}, {slots=}, {jitter=}, {ns}, {by_token}, {settings}"
    machine = lab.quiet_machine(*settings)
    return Case(choices, experts, prompts, slots, costs, machine, seed, jitter, drawn)
