"""`moesim advise`: the answer first, its parts, JSON, and questions that cannot be answered."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest

from moesim.model import expert_bytes, kv_bytes_per_token, load_model

Cli = Callable[..., CompletedProcess[str]]

CONFIG = {
    "model_type": "mixtral",
    "hidden_size": 512,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
}
CONTEXT = 128


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Return the config.json of a model of 4 layers of 8 experts."""
    folder = tmp_path / "tiny-moe"
    folder.mkdir()
    path = folder / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


@pytest.fixture
def ask(cli: Cli, model: Path) -> Callable[..., CompletedProcess[str]]:
    """Return a function that asks about a GPU with room for so many experts."""
    spec = load_model(str(model))
    rest = (1 << 30) + CONTEXT * sum(kv_bytes_per_token(spec))
    outside = 2 * (2 * 1000 * 512 + 4 * (2 * 512 * 64 * 12 + 2 * 512 + 512 * 8) + 512)

    def run(experts: float, *words: object) -> CompletedProcess[str]:
        size = rest + outside + int(experts * expert_bytes(spec))
        return cli(
            "advise", model, "--context", CONTEXT, "--hardware", "rtx3090-pcie4-ddr4",
            "--set", f"gpu.memory_bytes={size}", "--jobs", 1, *words,
        )  # fmt: skip

    return run


def test_the_answer_comes_first(ask: Cli) -> None:
    ended = ask(20.5, "--policies", "lru,hybrimoe")
    assert ended.returncode == 0
    first = ended.stdout.splitlines()[0]
    assert first.startswith("tiny-moe (16 bit) on rtx3090-pcie4-ddr4: ")
    assert "x llama.cpp's --n-cpu-moe" in first
    for part in (
        "recommended", "GPU memory", "20 of 32 (62%) in 16 bit", "Limit: ",
        "Time per token if this took 10 % longer", "Pure bandwidth would say",
        "PCIe one generation up", "memory channels x 2", "GPU memory +8 GiB",
        "-ngl 99 -c 128 -t 16 --n-cpu-moe 2", "--kt-num-gpu-experts 5",
    ):  # fmt: skip
        assert part in ended.stdout
    notes = ended.stderr.splitlines()
    assert notes
    assert all(line.startswith("note: ") for line in notes)
    assert any("made up after statistics of mixtral-8x7b, the nearest" in line for line in notes)


def test_json_is_all_there_is_on_stdout(ask: Cli) -> None:
    ended = ask(20.5, "--policies", "lru", "--policy", "static:by=expert", "--json")
    found: dict[str, Any] = json.loads(ended.stdout)
    assert {
        "moesim": str, "model": str, "model_digest": str, "hardware": str, "hardware_digest": str,
        "context": int, "bits": int, "batch": int, "fits": str, "memory": dict,
        "recommended": dict, "baseline": dict, "candidates": list, "refused": list,
        "limits": dict, "upgrades": list, "naive": dict, "engines": list, "workload": dict,
        "uncertainty": dict, "notices": list,
    } == {key: type(value) for key, value in found.items()}  # fmt: skip
    assert {row["policy"] for row in found["candidates"]} == {"lru", "static:by=expert", "static"}
    assert set(found["recommended"]) >= {
        "policy", "decode_tokens_per_s", "decode_low", "decode_high", "prefill_tokens_per_s",
        "prefill_low", "prefill_high", "speedup", "speedup_low", "speedup_high", "why",
    }  # fmt: skip
    assert set(found["limits"]["slower_by_10_percent"]) == {"gpu", "cpu", "link", "host"}
    assert len(found["upgrades"]) == 4


def test_what_fits_wholly_says_so(ask: Cli) -> None:
    ended = ask(32)
    assert "with all-gpu: the whole model fits on the GPU" in ended.stdout.splitlines()[0]
    assert "32 of 32 (100%) in 16 bit" in ended.stdout
    assert "--n-cpu-moe" not in ended.stdout.partition("llama.cpp: ")[2]


def test_what_does_not_fit_says_what_is_missing(ask: Cli) -> None:
    ended = ask(-1)
    assert ended.returncode == 0
    assert "does not fit; the GPU lacks 0.75 MiB" in ended.stdout
    assert "missing" in ended.stdout
    assert json.loads(ask(-1, "--json").stdout)["recommended"] is None


def test_what_changes_results_is_marked_and_not_recommended(ask: Cli) -> None:
    late = ("--policy", "ktransformers:mask=frequency,deferred=1")
    ended = ask(20.5, *late)
    assert "not exact: experts late" in ended.stdout
    assert "with static" in ended.stdout.splitlines()[0]
    allowed = json.loads(ask(20.5, *late, "--allow-changes", "--json").stdout)
    best = max(allowed["candidates"], key=lambda row: float(row["decode_tokens_per_s"]))
    assert allowed["recommended"]["policy"] == best["policy"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonesuch"], "no model named 'nonesuch'"),
        (["mixtral-8x7b", "--hardware", "abacus"], "no hardware named 'abacus'"),
        (["mixtral-8x7b", "--context", "5"], "context 5 is not in"),
        (["mixtral-8x7b", "--policies", "lruu"], "no policy named 'lruu'"),
        (["mixtral-8x7b", "--set", "gpu.memory"], "write key=value"),
        (["mixtral-8x7b", "--set", "gpu.memory=1"], "no key gpu.memory"),
        (["mixtral-8x7b", "--trace", "nowhere.npz"], "nowhere.npz"),
        (["mixtral-8x7b", "--bits", "3"], "'3' is not one of"),
        (["mixtral-8x7b", "--batch", "0"], "--batch"),
    ],
)
def test_bad_questions_end_in_one_line(cli: Cli, words: list[str], said: str) -> None:
    ended = cli("advise", *words)
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert said in ended.stderr
    assert len(ended.stderr.splitlines()) == 1


def test_a_trace_must_hold_enough(cli: Cli, small: Path) -> None:
    ended = cli("advise", "mixtral-8x7b", "--trace", small)
    assert ended.returncode == 2
    assert "have 10 tokens; more than 24 are needed" in ended.stderr
