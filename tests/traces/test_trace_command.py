import json
import re
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from moesim.cli.trace import command
from moesim.errors import MoesimError
from moesim.traces import bundled
from moesim.traces.format import MISSING, read_trace, write_trace
from moesim.traces.synthetic import synthesize
from moesim.types import DECODE


def test_info_prints_what_decides() -> None:
    trace = read_trace(bundled.example_path())
    decode = int((trace.phase == DECODE).sum())
    result = CliRunner().invoke(command, ["info", str(bundled.example_path())])

    assert result.exit_code == 0
    for words in (
        f"{trace.meta['model']}: {trace.layers} layers, {trace.n_experts} experts, "
        f"top-{trace.top_k}; {trace.tokens} tokens ({trace.tokens - decode} prefill, "
        f"{decode} decode)",
        "guesses: gate1",
        "Hit rate of a cache of so many experts per layer",
        "Experts used again",
        "distinct experts of 16 tokens",
    ):
        assert words in result.output


def test_info_shows_recall_in_80_columns(tmp_path: Path) -> None:
    trace = synthesize("qwen3-30b", layers=9, sequences=1, prompt=8, generate=9, distances=2)
    first = np.where((np.arange(9) == 0)[:, None], trace.experts, MISSING).astype(np.uint16)
    candidates = {**trace.candidates, "router": trace.experts, "wrap1": first}
    write_trace(msgspec.structs.replace(trace, candidates=candidates), tmp_path / "t.npz")

    result = CliRunner().invoke(command, ["info", str(tmp_path / "t.npz")])
    lines = [" ".join(line.split()) for line in result.output.splitlines()]

    assert max(map(len, result.output.splitlines()[2:])) <= 80
    assert "…" not in result.output
    for line in (
        "layers ahead 1 2 3",
        "candidates 8 16 8 16 8 16",
        "wrap, layer 0 1.000 - - - - -",
        "at random 0.062 0.125 0.062 0.125 0.062 0.125",
        "the router itself 1.000",
        "wrap, layer 0 1.000" + " -" * 7,  # by layer
    ):
        assert line in lines
    assert any(re.fullmatch(r"gate( 0\.\d{3}| -){4} - -", line) for line in lines)
    assert "transition-offline learns from other sequences" in " ".join(lines)


def test_info_as_json_is_only_json() -> None:
    result = CliRunner().invoke(command, ["info", "--json", str(bundled.example_path())])
    found = json.loads(result.stdout)

    hits, recall, top_k = found["hit_ratio"], found["recall"], str(found["top_k"])
    size = str(found["experts"] // 4)

    assert found["tokens"] == read_trace(bundled.example_path()).tokens
    assert found["layers"] == len(found["reuse_by_layer"])
    assert 0 < hits["lru"][size] < hits["belady"][size] < 1
    by_name = {name: of["1"]["at"][top_k] for name, of in recall["predictors"].items()}
    assert 1 > by_name["gate"] > by_name["previous"] > recall["chance"][top_k]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["info", "none.npz"], "none.npz: no such file"),
        (["synth", "-o", "x.npz", "--preset", "nope"], "no preset named 'nope'"),
        (["synth", "-o", "x.npz", "--top-k", "900"], "top_k is 900"),
        (["synth", "-o", "none/x.npz", "--layers", "2"], "No such file or directory"),
    ],
)
def test_bad_input_is_an_error_of_ours(words: list[str], message: str) -> None:
    result = CliRunner().invoke(command, words)

    assert isinstance(result.exception, MoesimError)
    assert message in str(result.exception)


@pytest.mark.parametrize("words", [["synth"], ["synth", "-o", "x", "--recall", "2"], ["info"]])
def test_bad_options_exit_with_2(words: list[str]) -> None:
    assert CliRunner().invoke(command, words).exit_code == 2


def test_a_bad_file_ends_the_program_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04 not really")

    ended = subprocess.run(
        [sys.executable, "-c", "from moesim.cli import main; main()", "trace", "info", "t.npz"],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
    )

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(ended.stderr.splitlines()) == 1
    assert "t.npz: no readable " in ended.stderr
