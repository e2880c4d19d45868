import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from moesim.cli.trace import command
from moesim.errors import MoesimError
from moesim.traces import bundled
from moesim.traces.format import read_trace


def test_the_bundled_trace_is_small_and_can_be_made_again(tmp_path: Path) -> None:
    assert bundled.__doc__ is not None
    made = re.search(r"^moesim trace (synth .*?)$", bundled.__doc__.replace("\\\n", ""), re.M)
    assert made is not None
    words = shlex.split(made[1])
    words[words.index("-o") + 1] = str(tmp_path / "again.npz")

    result = CliRunner().invoke(command, words, catch_exceptions=False)
    again, shipped = read_trace(tmp_path / "again.npz"), read_trace(bundled.example_path())

    assert result.exit_code == 0
    assert bundled.example_path().stat().st_size <= 1_000_000
    assert (again.experts == shipped.experts).all()
    assert (again.candidates["gate1"] == shipped.candidates["gate1"]).all()
    assert again.meta == shipped.meta
    assert again.weights is not None
    assert shipped.weights is not None
    # The exponential function may differ in its last bit from machine to machine.
    assert np.abs(again.weights - shipped.weights).max() <= 1 / 256


def test_info_prints_what_decides() -> None:
    result = CliRunner().invoke(command, ["info", str(bundled.example_path())])

    assert result.exit_code == 0
    for words in (
        "qwen3-30b-a3b: 48 layers, 128 experts, top-8; 635 tokens (320 prefill, 315 decode)",
        "guesses: gate1",
        "Hit rate of a cache of so many experts per layer",
        "Experts used again",
        "distinct experts of 16 tokens",
    ):
        assert words in result.output


def test_info_as_json_is_only_json() -> None:
    result = CliRunner().invoke(command, ["info", "--json", str(bundled.example_path())])
    found = json.loads(result.stdout)

    assert found["tokens"] == 635
    assert found["layers"] == len(found["reuse_by_layer"]) == 48
    assert 0 < found["hit_ratio"]["lru"]["32"] < found["hit_ratio"]["belady"]["32"] < 1


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
    assert "t.npz: no readable npz file" in ended.stderr
