"""Models that run with offloaded experts, against the same models as transformers runs them."""

import copy
import functools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from families import tiny

from moesim.audit import audit
from moesim.errors import InputError, MoesimError, PolicyError, RealError, RecordError
from moesim.model import expert_bytes
from moesim.policies.api import Prediction
from moesim.policies.registry import choose
from moesim.profile import HardwareProfile, load_profile, with_overrides
from moesim.real.emulated import Emulated, Throttle
from moesim.real.generate import NOTHING, Generated, Observed, Request, changes, generate
from moesim.real.guesses import Guesses
from moesim.real.model_forward import ModelForward
from moesim.real.modules import parts_of, placed
from moesim.real.weights import Shape, pack, unpack
from moesim.run import Feed, prepare
from moesim.sim.metrics import summarize
from moesim.traces.format import check
from moesim.traces.recorder import record
from moesim.traces.recorder.routers import find_routers
from moesim.traces.workload import Workload, steps_of
from moesim.types import DECODE, LANES

LAYERS, HIDDEN, WIDTH, TOKENS = 3, 64, 16, 6
FAMILIES = ("mixtral", "qwen3_moe", "deepseek_v2", "olmoe", "gpt_oss")
POLICIES = ("lru", "dali", "fiddler", "static", "moepic", "klotski", "fate")
PROMPTS = [[5, 6, 7, 8, 9], [11, 12, 13]]
EXPERTS_ONLY = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def profile() -> HardwareProfile:
    """Chunks of a few neurons, so that copies are interrupted."""
    return with_overrides(load_profile("rtx3090-pcie4-ddr4")[0], {"link.chunk_bytes": "4000"})


@pytest.fixture
def device() -> Iterator[Emulated]:
    made = Emulated(64 << 20, Throttle(2_000, 1e9))
    yield made
    made.close()


