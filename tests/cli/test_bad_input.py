"""Bad input is one line that names the thing and what would be legal, and exit code 2."""

import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import numpy as np
import pytest

from moesim.cli import COMMANDS

Cli = Callable[..., CompletedProcess[str]]
Arrays = dict[str, Any]

OLD = b"what was there before\n"


def complaint(ended: CompletedProcess[str]) -> str:
    """Return the one line on stderr that is no note, having checked that there is nothing else."""
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("note: ")]

    assert ended.returncode == 2
    assert ended.stdout == ""
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("moesim: ")
    return lines[0]


@pytest.fixture
def refused(cli: Cli, tmp_path: Path) -> Callable[..., str]:
    """Return a function that replays and gives the complaint; files that exist must survive."""
    folder = tmp_path / "outputs"
    folder.mkdir()
    outputs = {"--csv": folder / "old.csv", "--timeline": folder / "old.json"}
    for path in outputs.values():
        path.write_bytes(OLD)

    def run(*words: object) -> str:
        options = [word for option, path in outputs.items() for word in (option, path)]
        line = complaint(cli("replay", *options, *words))
        assert sorted(folder.iterdir()) == sorted(outputs.values())
        assert all(path.read_bytes() == OLD for path in outputs.values())
        return line

    return run


# Options. `{trace}` is a good trace of 3 sequences of 10 rows, 4 layers of 16 experts.

ONE = 6 * 512 * 256
"""Bytes of one of its experts."""

