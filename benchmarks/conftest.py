"""The traces that benchmarks replay."""

from pathlib import Path

import pytest

from moesim.traces.format import write_trace
from moesim.traces.synthetic import synthesize

RECORDED = Path(__file__).resolve().parents[2] / "shared/traces/qwen3-30b-a3b-code.npz"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a made-up trace in the shape of Qwen3-30B-A3B, 5 sequences of 64 + 63 tokens."""
    path = tmp_path_factory.mktemp("traces") / "made.npz"
    write_trace(synthesize(sequences=5, distances=1, width=12, seed=1), path)
    return path


@pytest.fixture(scope="session")
def recorded_or_made(made: Path) -> Path:
    """Return a recorded trace of Qwen3-30B-A3B, which is not part of moesim, or the one above."""
    return RECORDED if RECORDED.exists() else made
