"""What is recorded of every family, against the family's own rule and a model without hooks."""

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import families
import numpy as np
import pytest
import torch
from families import FAMILIES, tiny

from moesim.model import spec_from_dict
from moesim.traces.format import MISSING, Trace, check
from moesim.traces.recorder import record
from moesim.types import DECODE, PREFILL

every_family = pytest.mark.parametrize("family", FAMILIES)

NEW = 5
PROMPTS = ([7, 3, 9, 100, 41, 8, 12], [50, 4, 5], [9, 200, 201, 17, 3])


def generate(model: Any, *prompts: list[int]) -> torch.Tensor:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    made: torch.Tensor = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False
    )
    return made


@contextmanager
def router_inputs(model: Any, layers: tuple[int, ...]) -> Iterator[list[list[torch.Tensor]]]:
    """Yield, by layer, the inputs of its router, one per forward pass."""
    seen: list[list[torch.Tensor]] = [[] for _ in layers]
    with ExitStack() as stack:
        for into, layer in zip(seen, layers, strict=True):
            router = families.router_of(model, layer)
            handle = router.register_forward_pre_hook(
                lambda _, args, into=into: into.append(args[0].flatten(0, -2).clone())
            )
            stack.callback(handle.remove)
        yield seen


def rank_ordered(ids: torch.Tensor, weights: torch.Tensor) -> tuple[Any, Any]:
    order = weights.argsort(dim=-1, descending=True, stable=True)
    return ids.gather(1, order).numpy(), weights.gather(1, order).numpy()


@every_family
def test_ids_and_weights_are_those_of_the_familys_rule(family: str) -> None:
    rule, layers = FAMILIES[family].rule, FAMILIES[family].layers
    model = tiny(family)

    with record(model) as recorder, router_inputs(model, layers) as inputs:
        generate(model, PROMPTS[0])
    trace = recorder.trace()

    assert trace.weights is not None
    assert trace.layer_ids.tolist() == list(layers)
    for i, layer in enumerate(layers):
        with torch.no_grad():
            ids, weights = rank_ordered(
                *rule(families.router_of(model, layer), torch.cat(inputs[i]))
            )
        assert (trace.experts[:, i, : ids.shape[1]] == ids).all()
        np.testing.assert_allclose(trace.weights[:, i, : ids.shape[1]], weights, rtol=2e-3)


@every_family
def test_guesses_are_the_guessed_layers_rule_on_earlier_inputs(family: str) -> None:
    rule, layers = FAMILIES[family].rule, FAMILIES[family].layers
    model = tiny(family)
    with record(model, ahead=0) as first:
        generate(model, PROMPTS[1])
    means = first.mean_inputs

    with record(model, residuals=means) as recorder, router_inputs(model, layers) as inputs:
        generate(model, PROMPTS[0])
    trace = recorder.trace()
    every = [torch.cat(layer) for layer in inputs]

    def guessed(target: int, x: torch.Tensor) -> Any:
        with torch.no_grad():
            ids, _ = rule(families.router_of(model, layers[target]), x)
        return np.sort(ids.numpy(), axis=1)

    def found(name: str, target: int, rows: Any = slice(None)) -> Any:
        return np.sort(trace.candidates[name][rows, target, : trace.top_k], axis=1)

    for distance in range(1, len(layers)):
        for target in range(distance, len(layers)):
            source = every[target - distance]
            growth = torch.from_numpy(means[target] - means[target - distance])
            assert (found(f"gate{distance}", target) == guessed(target, source)).all()
            assert (found(f"residual{distance}", target) == guessed(target, source + growth)).all()
        assert (trace.candidates[f"gate{distance}"][:, :distance] == MISSING).all()
    decode = trace.phase == DECODE
    before = every[-1][np.flatnonzero(decode) - 1]
    assert (found("wrap1", 0, decode) == guessed(0, before)).all()
    assert (trace.candidates["wrap1"][~decode] == MISSING).all()
    assert (trace.candidates["wrap1"][:, 1:] == MISSING).all()


