"""`moesim replay`: what it prints and writes, and what its options change."""

import csv
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

from moesim.model import expert_bytes, load_model
from moesim.traces.bundled import example_path
from moesim.traces.format import MISSING, Trace, read_trace
from moesim.traces.importers import load_trace

Cli = Callable[..., CompletedProcess[str]]

ONE = 6 * 512 * 256
"""Bytes of one expert of the small trace's model, of which there are 64."""


@pytest.fixture
def result(cli: Cli) -> Callable[..., dict[str, Any]]:
    """Return a function that replays and gives the results, `run.wall_s` taken out."""

    def run(*words: object) -> dict[str, Any]:
        ended = cli("replay", "--json", *words)
        assert ended.returncode == 0, ended.stderr
        found: dict[str, Any] = json.loads(ended.stdout)
        assert found["run"].pop("wall_s") >= 0
        return found

    return run


def program(*words: object, **environment: str) -> CompletedProcess[str]:
    """Replay in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", "from moesim.cli import main; main()", "replay", *map(str, words)],
        env={**os.environ, **environment},
        check=True,
        capture_output=True,
        text=True,
    )


def notes(ended: CompletedProcess[str]) -> list[str]:
    """Return the notes on stderr, on which there is nothing else, but for the machine's."""
    lines = ended.stderr.splitlines()
    assert all(line.startswith("note: ") for line in lines)
    found = [line.removeprefix("note: ") for line in lines]
    return [line for line in found if not line.startswith("machine ")]


def used(trace: Trace, rows: slice) -> int:
    """Count the distinct experts of each layer over some rows of a trace, summed over layers."""
    ids = trace.experts[rows]
    return sum(
        len(set(ids[:, layer].ravel().tolist()) - {MISSING}) for layer in range(trace.layers)
    )


# The screen.


def test_without_arguments_the_bundled_trace_is_replayed() -> None:
    ended = program()
    lines = ended.stdout.splitlines()

    words = lines[0].split()
    assert float(words[0]) > 0
    assert words[1] == "tokens/s"
    for name, unit in (("TTFT", "ms"), ("TPOT", "ms"), ("(p99", "ms)")):
        number, followed = words[words.index(name) + 1 :][:2]
        assert float(number) > 0
        assert followed == unit
    assert "of the time the GPU" in lines[1]
    assert all(len(line) <= 80 for line in lines)
    assert any("tiny-mixtral, experts in 16 bit" in line for line in lines)
    assert any("1 sequence, 64 prompt + 65 generated tokens" in line for line in lines)
    assert any("100% datasheet" in line for line in lines)
    assert [note.partition(":")[0] for note in notes(ended)] == [
        "hardware",
        "budget 72.00 MiB, 100% of all experts",
    ]
    assert "try --cache-ratio 0.25" in notes(ended)[1]


