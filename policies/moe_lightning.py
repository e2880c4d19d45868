"""MoE-Lightning, arXiv 2411.11217: weights stream in pages, and the CPU attends to the context."""

from typing import Literal, NamedTuple

import numpy as np

from moesim.costs import copy_ns, duration_ns, part_bytes
from moesim.errors import PolicyError
from moesim.model import GroupedQuery, layer_kv_bytes
from moesim.policies.api import Placement, Plan, Setting, Table, View
from moesim.policies.moe_lightning_plan import (
    Problem,
    Solution,
    prefill_s,
    solve,
    tokens_per_s,
    workspace_bytes,
)
from moesim.policies.parts.streaming import (
    await_layer,
    buffer_notices,
    mean_lengths,
    pass_ns,
    run_by_id,
    stream_ahead,
)
from moesim.types import ATTENTION, ATTENTION_CPU, DECODE, H2D, WHOLE

AHEAD = 2
"""The CPU attends for so many micro-batches before the one whose experts run."""


class MoeLightning(NamedTuple):
    """All experts stream through the GPU in pages between the results of attention on the CPU.

    Paper: experts run on the GPU only; a share of every layer's expert weights stays there, the
    rest of the next layer is copied whatever the router chooses, into buffers for two layers. In
    decode the CPU attends to keys and values, which stay in host memory; prompts are computed on
    the GPU. CGOPipe: the weights of the next layer are cut into as many pages as there are
    micro-batches, and a page is copied between the hidden states of two of them. Released code:
    the solver of `moe_lightning_plan`, whose shares divide every expert; micro-batches compute
    their experts one after the other.

    Inferred: as the number of sequences is given here, the solver's share is what the budget holds:
    the same part of every expert, next to two layers of buffers for the rest; a budget below that
    streams whole experts through the slots there are. There are as few micro-batches as the
    workspace of a prefill allows beside the budget, and at least three, since the CPU is to be two
    ahead. Pages are expressed by chunks: hidden states go first at the next border of a page, which
    is at most one expert; `pages=false` is one FIFO link, on which they wait for all that was
    ordered before.

    Deviations: micro-batches go through a layer in lock-step, so that the CPU attends for all of
    them before the first one's experts run: a layer that takes max(link, GPU, CPU) there takes
    max(link, GPU + CPU) here. It is the same while the link needs longer than both together. The
    output projection is counted before the CPU's part, pinning pages costs nothing, and only
    queries, new keys and values and results travel. A workspace that does not fit is announced, and
    taken to fit. `attention=gpu` brings the keys and values to the GPU instead, in FlexGen's way.
    """

    part: int
    """Of every expert on the GPU, in 1024ths."""
    staging: int
    batches: int
    page_bytes: int
    on_cpu: int

    @classmethod
    def new(
        cls,
        setting: Setting,
        batches: int = 0,
        attention: Literal["cpu", "gpu"] = "cpu",
        pages: bool = True,
    ) -> "MoeLightning":
        """`batches`: micro-batches, at most one per sequence; 0: as few as fit, at least three."""
        if setting.slots < 1:
            raise PolicyError(
                f"a budget of {setting.budget_bytes} bytes holds no expert: one takes "
                f"{setting.expert_bytes} bytes, and MoE-Lightning computes none on the CPU"
            )
        part = resident_part(setting)
        buffers = setting.experts * min(2, setting.layers)
        staging = min(buffers, setting.slots) if part == 0 else buffers
        count = min(batches or fewest_batches(setting), setting.sequences)
        page_bytes = -(-setting.experts * streamed_bytes(setting, part) // count)
        return cls(
            part=part,
            staging=staging if part < WHOLE else 0,
            batches=count,
            page_bytes=max(1, page_bytes) if pages else 0,
            on_cpu=int(attention == "cpu"),
        )

    def place(self, setting: Setting) -> Placement:
        """Keep the same part of every expert, and buffers for the other parts."""
        layers, experts = setting.layers, setting.experts
        slots = experts if self.part > 0 else 0
        streamed = experts if self.part < WHOLE else 0
        return Placement(
            cached=np.full((layers, experts), self.part, np.int64),
            cache_slots=np.full(layers, slots, np.int64),
            cache_slot_bytes=np.full(layers, resident_bytes(setting, self.part), np.int64),
            pool_of_layer=np.arange(layers),
            staging_slots=self.staging,
            staging_slot_bytes=streamed_bytes(setting, self.part),
            batches=self.batches,
            link="priority" if self.page_bytes else "fifo",
            chunk_bytes=self.page_bytes,
            gemm_per_batch=True,
            kv_on_host=True,
            attention_on_cpu=self.on_cpu == 1,
            notices=(
                *buffer_notices("moe-lightning", self.staging, streamed),
                *workspace_notices(setting, self.batches),
            ),
        )

    def plan(self, setting: Setting) -> tuple[Table, ...]:
        """Show what is expected of this run, and what the released solver would run instead."""
        return (run_table(self, setting), *solver_tables(setting))

    def before_attention(self, view: View, plan: Plan) -> None:
        """Copy what is missing of the next layer's experts."""
        stream_ahead(view, plan)

    def before_gate(self, view: View, plan: Plan) -> None:
        """Wait for the whole layer."""
        await_layer(view, plan)

    def dispatch(self, view: View, plan: Plan) -> None:
        """Compute what was chosen."""
        run_by_id(view, plan)


def resident_bytes(setting: Setting, part: int) -> int:
    """Return the bytes of the first `part` of the largest expert."""
    return max(
        part_bytes(setting.costs, layer, setting.precision, 0, part)
        for layer in range(setting.layers)
    )


def streamed_bytes(setting: Setting, part: int) -> int:
    """Return the bytes of what is left of the largest expert."""
    return max(
        part_bytes(setting.costs, layer, setting.precision, part, WHOLE - part)
        for layer in range(setting.layers)
    )


def resident_part(setting: Setting) -> int:
    """Return the largest part of every expert that the budget holds with the buffers."""
    every = setting.layers * setting.experts
    buffers = min(2, setting.layers) * setting.experts
    for part in range(WHOLE, 0, -1):
        needed = every * resident_bytes(setting, part) + buffers * streamed_bytes(setting, part)
        if needed <= setting.budget_bytes:
            return part
    return 0


def fewest_batches(setting: Setting) -> int:
    """Return how many micro-batches keep the workspace within the GPU memory beside the budget.

    If no number does, it is three: more would only read the experts more often.
    """
    problem = problem_of(setting)
    if problem is not None:
        for count in range(AHEAD + 1, setting.sequences + 1):
            if missing_bytes(problem, setting, count) <= 0:
                return count
    return AHEAD + 1


def missing_bytes(problem: Problem, setting: Setting, batches: int) -> float:
    """Return how much the workspace is larger than the GPU memory beside budget and weights."""
    room = problem.gpu_bytes - problem.dense_bytes - setting.budget_bytes
    size = -(-setting.sequences // batches)
    return workspace_bytes(problem, size, setting.sequences) - room


def workspace_notices(setting: Setting, batches: int) -> tuple[str, ...]:
    """Say so if the workspace of a prefill does not fit."""
    problem = problem_of(setting)
    missing = 0.0 if problem is None else missing_bytes(problem, setting, batches)
    if missing <= 0:
        return ()
    return (
        f"moe-lightning: prompts in {batches} micro-batches need {missing / 2**30:.2f} GiB more "
        "GPU memory than the budget for experts leaves, and are taken to fit",
    )


def problem_of(setting: Setting) -> Problem | None:
    """Return the solver's view of a setting, or None if its model or machine is not known."""
    model, machine = setting.model, setting.machine
    if model is None or machine is None:
        return None
    own = model.attention
    kv_width = layer_kv_bytes(model) // 4
    if isinstance(own, GroupedQuery):
        kv_width = own.kv_heads * own.head_dim
    prompt, generate = mean_lengths(setting)
    return Problem(
        layers=setting.layers,
        experts=setting.experts,
        top_k=setting.top_k,
        hidden=model.hidden,
        width=model.expert_width,
        heads=own.heads,
        kv_width=kv_width,
        layer_bytes=setting.experts * setting.expert_bytes,
        dense_bytes=int(setting.costs.attention_bytes.sum()),
        prompt=prompt,
        generate=generate,
        gpu_bytes=machine.gpu.memory_bytes,
        host_bytes=machine.cpu.memory_bytes,
        link_bytes_per_s=machine.link.h2d.bytes_per_s,
        gpu_bytes_per_s=machine.gpu.memory_bytes_per_s,
        host_bytes_per_s=machine.cpu.memory_bytes_per_s,
        gpu_flops_per_s=machine.gpu.flops_per_s,
        host_flops_per_s=machine.cpu.flops_per_s,
    )


def run_table(policy: MoeLightning, setting: Setting) -> Table:
    """Return what a layer of a decode step of this run needs, by the cost tables."""
    costs, last = setting.costs, setting.layers - 1
    size = -(-setting.sequences // policy.batches)
    context = setting.kv_tokens // policy.batches
    missing = streamed_bytes(setting, policy.part)
    copy = setting.experts * copy_ns(costs, H2D, missing)
    attended = 0 if policy.on_cpu else context
    projected = duration_ns(costs, DECODE, ATTENTION, last, size, attended, WHOLE, 0)
    gate = int(costs.gate_ns[size])
    experts = pass_ns(costs, setting.precision, setting.experts, setting.top_k, size)
    rest = policy.batches * experts
    rest += int(costs.shared_ns[setting.sequences] + costs.combine_ns[setting.sequences])
    gpu = policy.batches * (projected + gate) + rest
    cpu = policy.batches * duration_ns(costs, DECODE, ATTENTION_CPU, last, size, context, WHOLE, 0)
    in_turn = max(gpu, projected + cpu + gate + rest)
    if policy.on_cpu == 0:
        copy += policy.batches * copy_ns(costs, H2D, context * int(costs.kv_bytes.max()))
        cpu, in_turn = 0, gpu
    step_s = setting.layers * max(copy, in_turn) / 1e9
    rows = (
        ("micro-batches", policy.batches),
        ("sequences of the largest", size),
        ("share of every expert on the GPU", policy.part / WHOLE),
        ("buffers, in experts", policy.staging),
        ("page, MB", policy.page_bytes / 1e6),
        ("layer: link, ms", copy / 1e6),
        ("layer: GPU, ms", gpu / 1e6),
        ("layer: CPU, ms", cpu / 1e6),
        ("step side by side, s", setting.layers * max(copy, gpu, cpu) / 1e9),
        ("step in lock-step, s", step_s),
        ("tokens/s in lock-step", setting.sequences / step_s),
    )
    note = (
        "Decoding at the end of the run, all experts in use. CGOPipe has link, GPU and CPU side by "
        "side; in lock-step, as here, experts wait until the CPU has attended for all batches."
    )
    return Table("This run, by the cost tables", ("setting", "value"), rows, note)


def solver_tables(setting: Setting) -> tuple[Table, ...]:
    """Return the released solver's policy for this model and machine, whatever the budget."""
    problem = problem_of(setting)
    if problem is None:
        return ()
    title = "The released solver, free to choose the number of sequences and the budget"
    found = solve(problem)
    if found is None:
        note = (
            "Nothing fits: not even one sequence, with two layers of experts and all other weights "
            f"on {problem.gpu_bytes / 2**30:.0f} GiB of GPU memory and the rest in "
            f"{problem.host_bytes / 2**30:.0f} GiB of host memory."
        )
        return (Table(title, ("setting", "value"), (), note),)
    note = (
        f"Prompts of {problem.prompt:g} tokens and {problem.generate:g} generated; the datasheet "
        "rates of the machine, which its cost tables refine. All generated tokens are divided by "
        "the time of the decode steps, which do not give the first ones."
    )
    return (Table(title, ("setting", "value"), solution_rows(problem, found), note),)


def solution_rows(problem: Problem, found: Solution) -> tuple[tuple[object, ...], ...]:
    """Return a solution in words."""
    return (
        ("sequences", found.sequences),
        ("sequences of a micro-batch", found.size),
        ("micro-batches", found.batches),
        ("share of the experts on the GPU", found.share),
        ("decode layer: link, ms", found.copy_s * 1e3),
        ("decode layer: GPU, ms", found.gpu_s * 1e3),
        ("decode layer: CPU, ms", found.host_s * 1e3),
        ("decode step, s", found.layer_s * problem.layers),
        ("prefill layer, ms", prefill_s(problem, found) * 1e3),
        ("tokens/s as it counts them", tokens_per_s(problem, found)),
    )