OPTIONS = {
    "no trace file": ("{dir}/none.npz", ["none.npz", "no such file"]),
    "a directory": ("{dir}", ["is a directory", "npz"]),
    "unknown policy": ("{trace} --policy lruu", ["'lruu'", "there are: adapmoe, all-cpu, "]),
    "no policy name": ("{trace} --policy :x=1", ["policy", "there are: adapmoe, all-cpu, "]),
    "unknown parameter": ("{trace} --policy lru:size=3", ["lru", "'size=3'", "there are: staging"]),
    "parameter without value": ("{trace} --policy lru:staging", ["'staging'", "there are:"]),
    "parameter of a wrong type": (
        "{trace} --policy lru:staging=many",
        ["staging='many'", "whole number >= 0"],
    ),
    "negative parameter": ("{trace} --policy lru:staging=-1", ["staging='-1'", ">= 0"]),
    "parameter that is no number": (
        "{trace} --policy dali:recall=nan",
        ["recall='nan'", "number"],
    ),
    "illegal choice": (
        "{trace} --policy dali:cache=fifo",
        ["cache='fifo'", "window|lru|lfu|static"],
    ),
    "policy file that is not there": (
        "{trace} --policy {dir}/mine.py",
        ["mine.py", "no such file"],
    ),
    "policy list that is not there": (
        "{trace} --policy static:by=expert,order=list,file={dir}/list.json",
        ["list.json", "No such file"],
    ),
    "unknown predictor": ("{trace} --policy dali:predictor=x", ["'x'", "there are: gate1"]),
    "unknown model": ("{trace} --model gpt-2", ["'gpt-2'", "there are: ", "mixtral-8x7b"]),
    "model that does not fit": (
        "{trace} --model mixtral-8x7b",
        ["4 MoE layers of 16 experts, top-2", "mixtral-8x7b has 32 of 8, top-2"],
    ),
    "no config.json": ("{trace} --model {dir}", ["cannot read", "config.json"]),
    "unknown hardware": ("{trace} --hardware abacus", ["'abacus'", "there are: ", "a6000-pcie4"]),
    "no hardware file": ("{trace} --hardware {dir}/x.yaml", ["cannot read", "x.yaml"]),
    "negative budget": ("{trace} --budget -1GiB", ["budget -1GiB", "0 or more", "8GiB"]),
    "absurd budget": ("{trace} --budget 1e30", ["budget 1e30", "8GiB"]),
    "enormous budget": ("{trace} --budget 900000TB", ["budget of 900000", "0..1125899906842624"]),
    "nonsense budget": ("{trace} --budget lots", ["budget lots", "8GiB"]),
    "unknown unit": ("{trace} --budget 8Gb/s", ["budget 8Gb/s", "8GiB"]),
    "budget below one expert": (
        f"{{trace}} --budget {ONE - 1}",
        [f"budget of {ONE - 1} bytes", "holds no expert", f"takes {ONE} bytes"],
    ),
    "ratio below one expert": ("{trace} --cache-ratio 1e-6", ["budget of 50", "holds no expert"]),
    "no budget for lru": ("{trace} --budget 0 --policy lru", ["policy 'lru'", "slot"]),
    "no budget for dali on the GPU": (
        "{trace} --budget 0 --policy dali:assign=gpu",
        ["policy 'dali'"],
    ),
    "budget and ratio": (
        "{trace} --budget 1GiB --cache-ratio 0.5",
        ["budget and cache ratio exclude each other"],
    ),
    "ratio above 1": ("{trace} --cache-ratio 2", ["--cache-ratio", "2.0", "0<=x<=1"]),
    "ratio that is no number": ("{trace} --cache-ratio nan", ["--cache-ratio", "nan", "0<=x<=1"]),
    "jitter that is no number": ("{trace} --jitter nan", ["--jitter", "nan", "0<=x<=1"]),
    "batch too large": ("{trace} --batch 4", ["batch of 4", "holds: 3 sequences"]),
    "no batch": ("{trace} --batch 0", ["--batch", "x>=1"]),
    "longer than everything": (
        "{trace} --prompt 20 --generate 12",
        ["more than the trace holds: 0 windows of 31 tokens"],
    ),
    "generates more than there is": (
        "{trace} --generate 6",
        ["0 sequences that generate 6 tokens"],
    ),
    "start beyond the end": ("{trace} --start 3", ["from start 3", "holds: 3 sequences"]),
    "negative start": ("{trace} --start -1", ["--start", "x>=0"]),
    "bits": ("{trace} --bits 5", ["--bits", "'5'", "'16', '8', '4'"]),
    "machine": ("{trace} --machine abacus", ["--machine", "'abacus'", "'simpy'"]),
    "seed": ("{trace} --seed 9999999999", ["--seed", "0<=x<=2147483647"]),
    "setting without value": ("{trace} --set gpu", ["--set gpu", "key=value"]),
    "unknown setting": (
        "{trace} --set link.h2d.speed=1",
        ["no key link.h2d.speed", "latency_ns, bytes_per_s"],
    ),
    "setting of a section": ("{trace} --set link=1", ["link is a section", "h2d"]),
    "setting out of range": ("{trace} --set gpu.launch_ns=-1", ["gpu.launch_ns", ">= 0"]),
    "setting of a wrong type": ("{trace} --set gpu.launch_ns=soon", ["gpu.launch_ns", "int"]),
    "missing folder for the timeline": (
        "{trace} --timeline {dir}/no/t.json",
        ["t.json", "there is no folder"],
    ),
    "missing folder for the table": ("{trace} --csv {dir}/no/t.csv", ["there is no folder"]),
    "output that is a folder": ("{trace} --csv {dir}", ["--csv", "is a directory"]),
    "output that is a pipe": ("{trace} --csv {dir}/pipe", ["pipe", "no regular file"]),
    "output that is the trace": ("{trace} --csv {trace}", ["TRACE", "different files"]),
    "two outputs in one": (
        "{trace} --csv {dir}/x --timeline {dir}/./x",
        ["--timeline and --csv must be different files"],
    ),
    "unknown option": ("{trace} --cache 3", ["'--cache'", "see moesim replay --help"]),
    "option without value": ("{trace} --policy", ["--policy", "requires an argument"]),
    "two traces": ("{trace} {trace}", ["unexpected extra argument"]),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options(case: str, refused: Callable[..., str], small: Path, tmp_path: Path) -> None:
    words, expected = OPTIONS[case]
    before = small.read_bytes()
    os.mkfifo(tmp_path / "pipe")

    line = refused(*(word.format(trace=small, dir=tmp_path) for word in words.split()))

    assert small.read_bytes() == before
    assert all(text in line for text in expected), line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (
            ["replai"],
            [
                "'replai'",
                f"there are: {', '.join(COMMANDS)}",
            ],
        ),
        (["trace", "show"], ["'show'", "there are: cut, export, import, info, join, synth"]),
        (["--polici"], ["--polici", "see moesim --help"]),
        (["trace", "synth", "-o", "x", "--recall", "nan"], ["--recall", "0<=x<=1"]),
    ],
    ids=" ".join,
)
def test_commands(words: list[str], expected: list[str], cli: Cli) -> None:
    line = complaint(cli(*words))

    assert all(text in line for text in expected), line


