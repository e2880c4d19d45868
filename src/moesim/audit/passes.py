"""Laws of a forward pass: everything routed is computed and combined once, in order."""

from collections import defaultdict
from operator import attrgetter

from moesim.audit.form import Operation, Run, require, require_after
from moesim.types import (
    ATTENTION,
    ATTENTION_CPU,
    COMBINE,
    CPU,
    DENSE_IN,
    EXPERT_CPU,
    EXPERT_GPU,
    GATE,
    HEAD,
    KINDS,
    KV_IN,
    KV_OUT,
    NONE,
    PREDICT,
    RETURN,
    SEND,
    SHARED,
    WHOLE,
)


def check_head(run: Run, step: int) -> None:
    """A step ends with one HEAD, after the last layer's COMBINE."""
    head = run.only(HEAD, step)
    last = run.only(COMBINE, step, run.log.loads.shape[1] - 1)
    require_after(head, last, "completeness: HEAD starts after the last COMBINE")


def check_attention(run: Run, step: int, layer: int) -> None:
    """Each batch has one ATTENTION over its new tokens, after the layer or step before has ended,
    and then one GATE. A batch without tokens may lack both.
    """
    before = run.only(COMBINE, step, layer - 1) if layer else None
    if step and not layer:
        before = run.only(HEAD, step - 1)
    attentions, gates = run.find(ATTENTION, step, layer), run.find(GATE, step, layer)
    for batch, tokens in enumerate(run.log.batch_tokens[step].tolist()):
        mine = [a for a in attentions if a.batch == batch]
        its_gates = [g for g in gates if g.batch == batch]
        counts_fit = len(mine) == len(its_gates) == 1 or not (mine or its_gates or tokens)
        where = f"step {step}, layer {layer}, batch {batch}"
        law = f"completeness: {where} has not one ATTENTION and one GATE"
        require(counts_fit, law, *mine, *its_gates)
        for attention, gate in zip(mine, its_gates, strict=True):
            law = f"completeness: ATTENTION over {attention.amount} tokens of {tokens}"
            require(attention.amount == tokens, law, attention)
            require_after(gate, attention, "completeness: GATE starts after its ATTENTION")
            if before:
                law = "completeness: a layer starts after the one before has ended"
                require_after(attention, before, law)
    stray = [operation for operation in (*attentions, *gates) if operation.batch == NONE]
    require(not stray, "completeness: ATTENTION and GATE are of one batch", *stray)


def check_cpu_attention(run: Run, step: int, layer: int) -> None:
    """If the CPU attends, then after step 0 each ATTENTION is followed by the SEND of what it
    projected, one ATTENTION_CPU over as many tokens, the RETURN of its result and the GATE.
    """
    on_cpu = run.log.attention_on_cpu and step > 0
    links: tuple[int, ...] = (SEND, ATTENTION_CPU, RETURN, GATE)
    for attention in run.find(ATTENTION, step, layer):
        law = "attention: the GPU attends to a context that is the CPU's"
        require(not (on_cpu and attention.context), law, attention)
        before = attention
        for kind in links if on_cpu else ():
            found = [o for o in run.find(kind, step, layer) if o.batch == attention.batch]
            law = f"attention: {len(found)} {KINDS[kind]} of an ATTENTION whose rest the CPU does"
            require(len(found) == 1, law, attention, *found)
            law = f"attention: {KINDS[kind]} starts after {KINDS[before.kind]}"
            require_after(found[0], before, law)
            before = found[0]
            if kind == ATTENTION_CPU:
                law = f"attention: the CPU attends for {before.amount} tokens"
                require(before.amount == attention.amount, law, before, attention)
    expected = len(run.find(ATTENTION, step, layer)) if on_cpu else 0
    for kind in (SEND, ATTENTION_CPU, RETURN):
        found = run.find(kind, step, layer)
        if kind != ATTENTION_CPU:
            found = [o for o in found if o.batch != NONE]
        law = f"attention: step {step}, layer {layer} has {len(found)} {KINDS[kind]} of batches"
        require(len(found) == expected, law, *found)


