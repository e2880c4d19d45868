"""`moesim trace import`, and files of engines where a trace is expected."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from moesim.traces.format import read_trace
from moesim.traces.importers import IMPORTERS

Cli = Callable[..., CompletedProcess[str]]

DATA = Path(__file__).resolve().parents[1] / "traces/data"
MODEL = ("--model", DATA / "config.json")


@pytest.fixture
def complaint(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """Return a function that imports a file in vain and returns the line it ends in."""

    def run(path: Path, *options: object) -> str:
        ended = cli("trace", "import", path, "-o", tmp_path / "t.npz", *options)
        assert ended.returncode == 2
        assert ended.stdout == ""
        assert ended.stderr.count("\n") == 1
        assert not (tmp_path / "t.npz").exists()
        return ended.stderr

    return run


def test_one_line_says_what_was_found(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "t.npz"

    ended = cli("trace", "import", DATA / "vllm-3.json", "-o", out, *MODEL)

    assert ended.stdout == (
        f"{out}: from vllm, 3 tokens (2 prefill, 1 decode), 1 sequence, 2 layers, 8 experts, "
        f"top-2, {out.stat().st_size} bytes\n"
    )
    assert read_trace(out).experts.tolist() == [
        [[3, 1], [0, 2]],
        [[5, 0], [7, 4]],
        [[3, 6], [2, 0]],
    ]


def test_options_reach_the_importer(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "t.npz"
    asked = ("--from", "llama-chunks", "--experts", 8, "--top-k", 2, "--first-token", "drop")

    ended = cli("trace", "import", DATA / "llama-chunks.bin", "-o", out, *asked)

    assert "from llama-chunks, 2 tokens (2 prefill, 0 decode)" in ended.stdout
    assert read_trace(out).position.tolist() == [1, 2]


def test_what_is_missing_names_its_option(complaint: Callable[..., str]) -> None:
    assert "takes --model" in complaint(DATA / "vllm-3.json")
    assert "takes --experts or --model" in complaint(DATA / "llama-rows.csv")
    assert "--cached says nothing of" in complaint(DATA / "llama-rows.csv", "--cached", "keep")
    assert "a popularity" in complaint(DATA / "llama-pairs.csv", *MODEL)


def test_an_unknown_kind_is_answered_by_the_list(complaint: Callable[..., str]) -> None:
    line = complaint(DATA / "vllm-3.json", "--from", "vlm")

    assert "no kind of trace named 'vlm'" in line
    assert all(kind in line for kind in IMPORTERS)


def test_a_trace_is_not_written_over_its_source(cli: Cli, tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_bytes((DATA / "vllm-3.json").read_bytes())

    ended = cli("trace", "import", path, "-o", path, *MODEL)

    assert ended.returncode == 2
    assert "FILE and --output must be different files" in ended.stderr
    assert path.read_bytes() == (DATA / "vllm-3.json").read_bytes()


def test_replay_and_cache_take_files_of_engines(cli: Cli, tmp_path: Path) -> None:
    path, out = DATA / "vllm-3.json", tmp_path / "t.npz"
    cli("trace", "import", path, "-o", out, *MODEL)

    options = ("--policy", "lru", "--cache-ratio", 0.5, "--json")
    direct = json.loads(cli("replay", path, *options, *MODEL).stdout)
    imported = json.loads(cli("replay", out, *options).stdout)
    assert direct["activations"] == imported["activations"]
    assert direct["time_ns"] == imported["time_ns"]

    curves = [
        cli("cache", path, "--sizes", 4, "--json", *MODEL),
        cli("cache", out, "--sizes", 4, "--json"),
    ]
    assert curves[0].stdout == curves[1].stdout
    info = json.loads(cli("trace", "info", out, "--json").stdout)
    assert (info["tokens"], info["decode_tokens"]) == (3, 1)


def test_trace_info_says_how_a_file_becomes_a_trace(cli: Cli) -> None:
    ended = cli("trace", "info", DATA / "vllm-3.json")

    assert ended.returncode == 2
    assert "takes --model" in ended.stderr
    assert cli("trace", "info", DATA / "windows.npz").returncode == 0