@pytest.mark.parametrize("policy", ["lru", "static", "dali"])
@pytest.mark.parametrize("columns", [80, 100, 160])
def test_the_screen_fits_the_terminal(
    policy: str, columns: int, cli: Cli, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    text = cli("replay", small, "--policy", policy, "--batch", 3, "--cache-ratio", 0.5).stdout
    lines = text.splitlines()

    assert all(len(line) <= columns for line in lines)
    assert "tokens/s in all" in lines[0]
    assert "…" not in text
    for words in ("Time", "Experts run", "Link", "Busy: gpu", "3 sequences, 18 prompt + 15"):
        assert words in text


def test_a_prefill_alone_has_no_tpot(
    cli: Cli, result: Callable[..., dict[str, Any]], small: Path
) -> None:
    words = (small, "--prompt", 4)
    found = result(*words)

    assert "TPOT - (nothing decoded)" in cli("replay", *words).stdout
    assert found["tpot_ms"] is None
    assert found["itl_ms"] == {"p50": None, "p90": None, "p99": None}
    assert found["hit_rate"] is None
    assert found["tokens_per_s"] == pytest.approx(1e3 / found["ttft_ms"])


# The results.


def test_json_is_one_document_that_adds_up(cli: Cli, small: Path) -> None:
    ended = cli("replay", small, "--json", "--cache-ratio", 0.5)
    found = json.loads(ended.stdout)
    trace = read_trace(small)

    assert set(found) >= {
        *("policy", "tokens_per_s", "ttft_ms", "tpot_ms", "makespan_ns", "time_ns"),
        *("activations", "link_bytes", "lanes", "provenance", "run"),
    }
    assert found["policy"] == "dali"
    assert all(type(ns) is int and ns >= 0 for ns in found["time_ns"].values())
    assert sum(found["time_ns"].values()) == found["makespan_ns"]

    outcomes = dict(found["activations"])
    total = outcomes.pop("total")
    assert set(outcomes) == {"resident", "arrived", "late", "fetched", "cpu"}
    assert sum(outcomes.values()) == total
    assert total == used(trace, slice(0, 6)) + sum(
        used(trace, slice(row, row + 1)) for row in range(6, 10)
    )
    assert sum(found["activations_by_token"].values()) == 10 * 4 * 2
    by_phase = found["activations_by_phase"]
    assert {k: by_phase["prefill"][k] + by_phase["decode"][k] for k in outcomes} == outcomes
    assert sum(by_phase["prefill"].values()) == used(trace, slice(0, 6))
    assert found["hit_rate"] == pytest.approx(
        (by_phase["decode"]["resident"] + by_phase["decode"]["arrived"]) / (4 * 4 * 2)
    )

    assert all(type(size) is int and size >= 0 for size in found["link_bytes"].values())
    assert set(found["lanes"]) == {"gpu", "cpu", "h2d", "d2h", "disk"}
    assert all(0 <= share <= 1 for share in found["lanes"].values())
    assert sum(found["provenance"].values()) == pytest.approx(1)
    run = found["run"]
    assert run["layer_steps"] == 5 * 4
    assert run["machine"] in ("simpy", "compiled")
    assert run["trace"] == trace.digest()
    assert all(len(run[key]) == 16 for key in ("trace", "model_digest", "hardware_digest"))
    assert run["wall_s"] > 0
    assert found["tokens_per_s"] == pytest.approx(5e9 / found["makespan_ns"])
    assert found["ttft_ms"] + 4 * found["tpot_ms"] == pytest.approx(found["makespan_ns"] / 1e6)


def test_several_sequences_are_steps_together(
    result: Callable[..., dict[str, Any]], small: Path
) -> None:
    found = result(small, "--batch", 2, "--cache-ratio", 0.5)
    trace = read_trace(small)
    first, second = (np.flatnonzero(trace.sequence == number) for number in (0, 1))
    steps = [[*first[:6], *second[:6]], *([first[row], second[row]] for row in range(6, 10))]

    total = 0
    for rows in steps:
        for layer in range(4):
            total += len(np.unique(trace.experts[rows, layer]))
    assert found["activations"]["total"] == total
    assert found["output_tokens"] == 10
    assert found["sequences"] == 2


def test_the_bundled_trace_counts_as_many_experts_as_it_names(
    result: Callable[..., dict[str, Any]],
) -> None:
    found = result("--generate", 5)
    trace = read_trace(example_path())

    assert found["activations"]["total"] == used(trace, slice(0, 64)) + 4 * 8 * 2
    assert found["run"]["model"] == "tiny-mixtral"
    assert found["prefetch"]["predictors"] == ["residual1"]


def test_missing_ids_are_no_activations(
    cli: Cli, result: Callable[..., dict[str, Any]], small: Path, tmp_path: Path
) -> None:
    with np.load(small) as file:
        arrays = dict(file)
    arrays["experts"][7, 2, 1] = MISSING
    arrays["experts"][8] = MISSING
    np.savez(tmp_path / "holes.npz", **arrays)

    whole, holed = result(small), result(tmp_path / "holes.npz")

    assert whole["activations"]["total"] - holed["activations"]["total"] == 1 + 4 * 2
    assert sum(holed["activations_by_token"].values()) == 10 * 4 * 2 - 9


def test_same_inputs_give_the_same_bytes(small: Path, tmp_path: Path) -> None:
    config = {"XDG_CONFIG_HOME": str(tmp_path)}
    texts = [
        program(
            *(small, "--json", "--batch", 3, "--jitter", 0.1, "--timeline", tmp_path / f"{seed}"),
            PYTHONHASHSEED=seed,
            **config,
        ).stdout
        for seed in ("1", "2")
    ]
    same = ["\n".join(x for x in text.splitlines() if '"wall_s"' not in x) for text in texts]

    assert same[0] == same[1]
    assert same[0] != texts[0]
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()


def test_recording_changes_no_result(
    result: Callable[..., dict[str, Any]], small: Path, tmp_path: Path
) -> None:
    assert result(small) == result(small, "--timeline", tmp_path / "t.json.gz")


# The table of steps.


@pytest.mark.parametrize("policy", ["dali", "lru", "static"])
def test_the_table_of_steps_adds_up(
    policy: str, result: Callable[..., dict[str, Any]], small: Path, tmp_path: Path
) -> None:
    words = (small, "--policy", policy, "--batch", 2, "--cache-ratio", 0.3)
    found = result(*words, "--csv", tmp_path / "steps.csv")
    with (tmp_path / "steps.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    phases = [row.pop("phase") for row in table]
    rows = [{key: int(value) for key, value in row.items()} for row in table]

    assert phases == ["prefill", *["decode"] * 4]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [row["tokens"] for row in rows] == [12, 2, 2, 2, 2]
    begins = [0, *(row["end_ns"] for row in rows)]
    for row, begin in zip(rows, begins, strict=False):
        assert row["begin_ns"] == begin
        assert row["duration_ns"] == row["end_ns"] - begin
        assert sum(row[f"{cause}_ns"] for cause in found["time_ns"]) == row["duration_ns"]
    assert sum(row["duration_ns"] for row in rows) == found["makespan_ns"]
    for cause, ns in found["time_ns"].items():
        assert sum(row[f"{cause}_ns"] for row in rows) == ns
    for cause, size in found["link_bytes"].items():
        assert sum(row[f"{cause}_bytes"] for row in rows) == size
    assert rows[0]["duration_ns"] / 1e6 == pytest.approx(found["ttft_ms"])


def test_a_table_is_replaced_whole(cli: Cli, small: Path, tmp_path: Path) -> None:
    table = tmp_path / "steps.csv"
    table.write_text("what was there before")

    assert cli("replay", small, "--csv", table).returncode == 0
    assert table.read_text().startswith("step,phase,tokens,")
    assert [path.name for path in tmp_path.iterdir()] == ["steps.csv"]


# The options.


def test_the_seed_changes_what_dali_begins_with(
    result: Callable[..., dict[str, Any]], small: Path
) -> None:
    words = (small, "--policy", "dali:prefetch=none", "--cache-ratio", 0.5)
    first, again, other = (result(*words, "--seed", seed) for seed in (0, 0, 1))

    assert first == again
    assert other["run"]["seed"] == 1
    assert other["activations_by_phase"]["prefill"] != first["activations_by_phase"]["prefill"]
    static = ["--policy", "static:by=expert", "--cache-ratio", 0.5]
    times = [result(small, *static, "--seed", seed)["time_ns"] for seed in (0, 1)]
    assert times[0] == times[1]


def test_a_ratio_is_a_budget(cli: Cli, result: Callable[..., dict[str, Any]], small: Path) -> None:
    half = result(small, "--cache-ratio", 0.5)

    assert half == result(small, "--budget", 32 * ONE)
    assert half == result(small, "--budget", "24MiB")
    assert half["run"]["budget_bytes"] == 32 * ONE == 24 << 20
    assert half != result(small, "--cache-ratio", 0.25)
    assert "room for 32 of 64 experts" in cli("replay", small, "--cache-ratio", 0.5).stdout


def test_a_budget_for_all_experts_makes_every_one_resident(
    result: Callable[..., dict[str, Any]], small: Path
) -> None:
    found = result(small, "--policy", "static", "--cache-ratio", 1)

    assert found["activations"]["resident"] == found["activations"]["total"]
    assert found["hit_rate"] == found["hit_rate_by_token"] == found["hit_rate_prefill"] == 1
    assert sum(found["link_bytes"].values()) == 0


def test_no_budget_is_fine_where_the_cpu_does_everything(
    result: Callable[..., dict[str, Any]], small: Path
) -> None:
    found = result(small, "--policy", "static", "--budget", 0)

    assert found["activations"]["cpu"] == found["activations"]["total"]
    assert found["lanes"]["cpu"] > 0


def test_bits_shrink_what_is_copied(result: Callable[..., dict[str, Any]], small: Path) -> None:
    words = (small, "--policy", "lru", "--cache-ratio", 0.25)
    found = {bits: result(*words, "--bits", bits) for bits in (16, 8, 4)}
    spec = load_model("qwen3-30b-a3b")

    counts = {bits: own["activations"] for bits, own in found.items()}
    assert counts[16] == counts[8] == counts[4]
    for bits, own in found.items():
        assert own["run"]["bits"] == bits
        assert own["link_bytes"]["demand"] * expert_bytes(spec) == pytest.approx(
            found[16]["link_bytes"]["demand"] * expert_bytes(spec, bits)
        )


def test_a_budget_above_the_memory_of_the_gpu_is_noted(cli: Cli, small: Path) -> None:
    ended = cli("replay", small, "--budget", "30GiB")

    assert ended.returncode == 0
    assert any(
        "budget of 30.00 GiB is more than the 24.00 GiB of NVIDIA GeForce RTX 3090" in note
        for note in notes(ended)
    )
    assert any(
        "30.00 GiB is more" in note
        for note in json.loads(cli("replay", small, "--budget", "30GiB", "--json").stdout)[
            "notices"
        ]
    )


def test_windows_longer_than_a_sequence_are_joined_with_a_note(cli: Cli, small: Path) -> None:
    ended = cli("replay", small, "--prompt", 8, "--generate", 5, "--json")
    found = json.loads(ended.stdout)
    trace = read_trace(small)

    assert any("window of 12 tokens is longer than any sequence" in note for note in notes(ended))
    assert found["run"]["layer_steps"] == 5 * 4
    assert found["activations"]["total"] == used(trace, slice(0, 8)) + 4 * 4 * 2


def test_start_skips_sequences(result: Callable[..., dict[str, Any]], small: Path) -> None:
    trace = read_trace(small)
    rows = np.flatnonzero(trace.sequence == 2)
    found = result(small, "--start", 2)

    assert sum(found["activations_by_phase"]["prefill"].values()) == used(
        trace, slice(int(rows[0]), int(rows[0]) + 6)
    )


def test_repeat_serves_tokens_twice_and_says_so(cli: Cli, small: Path) -> None:
    ended = cli("replay", small, "--batch", 5, "--repeat")

    assert ended.returncode == 0
    assert any("served repeatedly" in note for note in notes(ended))


def test_jitter_changes_times_and_can_be_repeated(
    result: Callable[..., dict[str, Any]], small: Path
) -> None:
    def makespan_ns(*words: object) -> int:
        return int(result(small, "--policy", "lru", "--cache-ratio", 0.5, *words)["makespan_ns"])

    calm = makespan_ns()

    assert makespan_ns("--seed", 1) == calm
    assert calm < makespan_ns("--jitter", 0.2) < 1.2 * calm
    assert makespan_ns("--jitter", 0.2) == makespan_ns("--jitter", 0.2)
    assert makespan_ns("--jitter", 0.2) != makespan_ns("--jitter", 0.2, "--seed", 1)


def test_settings_change_the_times(result: Callable[..., dict[str, Any]], small: Path) -> None:
    words = (small, "--policy", "lru", "--cache-ratio", 0.25)
    plain = result(*words)
    slow = result(*words, "--set", "link.h2d.bytes_per_s=1e9")

    assert slow["time_ns"]["wait_weights"] > 5 * plain["time_ns"]["wait_weights"]
    assert slow["activations"] == plain["activations"]
    assert slow["link_bytes"] == plain["link_bytes"]
    assert slow["run"]["hardware_digest"] != plain["run"]["hardware_digest"]


# Where trace, model and machine come from.


def layer_major(path: Path, tokens: int, **meta: object) -> Path:
    """Write a trace as `experts [layers, tokens, top_k]`, in the shape of Qwen3-30B-A3B."""
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(128), (48, tokens, 1)), axis=2)[:, :, :8]
    np.savez(path, experts=ids.astype(np.int16), meta=np.array(json.dumps(meta)))
    return path