def check_synchronised(run: Run) -> None:
    """With full synchronisations, an ATTENTION or GATE is submitted when all has ended that was
    submitted up to the last ATTENTION (the RETURN of what the CPU attended to) or COMBINE.
    """
    submitted_end_ns = due_ns = 0
    law = "synchronisation: ATTENTION and GATE are submitted when all before them has ended"
    for operation in run.live if run.log.sync_batches else ():
        if operation.kind in {ATTENTION, GATE}:
            require(operation.submit_ns >= due_ns, law, operation)
        submitted_end_ns = max(submitted_end_ns, operation.end_ns)
        attended = operation.kind == RETURN and operation.batch != NONE
        if attended or operation.kind in {ATTENTION, COMBINE}:
            due_ns = submitted_end_ns


def check_experts(run: Run, step: int, layer: int) -> None:
    """Each token routed to an expert is computed once by all of it, on one device, after the GATEs;
    nothing else is computed.
    """
    loads = run.log.loads[step, layer].tolist()
    gates = {gate.batch: gate for gate in run.find(GATE, step, layer)}
    on_gpu, on_cpu = run.find(EXPERT_GPU, step, layer), run.find(EXPERT_CPU, step, layer)
    for operation in on_cpu:
        others = [o for o in (*on_gpu, *on_cpu) if o.expert == operation.expert]
        law = "completeness: an expert runs once, on one device"
        require(others == [operation], law, *others)
    pieces: dict[tuple[int, int], list[Operation]] = defaultdict(list)
    for operation in (*on_gpu, *on_cpu):
        tokens = {b: row[operation.expert] for b, row in enumerate(loads) if row[operation.expert]}
        if operation.batch != NONE:
            tokens = {b: count for b, count in tokens.items() if b == operation.batch}
        law = f"completeness: a run over {operation.amount} tokens of {sum(tokens.values())} routed"
        require(tokens and operation.amount == sum(tokens.values()), law, operation)
        for batch in tokens:
            require(batch in gates, f"completeness: no GATE for batch {batch}", operation)
            require_after(operation, gates[batch], "completeness: a run starts after its GATEs")
            pieces[operation.expert, batch].append(operation)
    for batch, row in enumerate(loads):
        for expert, tokens_count in enumerate(row):
            if tokens_count:
                where = f"step {step}, layer {layer}, batch {batch}, expert {expert}"
                check_tiling(pieces[expert, batch], where)


def check_tiling(pieces: list[Operation], where: str) -> None:
    """The pieces in which an expert runs are all of it, once."""
    behind = 0
    for piece in sorted(pieces, key=attrgetter("parts")):
        law = f"completeness: {where} runs part {min(behind, piece.parts[0])} not exactly once"
        require(piece.parts[0] == behind, law, *pieces)
        behind = piece.parts[1]
    law = f"completeness: {where} has tokens, but parts from {behind} do not run"
    require(behind == WHOLE, law, *pieces)


def check_cpu_results(run: Run, step: int, layer: int) -> None:
    """One SEND, after all ATTENTIONs, precedes the CPU's experts and guesses; one RETURN carries
    results to this layer's COMBINE, and one the deferred results to the next layer's.
    """
    experts = run.find(EXPERT_CPU, step, layer)
    returns = [o for o in run.find(RETURN, step, layer) if o.batch == NONE]
    sends = [o for o in run.find(SEND, step, layer) if o.batch == NONE]
    attended = [o for o in run.find(RETURN, step, layer) if o.batch != NONE]
    guesses = [guess for guess in run.find(PREDICT, step, layer) if guess.queue == CPU]
    where = f"step {step}, layer {layer}"
    on_cpu = [*experts, *guesses]
    law = f"completeness: {where} has {len(on_cpu)} operations on the CPU and {len(sends)} SENDs"
    require(len(sends) == bool(on_cpu), law, *sends)
    for send in sends:
        for attention in run.find(ATTENTION, step, layer):
            require_after(send, attention, "completeness: SEND starts after the ATTENTIONs")
        for result in attended:
            require_after(send, result, "completeness: SEND starts after the CPU has attended")
        for operation in on_cpu:
            require_after(operation, send, "completeness: the CPU starts after SEND")
    for operation in (*experts, *returns):
        require(operation.context in {0, 1}, "completeness: context is 0 or 1", operation)
    for deferred in (0, 1):
        results = [expert for expert in experts if expert.context == deferred]
        carriers = [carrier for carrier in returns if carrier.context == deferred]
        law = f"completeness: {where} has {len(carriers)} RETURNs of {len(results)} CPU results"
        require(len(carriers) == bool(results), law, *results, *carriers)
        if not results:
            continue
        last = layer + deferred == run.log.loads.shape[1]
        require(not last, "completeness: the last layer defers nothing", *results)
        for result in results:
            require_after(carriers[0], result, "completeness: RETURN starts after its results")
        combine = run.only(COMBINE, step, layer + deferred)
        require_after(combine, carriers[0], "completeness: COMBINE starts after RETURN")