def model_of(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a tiny random model with biases and decided routers, whose experts bfloat16 holds."""
    changes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, **changes}
    if family == "gpt_oss":
        changes["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention"]
        changes["sliding_window"] = 4  # shorter than the sequences
    if not family.startswith("deepseek"):
        changes["head_dim"] = HIDDEN // 4
    net = tiny(family, **changes)
    torch.manual_seed(1)
    with torch.no_grad():
        for router in find_routers(net):
            for parameter in router.module.parameters():
                parameter.normal_(0, 0.3)
        for name, parameter in net.named_parameters():
            if name.endswith(("_bias", "sinks")):
                parameter.normal_(0, 0.3)
            if name.endswith(EXPERTS_ONLY):
                parameter.mul_(5)
                parameter.copy_(parameter.bfloat16())
    return net.to(dtype)


Run = Callable[..., tuple[Generated, list[Any]]]


@pytest.fixture
def run(device: Emulated, profile: HardwareProfile) -> Run:
    """Return a function that generates with a copy of a model, and returns the logits, too."""

    def generated(
        net: Any, policy: str, prompts: Sequence[Sequence[int]] = PROMPTS, *, tokens: int = TOKENS,
        slots: int = 12, bits: int = 16, observed: Observed = NOTHING, **request: Any,
    ) -> tuple[Generated, list[Any]]:  # fmt: skip
        parts = parts_of(copy.deepcopy(net))
        logits: dict[int, Any] = {}
        done = generate(
            parts, device,
            lambda trace, workload: prepare(
                trace, workload, parts.spec, profile, choose(policy),
                budget_bytes=slots * expert_bytes(parts.spec, bits), bits=bits,
            ),
            Request(prompts, tokens, **request), observed=observed,
            watch=lambda step, forward: logits.update({step: forward.logits.clone()}),
        )  # fmt: skip
        assert done.run.log is not None
        audit(done.run.log)
        check(done.trace)
        return done, list(logits.values())

    return generated


@functools.cache
def known(family: str) -> tuple[Any, list[tuple[list[int], list[Any]]]]:
    """Return a model, and what it generates from each of the prompts."""
    net = model_of(family)
    return net, [plainly(net, prompt) for prompt in PROMPTS]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let this thread compute with as many threads as a lane does."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plainly(net: Any, prompt: Sequence[int], **options: Any) -> tuple[list[int], list[Any]]:
    """Return what the model itself generates from a prompt, and the logits of each step."""
    out = net.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        do_sample=False, output_logits=True, return_dict_in_generate=True,
        **{"max_new_tokens": TOKENS, **options},
    )  # fmt: skip
    return out.sequences[0, len(prompt) :].tolist(), [logits[0] for logits in out.logits]


def distance(mine: Any, theirs: Any) -> float:
    """Return how far logits are off, as a share of their norm."""
    return float((mine - theirs).float().norm() / theirs.float().norm())


OFF = LAYERS * 10 * HIDDEN * 2.0**-24
"""How far logits may be off in float32, as a share of their norm.

Both sides add the same products in another order. A sum of n terms is off by at most n u of the sum
of their sizes, u being 2**-24; n is 64 at most (hidden; widths, heads and contexts are smaller). An
MoE layer has some ten operations in a row, each of which passes on what came before and adds its
own, and norms keep the stream from growing. A sixtieth of that is measured.
"""


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_generated_is_what_the_model_generates(run: Run, family: str, policy: str) -> None:
    net, truth = known(family)
    # Only with room for all of them does Fate keep experts at 16 bits.
    done, logits = run(net, policy, slots=30 if policy == "fate" else 12)

    for sequence, (tokens, expected) in enumerate(truth):
        assert done.tokens[sequence] == tuple(tokens)
        off = [distance(logits[step][sequence], expected[step]) for step in range(TOKENS)]
        assert max(off) < OFF
    assert changes(done.run) == []
    result = summarize(done.run)
    assert result["output_tokens"] == 2 * TOKENS
    assert result["run"]["machine"] == "emulated"


@pytest.mark.parametrize("policy", ["on-demand", "lru"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v2", "olmoe"])
@pytest.mark.usefixtures("one_thread")
def test_the_same_kernels_on_the_same_shapes_give_the_same_bits(
    run: Run, family: str, policy: str
) -> None:
    """One row at a time goes through whole experts on the device; a sum of two has one order.

    A kernel of two threads may add in another order: both sides have one here. GPT-OSS is none of
    them: transformers multiplies by matrices that lie the other way round.
    """
    net = model_of(family)
    net.set_experts_implementation("eager")
    _, logits = run(net, policy, [[7]])
    truth = plainly(net, [7])[1]
    assert all(torch.equal(mine[0], own) for mine, own in zip(logits, truth, strict=True))


def test_other_families_run_too(run: Run) -> None:
    for family in ("qwen2_moe", "deepseek_v3", "glm4_moe", "granitemoe", "minimax_m2", "phimoe"):
        net = model_of(family)
        done, _ = run(net, "dali")
        assert [list(tokens) for tokens in done.tokens] == [plainly(net, p)[0] for p in PROMPTS]


def test_padding_on_the_left_gives_the_same(run: Run) -> None:
    net = model_of("mixtral")
    done, _ = run(net, "lru")

    ids = torch.tensor([PROMPTS[0], [0, 0, *PROMPTS[1]]])
    mask = torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    out = net.generate(ids, attention_mask=mask, max_new_tokens=TOKENS, do_sample=False)
    assert out[:, 5:].tolist() == [list(tokens) for tokens in done.tokens]


def test_in_bfloat16_logits_are_as_near_as_it_tells(run: Run) -> None:
    """Ten operations in each layer round to 9 bits; what is added in each of them has 24."""
    net = model_of("deepseek_v2", torch.bfloat16)
    done, logits = run(net, "dali", PROMPTS[:1], tokens=1)
    assert len(done.tokens[0]) == 1
    assert distance(logits[0][0], plainly(net, PROMPTS[0])[1][0]) < LAYERS * 10 * 2.0**-9


def test_packed_experts_are_those_of_a_model_with_packed_experts(run: Run) -> None:
    net = model_of("gpt_oss")
    done, logits = run(net, "lru", PROMPTS[:1], bits=4)

    shape = Shape(HIDDEN, WIDTH)
    for own in parts_of(net).experts:
        for expert in range(8):
            matrices = own.matrices(expert)
            rounded = unpack(pack(*matrices, 4), shape, 4)
            for matrix, value in zip(matrices, rounded, strict=True):
                matrix.copy_(value)
    tokens, truth = plainly(net, PROMPTS[0])
    assert done.tokens == (tuple(tokens),)
    assert changes(done.run) == ["100.0% of the experts' runs were computed from 4 bits"]
    assert max(distance(a[0], b) for a, b in zip(logits, truth, strict=True)) < OFF


def test_what_a_policy_changes_is_said(run: Run) -> None:
    net = model_of("mixtral")
    (mixed,) = changes(run(net, "fate")[0].run)
    assert mixed.endswith("of the experts' runs were computed from 4 bits")
    (late,) = changes(run(net, "ktransformers:deferred=1", slots=3)[0].run)
    assert late.endswith("of the experts' results were added a layer later")


def test_a_sequence_ends_at_a_stop_id_and_the_run_with_the_last_one(run: Run) -> None:
    net = model_of("mixtral")
    first, second = (plainly(net, prompt)[0] for prompt in PROMPTS)
    stop = first[1]
    ends = [own.index(stop) + 1 if stop in own else TOKENS for own in (first, second)]
    done, _ = run(net, "dali", stop=(stop,))

    assert list(map(len, done.tokens)) == ends
    assert done.tokens == (tuple(first[: ends[0]]), tuple(second[: ends[1]]))
    assert len(done.run.heads) == max(ends)
    assert summarize(done.run)["output_tokens"] == sum(ends)
    assert (done.trace.phase == DECODE).sum() == sum(ends) - 2
    feed = done.run.prepared.feed
    assert len(feed.chosen) == len(feed.steps.rows) == feed.steps.offset[-1, -1]

    alone, _ = run(net, "dali", PROMPTS[:1], stop=(stop,))
    assert alone.tokens == (tuple(first[: ends[0]]),)
    assert len(alone.run.heads) == ends[0] < TOKENS


def test_one_token_is_the_prompts_own(run: Run) -> None:
    net = model_of("olmoe")
    done, _ = run(net, "moepic", tokens=1)
    assert done.tokens == tuple((plainly(net, prompt)[0][0],) for prompt in PROMPTS)
    assert (done.trace.phase != DECODE).all()


def test_samples_follow_the_seed(run: Run) -> None:
    net = model_of("qwen3_moe")
    one, again, other = (
        run(net, "lru", temperature=5.0, seed=seed)[0].tokens for seed in (1, 1, 2)
    )
    assert one == again != other
    assert run(net, "lru", temperature=1e-6)[0].tokens == run(net, "lru")[0].tokens


def recorded(net: Any, prompt: Sequence[int], **options: Any) -> Any:
    with record(net, **options) as recorder:
        plainly(net, prompt)
    return recorder


@pytest.mark.parametrize(
    ("policy", "names"),
    [("dali", ["gate1"]), ("moepic", ["gate1"]), ("fate", ["gate1"]),
     ("adapmoe:predictor=gate", ["gate1", "gate2", "gate3"])],
)  # fmt: skip
def test_guesses_and_routing_are_those_that_are_recorded(
    run: Run, policy: str, names: list[str]
) -> None:
    net = model_of("mixtral")
    done, _ = run(net, policy, PROMPTS[:1], slots=30 if policy == "fate" else 12)
    trace = recorded(net, PROMPTS[0], ahead=3).trace()

    assert np.array_equal(done.trace.experts, trace.experts)
    assert done.trace.weights is not None
    assert trace.weights is not None
    assert np.allclose(done.trace.weights, trace.weights, atol=1e-3)
    assert done.trace.token_id is not None
    assert trace.token_id is not None
    assert np.array_equal(done.trace.token_id, trace.token_id)
    prepared = done.run.prepared
    assert list(prepared.predictors) == names[: len(prepared.predictors)]
    for name, (ids, _), one in zip(
        prepared.predictors, prepared.feed.guesses, prepared.placement.predictions, strict=True
    ):
        own = int(name[-1])
        width = min(ids.shape[2], trace.candidates[name].shape[2])
        assert np.array_equal(ids[:, own:, :width], trace.candidates[name][:, own:, :width])
        if one.wraps:
            wrapped = trace.candidates["wrap1"][:, 0].view(np.int16)
            assert np.array_equal(ids[:, 0, :width], wrapped[:, :width])
            assert (ids[5:, 0] >= 0).all()


def test_guesses_are_corrected_by_residuals(run: Run) -> None:
    net = model_of("mixtral")
    means = recorded(net, PROMPTS[1]).mean_inputs
    done, _ = run(net, "dali", PROMPTS[:1], observed=Observed(mean_inputs=means))
    trace = recorded(net, PROMPTS[0], ahead=1, residuals=means).trace()

    assert done.run.prepared.predictors == ("residual1",)
    ids, _ = done.run.prepared.feed.guesses[0]
    assert np.array_equal(ids[:, 1:], trace.candidates["residual1"][:, 1:, : ids.shape[2]])


def test_the_previous_token_is_a_guess(run: Run) -> None:
    done, _ = run(model_of("mixtral"), "dali:predictor=previous", PROMPTS[:1])
    feed = done.run.prepared.feed
    ids, _ = feed.guesses[0]
    assert (ids[:5] < 0).all()
    assert np.array_equal(ids[5:, 1:], feed.chosen[4:-1, 1:])


def test_guesses_before_the_gate_are_made_first_and_none_beyond_the_end(device: Emulated) -> None:
    parts = parts_of(model_of("mixtral"))
    steps = steps_of(Workload(rows=np.arange(4), starts=np.array([0, 4]), prompts=np.array([3])))
    predictions = (
        Prediction("gate2", distance=2), Prediction("gate1", after_gate=False), Prediction("gate1"),
    )  # fmt: skip
    feed = Feed(steps, None, None, ())
    forward = ModelForward(parts, device, steps, np.arange(3))
    guesses = Guesses(forward, predictions, ("gate2", "gate1", "gate1"), feed)
    assert [guesses.made_in(0, layer) for layer in range(LAYERS)] == [[1, 0, 2]] * LAYERS
    assert [guesses.made_in(1, layer) for layer in range(LAYERS)] == [[1, 0, 2], [1, 2], []]


def test_policies_learn_from_a_profile(run: Run) -> None:
    net = model_of("mixtral")
    other = recorded(net, [21, 22, 23, 24], ahead=1).trace()
    done, _ = run(
        net, "static:by=expert,order=popularity", PROMPTS[:1], observed=Observed(profile=other)
    )

    counts = done.run.prepared.setting.popularity
    assert counts.sum() == other.experts.size
    assert done.tokens == (tuple(plainly(net, PROMPTS[0])[0]),)


@pytest.mark.parametrize(
    ("policy", "kind", "said"),
    [
        ("belady", PolicyError, "sees the future"),
        ("pregated", InputError, "predictor oracle, which only guesses in a trace"),
        ("dali:predictor=transition", InputError, "residual1"),
        ("dali:predictor=residual1", InputError, "need mean router inputs"),
        ("moe-lightning", PolicyError, "keys and values on the host"),
        ("flexgen:dense=host", PolicyError, "weights outside the experts on the host"),
    ],
)
def test_policies_that_cannot_are_refused(
    run: Run, policy: str, kind: type[MoesimError], said: str
) -> None:
    with pytest.raises(kind, match=said) as caught:
        run(model_of("mixtral"), policy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        ("granitemoe", {"residual_multiplier": 0.5}, "computes otherwise than"),
        ("granitemoe", {"logits_scaling": 2.0}, "computes otherwise than"),
        ("gemma4_text", {"layer_types": ["full_attention"] * 3}, "with more than the stream"),
        ("qwen3_next", {"num_hidden_layers": 4}, "has no self_attn"),
        ("llama4_text", {"num_hidden_layers": 4}, "do not say what it is made of"),
    ],
)
def test_models_that_cannot_be_divided_are_refused(
    run: Run, family: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(RealError, match=said):
        run(model_of(family, **changes), "lru")


def test_a_dense_model_is_refused(run: Run) -> None:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    with pytest.raises(RecordError, match="no MoE block"):
        run(transformers.LlamaForCausalLM(config), "lru")


def test_what_modules_raise_is_one_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    net = model_of("mixtral")
    monkeypatch.setattr(type(net), "get_output_embeddings", lambda _: None)
    with pytest.raises(RealError, match="cannot be run in parts: TypeError") as caught:
        run(net, "lru")
    assert "\n" not in str(caught.value)


def test_experts_that_do_more_than_their_products_are_refused(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model_of("mixtral")
    kind = type(net.model.layers[0].mlp.experts)
    once = kind.forward
    monkeypatch.setattr(kind, "forward", lambda *given: 2 * once(*given))
    with pytest.raises(RealError, match="experts do otherwise"):
        run(net, "lru")


def test_the_model_leaves_the_device_when_nothing_reads_it_any_more(device: Emulated) -> None:
    parts = parts_of(model_of("mixtral"))
    own = parts.net.lm_head.weight
    home = own.data_ptr()
    began, seen = threading.Event(), []

    def read() -> None:
        began.set()
        time.sleep(0.05)
        seen.append(own.data_ptr())

    with placed(parts, device):
        place = own.data_ptr()
        device.lanes["gpu"].submit(read)
        began.wait()
    assert seen == [place]
    assert own.data_ptr() == home != place


def test_afterwards_the_device_is_empty_and_works_again(
    run: Run, device: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = model_of("mixtral")
    with monkeypatch.context() as patched:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        patched.setattr("moesim.real.model_forward.ModelForward.head", stop)
        with pytest.raises((KeyboardInterrupt, RealError)):
            run(net, "dali")
    assert device.taken_bytes == 0
    assert all(lane.error is None and not lane.busy for lane in device.lanes.values())
    assert set(device.lanes) == set(LANES)
    assert run(net, "dali")[0].tokens[0] == tuple(plainly(net, PROMPTS[0])[0])