@every_family
def test_recording_changes_nothing_and_leaves_nothing(family: str) -> None:
    model, ids = tiny(family), torch.tensor([PROMPTS[0]])

    with torch.no_grad():
        plain, made = model(ids).logits, generate(model, *PROMPTS)
        with record(model):
            recorded, made_again = model(ids).logits, generate(model, *PROMPTS)
        after = model(ids).logits

    assert torch.equal(plain, recorded)
    assert torch.equal(plain, after)
    assert torch.equal(made, made_again)
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@every_family
def test_a_padded_batch_is_recorded_as_its_prompts_one_by_one(family: str) -> None:
    model = tiny(family)
    with record(model) as recorder:
        generate(model, *PROMPTS)
    together = recorder.trace()
    with record(model) as recorder:
        for prompt in PROMPTS:
            generate(model, prompt)
    apart = recorder.trace()

    check(together)
    assert together.layer_ids.tolist() == apart.layer_ids.tolist()
    for sequence, prompt in enumerate(PROMPTS):
        mine, alone = together.sequence == sequence, apart.sequence == sequence
        assert (together.phase[mine] == PREFILL).sum() == len(prompt)
        assert (together.phase[mine] == DECODE).sum() == NEW - 1
        assert together.position[mine].tolist() == list(range(len(prompt) + NEW - 1))
        assert together.token_id is not None
        assert together.token_id[mine][: len(prompt)].tolist() == prompt
        same = slice(None) if FAMILIES[family].pads else slice(len(prompt))
        assert (together.experts[mine][same] == apart.experts[alone][same]).all()
        for name, guesses in together.candidates.items():
            assert (guesses[mine][same] == apart.candidates[name][alone][same]).all()


@every_family
def test_the_trace_says_what_model_it_is_of(family: str) -> None:
    model = tiny(family)
    with record(model) as recorder:
        generate(model, PROMPTS[1])
    trace: Trace = recorder.trace()
    spec = spec_from_dict(trace.meta["spec"])

    assert spec.layer_ids == FAMILIES[family].layers
    assert trace.n_experts == spec.experts + spec.weightless_experts
    assert trace.top_k == spec.top_k
    assert spec.model_type == family


def test_what_ends_a_sequence_is_what_generate_was_told() -> None:
    model = tiny("mixtral")
    ids = torch.tensor([PROMPTS[0][:4], PROMPTS[2][:4]])
    mask = torch.ones_like(ids)
    made = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    stop = int(made[0, 6])
    with record(model) as recorder:
        model.generate(
            ids, attention_mask=mask, max_new_tokens=8, do_sample=False, eos_token_id=stop
        )
    trace = recorder.trace()

    assert trace.token_id is not None
    for sequence, row in enumerate(made.tolist()):
        until = row.index(stop, 4) if stop in row[4:] else len(row) - 1
        assert trace.token_id[trace.sequence == sequence].tolist() == row[:until]


def test_a_loop_over_tokens_is_no_generation() -> None:
    model, tokens = tiny("mixtral"), [7, 3, 100, 9, 41]
    model.generation_config.eos_token_id = 9
    known = inspect.signature(model.forward).parameters  # the argument has had two names
    name = "cache" if "cache" in known else "past_key_values"
    with torch.no_grad(), record(model) as recorder:
        cache = None
        for token in tokens:
            cache = model(torch.tensor([[token]]), **{name: cache}).past_key_values
    trace = recorder.trace()

    assert trace.token_id is not None
    assert trace.token_id.tolist() == tokens
    assert trace.phase.tolist() == [PREFILL] + [DECODE] * 4


def test_a_prompt_in_chunks_is_prefill() -> None:
    model, ids = tiny("mixtral"), torch.tensor([PROMPTS[2]])
    with record(model) as recorder:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, prefill_chunk_size=4
        )

    assert recorder.trace().phase.tolist() == [PREFILL] * 5 + [DECODE] * 2


def test_embeddings_have_no_token_ids() -> None:
    model, ids = tiny("mixtral"), torch.tensor([PROMPTS[0]])
    with record(model) as recorder:
        generate(model, PROMPTS[0])
    plain = recorder.trace()
    with record(model) as recorder, torch.no_grad():
        model.generate(
            inputs_embeds=model.get_input_embeddings()(ids), do_sample=False,
            attention_mask=torch.ones_like(ids), max_new_tokens=NEW,
        )  # fmt: skip
    trace = recorder.trace()

    assert (trace.experts == plain.experts).all()
    assert trace.token_id is not None
    assert (trace.token_id[: len(PROMPTS[0])] == -1).all()
