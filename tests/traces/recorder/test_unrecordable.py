"""Models that are no MoE, or not understood, and calls that cannot be followed."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from families import EXPERTS, HIDDEN, TOP_K, VOCAB, tiny
from torch import Tensor, nn

from moesim.errors import RecordError
from moesim.traces.recorder import record


class Router(nn.Module):  # type: ignore[misc]
    """Top-k of a linear layer; returns what a test wants it to."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(EXPERTS, HIDDEN))

    def forward(self, x: Tensor) -> Any:
        logits = x @ self.weight.T
        weights, ids = logits.softmax(-1).topk(TOP_K)
        return logits, weights, ids


class Experts(nn.Module):  # type: ignore[misc]
    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return x * weights.sum(-1, keepdim=True)


class Block(nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Router(), Experts()

    def forward(self, x: Tensor) -> Tensor:
        _, weights, ids = self.gate(x)
        run: Tensor = self.experts(x, self.executed(ids), weights)
        return run

    def executed(self, ids: Tensor) -> Tensor:
        return ids


class Model(nn.Module):  # type: ignore[misc]
    """A MoE in plain PyTorch, without transformers."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.layers = nn.ModuleList(blocks or [Block(), Block()])
        self.eval()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x: Tensor = self.embed(input_ids).flatten(0, 1)
        for layer in self.layers:
            x = x + layer(x)
        return x


IDS = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6]])


def refusal(model: nn.Module, *args: Any, **options: Any) -> str:
    with pytest.raises(RecordError) as error, record(model, **options):
        model(*(args or (IDS,)))
    message = str(error.value)
    assert "\n" not in message
    assert not any(module._forward_hooks for module in model.modules())
    return message


def test_a_plain_pytorch_moe_is_recorded() -> None:
    model = Model()

    with record(model) as recorder:
        model(IDS)
    trace = recorder.trace()

    chosen = (model.embed(IDS).flatten(0, 1) @ model.layers[0].gate.weight.T).topk(TOP_K)
    assert (trace.experts[:, 0] == chosen.indices.numpy()).all()
    assert trace.sequence.tolist() == [0] * 4 + [1] * 4
    assert (trace.phase == 0).all()
    assert trace.n_experts == EXPERTS


def test_experts_that_run_others_than_were_chosen() -> None:
    class Shifted(Block):
        def executed(self, ids: Tensor) -> Tensor:
            return (ids + 1) % EXPERTS

    message = refusal(Model(Block(), Shifted()))

    assert message.startswith("Model: layers.1 (Router): its experts are given other experts")
    assert "not understood" in message


def test_a_router_that_does_not_repeat_itself() -> None:
    class Fickle(Router):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x + torch.randn_like(x))

    block = Block()
    block.gate = Fickle()

    assert "layers.0 (Fickle): its own recorded input makes it choose" in refusal(Model(block))


def test_an_output_in_which_no_choice_is_found() -> None:
    class Odd(Router):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x)[1:2]

    block = Block()
    block.gate = Odd()
    block.forward = lambda x: x + block.gate(x)[0].sum()  # type: ignore[method-assign]
    message = refusal(Model(block))

    assert "layers.0 (Odd) returns float32 (8, 2), in which no choice among 8 experts" in message


def test_a_router_that_is_bypassed() -> None:
    class Bypassed(Block):
        def forward(self, x: Tensor) -> Tensor:
            _, weights, ids = self.gate.forward(x)
            run: Tensor = self.experts(x, ids, weights)
            return run

    assert "1 of 2 routers were not called" in refusal(Model(Block(), Bypassed()))


def test_a_router_that_is_called_twice() -> None:
    block = Block()

    assert "was called twice" in refusal(Model(block, block))


@pytest.mark.parametrize(
    ("family", "config", "words"),
    [
        ("llama", {"intermediate_size": 16}, "no MoE block in LlamaForCausalLM"),
        (
            "jetmoe",
            {"num_local_experts": 4, "kv_channels": 8, "intermediate_size": 16},
            "are layers 0 and 0",
        ),
    ],
)
def test_families_without_one_router_per_layer(
    family: str, config: dict[str, Any], words: str
) -> None:
    shape = transformers.AutoConfig.for_model(
        family, vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, **config,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(shape).eval()

    assert words in refusal(model)


def test_a_model_in_training_mode() -> None:
    assert "call model.eval() first" in refusal(Model().train())


def test_a_config_that_says_something_else() -> None:
    model = tiny("mixtral")
    model.config.num_local_experts = 4

    assert "its config says 4 experts" in refusal(model, IDS)


def test_a_model_that_was_not_called() -> None:
    with pytest.raises(RecordError, match="nothing was recorded"), record(Model()):
        pass


def test_a_pass_that_does_not_go_on_where_the_last_one_ended() -> None:
    model, step = tiny("mixtral"), torch.tensor([[7], [8]])
    with torch.no_grad():
        cache = model(IDS, use_cache=True).past_key_values
        with pytest.raises(RecordError, match="2 sequences with 4 tokens before it"), record(model):
            model(step, past_key_values=cache)


@pytest.mark.parametrize("options", [{"ahead": -1}, {"width": 0}])
def test_options_out_of_range(options: dict[str, int]) -> None:
    assert "legal are" in refusal(Model(), **options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_beams": 3}, "beams"),
        ({"use_cache": False}, "use_cache=False"),
        ({"prompt_lookup_num_tokens": 2}, "speculation"),
        ({"stopping_criteria": [lambda ids, scores: False]}, "stopping criteria"),
    ],
)
def test_generation_that_cannot_be_followed(options: dict[str, Any], words: str) -> None:
    model = tiny("mixtral")

    with pytest.raises(RecordError, match=words), record(model):
        model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=2, **options)
    assert "generate" not in vars(model)


def test_residuals_of_another_shape() -> None:
    assert "(2, hidden)" in refusal(Model(), residuals=np.zeros((3, HIDDEN), np.float32))
