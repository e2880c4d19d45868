"""The trace that ships with moesim, recorded from a small Mixtral that was trained for it.

A real router in a toy: 8 layers of 16 experts, top-2, 28 million parameters, 4.75 nats per token
on held-out text. 72 sequences of 64 tokens read and 65 generated, nine each of eight kinds of text
(`meta["topics"]`), with every guess that the recorder makes. It was made by

    python examples/tiny_mixtral.py build/tiny-mixtral
    cd build/tiny-mixtral
    moesim record . --prompts prompts.jsonl --calibration-prompts calibration.jsonl \\
        --truncate 64 --generate 65 --temperature 1 --no-token-ids -o example.npz

which gives another trace of the same kind on every machine, since the text is the machine's own.
"""

from importlib.resources import files
from pathlib import Path


def example_path() -> Path:
    """Return where the bundled trace lies."""
    return Path(str(files("moesim.traces") / "data" / "example.npz"))