def test_a_trace_does_not_replace_a_pipe(cli: Cli, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)

    assert "pipe: is no regular file" in complaint(cli("trace", "synth", "-o", pipe))
    assert pipe.is_fifo()


@pytest.mark.parametrize("words", [[], ["trace"]], ids=str)
def test_no_command_shows_the_commands(words: list[str], cli: Cli) -> None:
    ended = cli(*words)

    assert ended.returncode == 0
    assert "Commands:" in ended.stdout


# Traces.


def changed(name: str, index: tuple[int, ...], value: object) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        array = arrays[name].copy()
        array[index] = value
        return {**arrays, name: array}

    return change


def with_meta(**changes: object) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        meta = {**json.loads(str(arrays["meta"])), **changes}
        kept = {key: value for key, value in meta.items() if value is not None}
        return {**arrays, "meta": np.array(json.dumps(kept))}

    return change


def with_score(score: float) -> Callable[[Arrays], Arrays]:
    def change(arrays: Arrays) -> Arrays:
        scores = np.ones(arrays["candidates_gate1"].shape, np.float16)
        scores[5, 2, 0] = score
        return {**arrays, "candidate_scores_gate1": scores}

    return change


TRACES: dict[str, tuple[Callable[[Arrays], Arrays], list[str]]] = {
    "object arrays": (
        lambda arrays: {**arrays, "experts": arrays["experts"].astype(object)},
        ["experts", "Python objects, which are never loaded"],
    ),
    "wrong dtype": (
        lambda arrays: {**arrays, "experts": arrays["experts"].astype(np.int64)},
        ["experts is int64", "uint16"],
    ),
    "wrong shape": (
        lambda arrays: {**arrays, "phase": arrays["phase"][1:]},
        ["phase has shape (29,)", "(30)"],
    ),
    "ids out of range": (
        changed("experts", (3, 1, 0), 16),
        ["experts[3, 1, 0] is 16", "0..15 and 65535"],
    ),
    "an expert twice": (changed("experts", (3, 1), 7), ["experts[3, 1]", "only once"]),
    "NaN weights": (
        changed("weights", (2, 0, 1), np.nan),
        ["weights[2, 0, 1] is nan", "finite numbers"],
    ),
    "NaN scores": (
        with_score(np.nan),
        ["candidate_scores_gate1[5, 2, 0] is nan", "finite numbers"],
    ),
    "infinite scores": (
        with_score(np.inf),
        ["candidate_scores_gate1[5, 2, 0] is inf", "finite numbers"],
    ),
    "unknown array": (lambda arrays: {**arrays, "colour": np.zeros(3)}, ["no array", "'colour'"]),
    "missing array": (
        lambda arrays: {name: array for name, array in arrays.items() if name != "phase"},
        ["array phase is missing"],
    ),
    "other schema": (
        lambda arrays: {**arrays, "schema": np.array("moesim.trace/9")},
        ["moesim.trace/9", "legal is 'moesim.trace/1'"],
    ),
    "no model": (
        with_meta(model=None, spec=None),
        ["does not say what model", "--model", "mixtral-8x7b"],
    ),
    "unknown model": (
        with_meta(model="gpt-2", spec=None),
        ["'gpt-2'", "--model", "there are: ", "mixtral-8x7b"],
    ),
    "a path for a model": (
        with_meta(model="/etc/passwd.json", spec=None),
        ["'/etc/passwd.json', which is unknown", "--model"],
    ),
    "a model that is no text": (with_meta(model=3), ["meta: model is 3", "string"]),
    "a spec that is no object": (with_meta(spec=[1]), ["meta.spec", "--model"]),
    "a spec with a key missing": (
        with_meta(spec={"name": "x"}),
        ["meta.spec", "missing required field `model_type`", "--model"],
    ),
    "a spec with an unknown key": (
        lambda arrays: with_meta(spec={**json.loads(str(arrays["meta"]))["spec"], "colour": "red"})(
            arrays
        ),
        ["meta.spec", "colour", "--model"],
    ),
    "a spec of another model": (
        lambda arrays: with_meta(
            spec={**json.loads(str(arrays["meta"]))["spec"], "layer_ids": [0, 1, 2]}
        )(arrays),
        ["meta.spec: small", "dense_width"],
    ),
}


