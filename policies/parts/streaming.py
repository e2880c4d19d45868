"""Streaming whole layers through the GPU, whatever the router chooses."""

from moesim.costs import Costs
from moesim.policies.api import Plan, Setting, View, fetch, gate_after, run_on_gpu


def stream_layer(view: View, plan: Plan, layer: int) -> None:
    """Fetch of all experts of a layer what is not on the GPU or on its way, by id."""
    for expert in range(len(view.loads)):
        fetch(plan, layer, expert)


def stream_ahead(view: View, plan: Plan) -> None:
    """Fetch the next layer behind this one, of which nothing is left to fetch but at the start."""
    stream_layer(view, plan, view.layer)
    if view.layer < len(view.cached) - 1 or view.last_step == 0:
        stream_layer(view, plan, view.layer + 1)


def await_layer(view: View, plan: Plan) -> None:
    """Let the gates wait for the last copy of this layer: it runs when it is there as a whole.

    So inactive experts are copied, too: nothing is taken back once the router has chosen.
    """
    for expert in range(len(view.loads) - 1, -1, -1):
        if view.staged[view.layer, expert] > 0:
            gate_after(plan, expert)
            return


def run_by_id(view: View, plan: Plan) -> None:
    """Run every active expert on the GPU, by id: the order in which they arrive."""
    for expert in range(len(view.loads)):
        if view.loads[expert] > 0:
            run_on_gpu(plan, expert)


def buffer_notices(name: str, buffers: int, layer: int) -> tuple[str, ...]:
    """Say so if the buffers do not hold what is streamed of one layer."""
    if buffers >= layer:
        return ()
    return (
        f"{name} streams {layer} experts of a layer through buffers for {buffers}; those that the "
        "router leaves out are not copied then, unless they came first",
    )


def mean_lengths(setting: Setting) -> tuple[float, float]:
    """Return how many tokens a sequence has in its prompt and generates, on average."""
    generated = (setting.kv_tokens - setting.step_tokens) / setting.sequences + 1
    return setting.step_tokens / setting.sequences, max(1.0, generated)


def pass_ns(costs: Costs, precision: int, experts: int, top_k: int, tokens: int) -> int:
    """Return what the experts of one layer take for so many tokens of one batch, spread evenly."""
    routed = tokens * top_k
    active = min(experts, routed)
    load = -(-routed // active)
    return active * int(costs.expert_gpu_ns[precision, load])