def test_a_layer_major_file_and_its_model_with_a_suffix(cli: Cli, tmp_path: Path) -> None:
    meta = {"model": "Qwen3-30B-A3B-Q4_K_M", "num_experts": 128, "window": 4}
    path = layer_major(tmp_path / "k.npz", 12, **meta)
    ended = cli("replay", path, "--policy", "lru", "--json", "--prompt", 6, "--generate", 3)
    found = json.loads(ended.stdout)

    assert found["run"]["model"] == "qwen3-30b-a3b"
    assert found["activations"]["total"] == used(load_trace(path), slice(0, 6)) + 2 * 48 * 8
    assert any("longer than any sequence of the trace (4)" in note for note in notes(ended))
    assert any("no router weights" in note for note in notes(ended))


def test_a_folder_of_the_models_name_is_not_looked_into(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen3-30B-A3B-Q4_K_M").mkdir()
    path = layer_major(tmp_path / "k.npz", 2, model="Qwen3-30B-A3B-Q4_K_M")

    assert cli("replay", path, "--policy", "lru").returncode == 0


def test_the_spec_in_the_trace_is_the_model(
    result: Callable[..., dict[str, Any]], small: Path, tmp_path: Path
) -> None:
    found = result(small, "--policy", "lru", "--cache-ratio", 0.25)
    misses = found["activations"]["fetched"]

    assert found["run"]["model"] == "small"
    assert found["link_bytes"]["demand"] == misses * ONE


def test_a_model_given_goes_before_the_traces(
    result: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    config = json.loads(
        (files("moesim.calibrate") / "models" / "qwen3-30b-a3b.json").read_text(encoding="utf-8")
    )
    folder = tmp_path / "narrow"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"moe_intermediate_size": 384}))
    path = layer_major(tmp_path / "k.npz", 3, model="gpt-2")
    found = result(path, "--model", folder, "--policy", "lru")

    assert found["run"]["model"] == "narrow"
    assert found["link_bytes"]["demand"] == found["activations"]["fetched"] * 6 * 2048 * 384