def save(path: Path, arrays: Arrays) -> Path:
    np.savez(path, **arrays)
    return path


@pytest.mark.parametrize("case", TRACES)
def test_traces(case: str, refused: Callable[..., str], small: Path, tmp_path: Path) -> None:
    change, expected = TRACES[case]
    with np.load(small) as file:
        arrays = dict(file)

    line = refused(save(tmp_path / "bad.npz", change(arrays)))

    assert all(text in line for text in expected), line


def test_a_truncated_trace(refused: Callable[..., str], small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    bad = tmp_path / "bad.npz"
    for length in (0, 1, 30, len(whole) // 2, len(whole) - 1):
        bad.write_bytes(whole[:length])

        what = "is no kind of trace that is known" if length < 2 else "no readable file"
        assert f"bad.npz: {what}" in refused(bad)


def test_a_file_that_is_no_trace(refused: Callable[..., str], tmp_path: Path) -> None:
    bad = tmp_path / "notes.txt"
    bad.write_text("notes of a trace\n")

    assert "notes.txt: is no kind of trace that is known; there are: moesim (npz" in refused(bad)


def test_ten_gigabytes_stated_in_a_kilobyte(refused: Callable[..., str], tmp_path: Path) -> None:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "<u2", "fortran_order": False, "shape": (10**7, 64, 8)}
    )
    bad = tmp_path / "bomb.npz"
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("experts.npy", header.getvalue() + bytes(64))
        archive.writestr("meta.npy", b"")

    assert bad.stat().st_size < 1024
    line = refused(bad)
    assert "bomb.npz: experts states shape (10000000, 64, 8)" in line
    assert "it has 64" in line


# Models, machines and policies in files.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", ["is not JSON"]),
        ("[]", ["holds an object, not list"]),
        ("{}", ["unknown model_type None", "there are: ", "mixtral"]),
        ('{"model_type": "mixtral"}', ["mixtral needs the key 'num_hidden_layers'"]),
        (
            '{"model_type": "mixtral", "num_hidden_layers": -1}',
            ["'num_hidden_layers'", "an integer from 1 to 1024, not -1"],
        ),
    ],
)
def test_model_files(
    text: str, expected: list[str], refused: Callable[..., str], small: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "config.json"
    bad.write_text(text)

    line = refused(small, "--model", bad)

    assert all(part in line for part in ["config.json", *expected]), line


PRESET = (files("moesim.calibrate") / "profiles" / "a6000-pcie4.yaml").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("gpu: [", ["line 1"]),
        ("- 1\n", ["keys and values"]),
        (PRESET + "colour: red\n", ["unknown key colour", "there are: schema, name"]),
        (PRESET.replace("gpu:\n", "gpu:\n  colour: red\n", 1), ["unknown key gpu.colour"]),
        (PRESET.replace("name: a6000-pcie4", "name: [x]"), ["name", "str"]),
        ("!!python/object/apply:os.abort []\n", ["python/object"]),
    ],
    ids=["broken", "list", "unknown key", "unknown key inside", "wrong type", "code"],
)
@pytest.mark.parametrize("calibrated", [False, True], ids=["--hardware", "calibrated"])
def test_hardware_files(
    text: str,
    expected: list[str],
    calibrated: bool,
    refused: Callable[..., str],
    small: Path,
    tmp_path: Path,
) -> None:
    bad = tmp_path / "config" / "moesim" / "hardware.yaml"
    bad.parent.mkdir(parents=True)
    bad.write_text(text)

    line = refused(small, *([] if calibrated else ["--hardware", bad]))

    assert all(part in line for part in ["hardware.yaml", *expected]), line


