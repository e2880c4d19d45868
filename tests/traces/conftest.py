"""Small traces for tests."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from moesim.traces.format import Trace

MakeTrace = Callable[..., Trace]


@pytest.fixture(scope="session")
def make_trace() -> MakeTrace:
    """Return a maker of valid random traces: lengths of sequences, how much of them is prompt."""

    def make(
        lengths: Sequence[int] = (5, 3),
        prompts: Sequence[int] = (3, 2),
        *,
        layers: int = 3,
        experts: int = 6,
        top_k: int = 2,
        seed: int = 0,
        full: bool = True,
    ) -> Trace:
        rng = np.random.default_rng(seed)
        tokens = sum(lengths)
        order = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=2)
        weights = -np.sort(-rng.random((tokens, layers, top_k)), axis=2)
        extra: dict[str, object] = {}
        if full:
            scores = rng.standard_normal((tokens, layers, top_k + 1)).astype(np.float16)
            extra = {
                "weights": weights.astype(np.float16),
                "token_id": rng.integers(0, 1000, tokens, dtype=np.int32),
                "candidates": {"gate1": order[:, :, : top_k + 1].astype(np.uint16)},
                "candidate_scores": {"gate1": scores},
            }
        position = np.concatenate([np.arange(n) for n in lengths])
        return Trace(
            experts=order[:, :, :top_k].astype(np.uint16),
            layer_ids=np.arange(layers, dtype=np.int32),
            phase=(position >= np.repeat(prompts, lengths)).astype(np.uint8),
            sequence=np.repeat(np.arange(len(lengths)), lengths).astype(np.int32),
            position=position.astype(np.int32),
            meta={"model": "tiny", "num_experts": experts},
            **extra,  # type: ignore[arg-type]
        )

    return make
