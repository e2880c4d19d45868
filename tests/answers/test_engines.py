"""Flags of engines: the layers and experts they name are those that the budget holds."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moesim.answers.engines import (
    STREAMED,
    deferrable,
    ktransformers,
    layers_on_cpu,
    llama_cpp,
    numbers,
    override,
    settings_for,
)
from moesim.model import expert_bytes, load_model

QWEN, DEEPSEEK = load_model("qwen3-30b-a3b"), load_model("deepseek-v2-lite")
LAYER = 128 * expert_bytes(QWEN)
"""Bytes of the experts of one layer of Qwen3-30B-A3B, which has 48."""


def test_llama_cpp_by_hand() -> None:
    """Room for 17 layers and a bit: 31 stay on the CPU, layers 0 to 30."""
    found = llama_cpp(QWEN, 16, 17 * LAYER + 5, context=4096, batch=1, threads=16, prompt=512)
    assert found.flags == "-ngl 99 -c 4096 -t 16 --n-cpu-moe 31"
    assert found.policy == "static"
    assert (found.prefill_policy, found.prefill_bytes) == (STREAMED, 17 * LAYER + LAYER // 128)
    assert (
        r"-ot 'blk\.([0-9]|1[0-9]|2[0-9]|30)\.ffn_(up|down|gate|gate_up)_exps=CPU'"
        in found.notes[0]
    )


def test_llama_cpp_serves_several_sequences_in_one_context() -> None:
    found = llama_cpp(QWEN, 16, 48 * LAYER, context=1000, batch=4, threads=16, prompt=512)
    assert found.flags == "-ngl 99 -c 4000 -np 4"
    assert found.prefill_policy == "static"
    assert found.notes == ()


def test_short_prompts_copy_nothing() -> None:
    found = llama_cpp(QWEN, 16, 0, context=31, batch=1, threads=16, prompt=31)
    assert found.flags.endswith("--n-cpu-moe 48")
    assert found.prefill_policy == "static"


def test_layers_without_experts_count_as_the_model_counts_them() -> None:
    """DeepSeek-V2-Lite's layer 0 has none: with room for 20 of 26, layers 1 to 6 are on the CPU."""
    budget = 20 * DEEPSEEK.experts * expert_bytes(DEEPSEEK)
    found = llama_cpp(DEEPSEEK, 16, budget, context=4096, batch=1, threads=16, prompt=512)
    assert found.flags.endswith("--n-cpu-moe 7")
    assert override(DEEPSEEK, 6).startswith(r"blk\.([1-6])\.")


@given(st.integers(0, 60 * LAYER))
def test_layers_on_the_cpu_are_those_that_do_not_fit(budget: int) -> None:
    count = layers_on_cpu(QWEN, 16, budget)
    assert 0 <= count <= 48
    assert (48 - count) * LAYER <= budget
    assert count == 0 or (49 - count) * LAYER > budget


@given(st.integers(0, 200), st.integers(0, 200))
def test_a_regular_expression_matches_exactly_the_numbers_between(first: int, last: int) -> None:
    own = re.compile(numbers(first, last))
    assert [n for n in range(250) if own.fullmatch(str(n))] == list(range(first, last + 1))


@pytest.mark.parametrize("name", ["ffn_up_exps", "ffn_gate_exps", "ffn_down_exps"])
def test_tensors_of_the_layers_on_the_cpu_are_overridden(name: str) -> None:
    pattern, _, where = override(QWEN, 31).rpartition("=")
    hit = [n for n in range(48) if re.search(pattern, f"blk.{n}.{name}.weight")]
    assert hit == list(range(31))
    assert where == "CPU"
    assert not re.search(pattern, "blk.3.ffn_gate_inp.weight")
    assert not re.search(pattern, "blk.3.attn_q.weight")


def test_ktransformers_by_hand() -> None:
    """Room for 50 of 128 experts of each layer, and for 47 more, which would not be equal."""
    one = expert_bytes(QWEN)
    found = ktransformers(QWEN, 16, (50 * 48 + 47) * one, threads=12)
    assert found.flags == (
        "--kt-cpuinfer 12 --kt-num-gpu-experts 50 --kt-expert-placement-strategy uniform"
    )
    assert found.policy == found.prefill_policy == "ktransformers"
    assert found.budget_bytes == 50 * 48 * one
    assert not found.changes_results


def test_deferral_is_a_flag_and_changes_results() -> None:
    found = ktransformers(QWEN, 16, 0, threads=12, mask="frequency", deferred=2)
    assert "--kt-max-deferred-experts-per-token 2" in found.flags
    assert "--init-expert-location stats.pt" in found.flags
    assert found.policy == "ktransformers:mask=frequency,deferred=2"
    assert found.changes_results


def test_each_engine_is_tried_in_its_own_ways() -> None:
    def policies(budget: int) -> list[str]:
        found = settings_for(QWEN, 16, budget, context=4096, batch=1, threads=8, prompt=64)
        return [one.policy for one in found]

    assert policies(LAYER) == [
        "static",
        "ktransformers",
        "ktransformers:mask=frequency",
        "ktransformers:mask=frequency,deferred=2",
    ]
    assert policies(48 * LAYER) == ["static"]
    assert [deferrable(k) for k in (1, 2, 4, 8)] == [0, 1, 1, 2]