POLICY = """
from typing import NamedTuple
import numpy as np
from moesim.policies.api import layer_caches, run_on_cpu

class Mine(NamedTuple):
    @classmethod
    def new(cls, setting):
        return cls()

    def place(self, setting):
        none = np.zeros((setting.layers, setting.experts), np.int64)
        return layer_caches(setting, cached=none, slots=none.sum(axis=1), staging_slots=0)

    def dispatch(self, view, plan):
        for i in range(view.n_active):
            run_on_cpu(plan, view.active[i])
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("raise RuntimeError('boom')", ["RuntimeError: boom"]),
        ("def dispatch(:", ["SyntaxError"]),
        ("x = 1", ["has 0 classes with dispatch", "1 is needed"]),
        (
            POLICY.replace("def place", "def after_layers"),
            ["has no method place"],
        ),
        (
            POLICY + "\n    def after_layers(self, view, plan):\n        pass\n",
            ["after_layers is no hook", "there are: before_attention"],
        ),
        (POLICY.replace("return cls()", "return cls(1)"), ["TypeError"]),
        (POLICY.replace("none = ", "none = 1 / 0 * "), ["ZeroDivisionError"]),
        (POLICY.replace("run_on_cpu(plan,", "missing(plan,"), ["NameError", "mine.py:"]),
        (POLICY.replace("view.n_active", "1"), ["hook dispatch, step 0, layer 0", "left without"]),
        (
            POLICY.replace("view.active[i]", "view.active[0]"),
            ["hook dispatch, step 0, layer 0", "runs once"],
        ),
    ],
    ids=[
        "raises",
        "no Python",
        "no policy",
        "no place",
        "misspelt hook",
        "new raises",
        "place raises",
        "hook raises",
        "forgets an expert",
        "runs one twice",
    ],
)
def test_policy_files(
    text: str, expected: list[str], refused: Callable[..., str], small: Path, tmp_path: Path
) -> None:
    bad = tmp_path / "mine.py"
    bad.write_text(text)

    line = refused(small, "--policy", bad, "--budget", "0")

    assert all(part in line for part in ["mine.py", *expected]), line


def test_the_policy_file_without_its_faults_is_fine(cli: Cli, small: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(POLICY)

    assert cli("replay", small, "--policy", tmp_path / "mine.py", "--budget", 0).returncode == 0


# As a program of its own.


def moesim(*words: object, cwd: Path) -> CompletedProcess[str]:
    code = "from moesim.cli import main; main()"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, cwd=cwd, check=False, capture_output=True, text=True)


@pytest.mark.parametrize("options", [[], ["--json"]], ids=str)
def test_the_program_complains_in_one_line(options: list[str], tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(b"PK\x03\x04 not really")

    assert "t.npz: no readable file" in complaint(moesim("replay", "t.npz", *options, cwd=tmp_path))


def test_a_full_disk_is_one_line(
    cli: Cli, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *args: object, **options: object) -> int:
        raise OSError(28, "No space left on device", str(self))

    old = tmp_path / "steps.csv"
    old.write_bytes(OLD)
    monkeypatch.setattr(Path, "write_text", full)

    assert "steps.csv.part: No space left on device" in complaint(
        cli("replay", small, "--csv", old)
    )
    assert old.read_bytes() == OLD


def test_a_reader_that_leaves_early_is_no_error_to_report(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from moesim.cli import main; main()"
    with os.fdopen(writer, "wb") as gone:
        ended = subprocess.run(
            [sys.executable, "-c", code, "models", "--json"],
            cwd=tmp_path,
            check=False,
            stdout=gone,
            stderr=subprocess.PIPE,
            text=True,
        )

    assert ended.returncode == 1
    assert ended.stderr == ""
