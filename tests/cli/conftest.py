"""The command line in this process, and a small trace that brings its model along."""

import sys
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import msgspec
import pytest

from moesim.cli import main
from moesim.model import GroupedQuery, ModelSpec, spec_to_dict
from moesim.traces.format import write_trace
from moesim.traces.synthetic import synthesize

Cli = Callable[..., CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _not_calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Return a function that runs `moesim` with the words it is given."""

    def run(*words: object) -> CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["moesim", *map(str, words)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return CompletedProcess(sys.argv, ended.value.code, out, err)

    return run


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a trace of 3 sequences of 6 + 4 rows, 4 layers of 16 experts, and its own model."""
    spec = ModelSpec(
        name="small",
        model_type="mixtral",
        hidden_layers=4,
        layer_ids=(0, 1, 2, 3),
        experts=16,
        top_k=2,
        hidden=512,
        expert_width=256,
        shared_width=0,
        dense_width=0,
        vocab=1000,
        attention=GroupedQuery(heads=4, kv_heads=4, head_dim=64),
    )
    trace = synthesize(
        "qwen3-30b",
        layers=4,
        experts=16,
        top_k=2,
        sequences=3,
        prompt=6,
        generate=5,
        distances=1,
    )
    path = tmp_path_factory.mktemp("small") / "small.npz"
    meta = {**trace.meta, "model": "small", "spec": spec_to_dict(spec)}
    write_trace(msgspec.structs.replace(trace, meta=meta), path)
    return path
