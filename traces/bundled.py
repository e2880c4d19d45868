r"""The trace that ships with moesim. Made up by the generator, in the shape of Qwen3-30B-A3B:

moesim trace synth -o traces/data/example.npz --preset qwen3-30b --sequences 5 --prompt 64 \
    --generate 64 --distances 1 --width 12 --seed 1
"""

from importlib.resources import files
from pathlib import Path


def example_path() -> Path:
    """Return where the bundled trace lies."""
    return Path(str(files("moesim.traces") / "data" / "example.npz"))