PRESET = (files("moesim.calibrate") / "profiles" / "a6000-pcie4.yaml").read_text(encoding="utf-8")


def test_hardware_from_a_file(cli: Cli, small: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(PRESET.replace("name: a6000-pcie4", "name: own"))
    ended = cli("replay", small, "--hardware", own, "--budget", "24MiB", "--json")

    assert json.loads(ended.stdout)["run"]["hardware"] == "own"
    assert notes(ended) == []


def test_the_calibrated_profile_is_the_default(cli: Cli, small: Path, tmp_path: Path) -> None:
    own = tmp_path / "config" / "moesim" / "hardware.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(PRESET.replace("name: a6000-pcie4", "name: own"))
    ended = cli("replay", small, "--budget", "24MiB", "--json")

    assert json.loads(ended.stdout)["run"]["hardware"] == "own"
    assert notes(ended) == [f"hardware: this machine's profile, {own}"]


def test_without_one_a_preset_is_taken_with_a_note(cli: Cli, small: Path) -> None:
    ended = cli("replay", small, "--budget", "24MiB", "--json")

    assert json.loads(ended.stdout)["run"]["hardware"] == "rtx3090-pcie4-ddr4"
    assert notes(ended) == [
        "hardware: preset rtx3090-pcie4-ddr4, since this machine is not calibrated"
    ]


def test_experts_that_are_cached_in_fewer_bits_are_shown_so(cli: Cli, small: Path) -> None:
    """Fate keeps 4 bits of what is stored in 16."""
    words = ("replay", small, "--cache-ratio", 0.3)
    assert "experts in 16 bit, cached in 4\n" in cli(*words, "--policy", "fate").stdout
    assert "experts in 4 bit\n" in cli(*words, "--policy", "fate", "--bits", 4).stdout
    assert "experts in 16 bit\n" in cli(*words, "--policy", "lru").stdout