def check_combine(run: Run, step: int, layer: int) -> None:
    """One COMBINE ends a layer step, after all GPU runs and SHARED, which runs at most once."""
    combine, shared = run.only(COMBINE, step, layer), run.find(SHARED, step, layer)
    require(len(shared) <= 1, "completeness: SHARED runs at most once", *shared)
    for operation in shared:
        for attention in run.find(ATTENTION, step, layer):
            require_after(operation, attention, "completeness: SHARED starts after the ATTENTIONs")
    for operation in (*shared, *run.find(EXPERT_GPU, step, layer)):
        require_after(combine, operation, "completeness: COMBINE starts after all runs")


def check_dense(run: Run, step: int, layer: int) -> None:
    """If attention weights are on the host, one DENSE_IN precedes the ATTENTIONs of a layer."""
    copies = run.find(DENSE_IN, step, layer)
    law = f"offload: step {step}, layer {layer} has {len(copies)} DENSE_IN"
    require(len(copies) == run.log.dense_on_host, law, *copies)
    for copy in copies:
        for attention in run.find(ATTENTION, step, layer):
            require_after(attention, copy, "offload: ATTENTION starts after DENSE_IN")


def check_kv(run: Run) -> None:
    """If keys and values are on the host, each ATTENTION has one KV_IN before it (except in step 0,
    where there is nothing yet) and one KV_OUT after it, and there are two buffers for them. Once
    the CPU attends, there are none.
    """
    copies: dict[tuple[int, int, int, int], list[Operation]] = defaultdict(list)
    attentions = []
    for operation in run.live:
        if operation.kind in {KV_IN, KV_OUT}:
            require(run.log.kv_on_host, "offload: keys and values are on the GPU", operation)
            place = operation.step, operation.layer, operation.batch
            copies[operation.kind, *place].append(operation)
        elif operation.kind == ATTENTION and not (run.log.attention_on_cpu and operation.step):
            attentions.append(operation)
    if not run.log.kv_on_host:
        return
    outs: dict[tuple[int, int], Operation] = {}
    for number, attention in enumerate(attentions):
        place = attention.step, attention.layer, attention.batch
        ins, out = copies.pop((KV_IN, *place), []), copies.pop((KV_OUT, *place), [])
        require(len(out) == 1, f"offload: {len(out)} KV_OUT of an ATTENTION", attention, *out)
        require_after(out[0], attention, "offload: KV_OUT starts after its ATTENTION")
        if attention.step == 0:
            empty = len(ins) <= 1 and not any(copy.amount for copy in ins)
            require(empty, "offload: step 0 has no keys and values to copy in", *ins)
        else:
            require(len(ins) == 1, f"offload: {len(ins)} KV_IN of an ATTENTION", attention, *ins)
            require_after(attention, ins[0], "offload: ATTENTION starts after its KV_IN")
            if place[1:] in outs:
                law = "offload: KV_IN starts after the KV_OUT of the step before"
                require_after(ins[0], outs[place[1:]], law)
            if number >= 2:
                law = "offload: KV_IN starts after the ATTENTION before the last, with two buffers"
                require_after(ins[0], attentions[number - 2], law)
        outs[place[1:]] = out[0]
    for stray in copies.values():
        require(not stray, "offload: KV_IN and KV_OUT belong to an ATTENTION", *stray)
