"""llama.cpp's dialects: batches, the pruned last layer, the stride bug, chunks, broken files."""

import struct
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
import pytest

from moesim.errors import TraceError
from moesim.model import ModelSpec
from moesim.traces.format import MISSING
from moesim.traces.importers import load_popularity, load_trace

Array = npt.NDArray[np.int64]

ROWS = "-2,1,3,1\n-1,1,5,0\n-2,2,0,2\n-1,2,7,4\n0,1,3,6\n0,2,2,0\n"


def saved(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows(batch: Array, first: int) -> str:
    """Return a batch (tokens, layers, top_k) as rows from position `first` on, layers from 1."""
    return "".join(
        f"{first + i},{layer + 1},{','.join(map(str, row))}\n"
        for layer in range(batch.shape[1])
        for i, row in enumerate(batch[:, layer].tolist())
    )


def chunk(batch: Array, last: int | None = None) -> bytes:
    """Return a batch (tokens, layers, top_k) as records; of the last layer, so many last tokens."""
    layers = range(batch.shape[1])
    parts = [batch[:, layer] for layer in layers]
    if last is not None:
        parts[-1] = parts[-1][len(batch) - last :]
    return b"".join(
        struct.pack("<iii", layer + 1, len(part), batch.shape[2]) + part.astype("<i4").tobytes()
        for layer, part in enumerate(parts)
        if len(part)
    )


def routing(tokens: int, layers: int, experts: int, top_k: int, seed: int = 0) -> Array:
    """Return the first top_k of random orders of all experts, which are (…, experts)."""
    return orders(tokens, layers, experts, seed)[:, :, :top_k]


def orders(tokens: int, layers: int, experts: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=2)


# Trap 7: the stride bug.


def test_trap_07_a_view_read_as_contiguous_is_refused(tmp_path: Path) -> None:
    full = orders(tokens=10, layers=4, experts=16)
    broken = np.stack(
        [full[:, layer].ravel()[: 10 * 4].reshape(10, 4) for layer in range(4)], axis=1
    )
    assert sorted(broken[:4, 0].ravel().tolist()) == [*range(16)]  # the first token's, cut up
    decode = full[0:1, :, :4]  # one token per batch is read rightly

    with pytest.raises(TraceError, match=r"tokens 0..3 share no expert .*\(stride bug\)"):
        load_trace(saved(tmp_path / "a.csv", rows(broken, -10) + rows(decode, 0)), experts=16)
    with pytest.raises(TraceError, match="stride bug"):
        load_trace(saved(tmp_path / "a.bin", chunk(full[:, :, :4]) + chunk(broken)), experts=16)
    good = rows(full[:, :, :4], -10) + rows(decode, 0)
    assert load_trace(saved(tmp_path / "b.csv", good), experts=16).tokens == 11


def test_trap_07_a_few_tokens_without_a_common_expert_are_chance(tmp_path: Path) -> None:
    apart = np.arange(8).reshape(4, 1, 2).repeat(2, axis=1)

    assert load_trace(saved(tmp_path / "a.csv", rows(apart, -4)), experts=8).tokens == 4


# Trap 8: the last layer, computed for the last token only.


@pytest.mark.parametrize("name", ["rows", "chunks", "ranks"])
def test_trap_08_a_short_last_layer_is_filled_or_dropped(tmp_path: Path, name: str) -> None:
    ids = routing(3, 2, 8, 2)
    last = ids[2, 1].tolist()
    content: str | bytes
    if name == "rows":
        content = rows(ids[:, :1], -3) + f"-1,2,{last[0]},{last[1]}\n"
    elif name == "chunks":
        content = chunk(ids, last=1)
    else:  # this tool counts the rows of a short layer from the batch's first token on
        lines = [
            f"prefill,{t},1,{r},{e}" for t in range(3) for r, e in enumerate(ids[t, 0].tolist())
        ]
        lines += [f"prefill,0,2,{r},{e}" for r, e in enumerate(last)]
        content = "phase,token,layer,rank,expert\n" + "\n".join(lines)
    path = saved(tmp_path / "f", content)

    filled = load_trace(path, experts=8)
    dropped = load_trace(path, experts=8, last_layer="drop")

    assert filled.experts[:, 0].tolist() == ids[:, 0].tolist()
    assert filled.experts[:, 1].tolist() == [[MISSING, MISSING], [MISSING, MISSING], last]
    assert "last tokens" in filled.meta["last_layer"]
    assert dropped.layer_ids.tolist() == [1]
    assert dropped.experts[:, 0].tolist() == ids[:, 0].tolist()


def test_trap_08_a_batch_may_lack_the_last_layer_altogether(tmp_path: Path) -> None:
    ids = routing(5, 2, 8, 2)
    path = saved(tmp_path / "f", chunk(ids[:3], last=0) + chunk(ids[3:], last=1))

    trace = load_trace(path, experts=8)

    assert (trace.experts[:4, 1] == MISSING).all()
    assert trace.experts[4, 1].tolist() == ids[4, 1].tolist()


def test_trap_08_a_whole_last_layer_is_not_dropped(data: Path, spec: ModelSpec) -> None:
    trace = load_trace(data / "llama-rows.csv", spec=spec, last_layer="drop")

    assert trace.layer_ids.tolist() == [1, 2]


# Trap 9: no border between tokens.


def test_trap_09_pairs_need_top_k_and_whole_tokens(tmp_path: Path) -> None:
    path = saved(tmp_path / "f.csv", "0,3\n0,1\n0,3\n1,2\n1,0\n")

    with pytest.raises(TraceError, match="no border between tokens; say top_k or the model"):
        load_popularity(path)
    with pytest.raises(TraceError, match="layer 0 has 3 rows, which are no tokens of 2 each"):
        load_popularity(path, top_k=2)
    whole = load_popularity(saved(path, "layer,expert\n0,3\n0,1\n1,2\n1,0\n"), top_k=2, experts=5)
    assert whole.counts.tolist() == [[0, 1, 0, 1, 0], [1, 0, 1, 0, 0]]
    assert whole.granularity == "layer_order"
    with pytest.raises(TraceError, match=r"expert\[0\] is 3; legal are 0..2"):
        load_popularity(path, top_k=2, experts=3)


# Trap 10: chunks with cleared memory.


def test_trap_10_every_chunk_is_a_sequence_of_its_own(tmp_path: Path) -> None:
    ids = routing(7, 2, 8, 2)
    path = saved(tmp_path / "f", chunk(ids[:4]) + chunk(ids[4:]))

    trace = load_trace(path, experts=8)

    assert trace.experts.tolist() == ids.tolist()
    assert trace.position.tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert trace.sequence.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert not trace.phase.any()
    assert trace.meta["memory"] == "cleared before every sequence"
    later = load_trace(path, experts=8, first_token="drop")
    assert later.position.tolist() == [1, 2, 3, 1, 2]


# Trap 13: records that lack layers.


@pytest.mark.parametrize("name", ["rows", "chunks"])
def test_trap_13_a_layer_with_too_few_rows_is_counted(tmp_path: Path, name: str) -> None:
    ids = routing(4, 3, 8, 2)
    if name == "rows":
        lines = rows(ids[:3], -3).splitlines(keepends=True)
        path = saved(tmp_path / "f", "".join(lines[:4] + lines[5:]) + rows(ids[3:], 0))
    else:
        path = saved(tmp_path / "f", chunk(ids[:3]) + chunk(ids[3:])[:20] + chunk(ids[3:])[40:])

    message = {
        "rows": "pass 0: layer 2 has 2 rows, layer 1 has 3",
        "chunks": "pass 1: layer 2 has 0 rows, layer 1 has 1",
    }
    with pytest.raises(TraceError, match=message[name]):
        load_trace(path, experts=8)


def test_trap_13_layers_that_the_model_has_must_be_there(
    data: Path, spec: ModelSpec, tmp_path: Path
) -> None:
    lines = (data / "llama-rows.csv").read_text().splitlines()
    one_layer = "\n".join(line for line in lines if line.split(",")[1] == "1")

    with pytest.raises(TraceError, match=r"has 1 layers from 1 to 1, top-2; data has 2 with"):
        load_trace(saved(tmp_path / "f", one_layer), spec=spec)


# Trap 15: negative positions.


def test_trap_15_a_prompt_in_batches_keeps_the_order_of_the_file(tmp_path: Path) -> None:
    ids = routing(4, 2, 8, 2)
    # A prompt of 3 with n_batch 2: the second batch is -3, below the first.
    path = saved(tmp_path / "f", rows(ids[:2], -2) + rows(ids[2:3], -3) + rows(ids[3:], 0))

    trace = load_trace(path, experts=8)

    assert trace.experts.tolist() == ids.tolist()
    assert trace.position.tolist() == [0, 1, 2, 3]
    assert trace.phase.tolist() == [0, 0, 0, 1]
    assert trace.sequence.tolist() == [0, 0, 0, 0]


def test_files_put_together_are_sequences(tmp_path: Path, spec: ModelSpec) -> None:
    trace = load_trace(saved(tmp_path / "f", (ROWS + ROWS).replace("\n", "\r\n")), spec=spec)

    assert trace.sequence.tolist() == [0, 0, 0, 1, 1, 1]
    assert trace.position.tolist() == [0, 1, 2, 0, 1, 2]


# Trap 22, and other files that are broken.

RANKS = "phase,token,layer,rank,expert\n"
BROKEN: dict[str, tuple[str | bytes, str]] = {
    "a word": ("-1,1,3,1\n0,1,x,1\n", "line 2 below any header: 'x,1' is no whole number"),
    "a float": ("-1,1,3,1\n0,1,3,1.5\n", "is no whole number"),
    "ragged": ("-1,1,3,1\n0,1,3\n", "the number of columns changed from 4 to 3"),
    "a gap": ("-1,1,3,1\n0,1,,4\n", "could not convert"),
    "a huge id": ("-1,1,3,99999999999999999999\n", "could not convert"),
    "a negative id": ("-1,1,3,-1\n", "expert[0, 1] is -1; legal are 0..65534"),
    "an id beyond": ("-1,1,3,8\n", "experts[0, 0, 1] is 8; legal are 0..7"),
    "an expert twice": ("-1,1,3,3\n", "experts[0, 0] is [3, 3]"),
    "a layer beyond": ("-1,5000,3,1\n", "layer[0] is 5000; legal are 0..1023"),
    "positions jump": ("-1,1,3,1\n0,1,2,1\n2,1,3,4\n", "pos[2] is 2; legal are negative for"),
    "other positions": ("-1,1,3,1\n-2,2,3,4\n", "token[1] is -2; legal are those of the first"),
    "too few rows": ("-1,1,3,1\n-1,0,3,1\n-1,5,0,1\n-1,4,0,1\n-1,3,0,1\n", "4 passes through 5"),
    "ranks without rows": (RANKS, "holds no rows"),
    "ranks of 4 columns": (RANKS + "prefill,0,1,0\n", "has 4 columns; it must have 5"),
    "ranks out of turn": (RANKS + "prefill,0,1,1,3\nprefill,0,1,0,4\n", "rank[0] is 1; legal"),
    "ranks of two tokens": (RANKS + "prefill,0,1,0,3\nprefill,1,1,1,4\n", "token[1] is 1; legal"),
    "tokens jump": (RANKS + "prefill,0,1,0,3\ndecode,2,1,0,3\n", "token[1] is 2; legal are 0, 1"),
    "a phase of numbers": (RANKS + "0,0,1,0,3\n", "0 of 1 rows begin with prefill or decode"),
    "a phase of letters": (RANKS + "warmup,0,1,0,3\n", "'warmup,0,1,0,3' is no whole number"),
    "half a rank": (RANKS + "prefill,0,1,0,3\nprefill,0,1,1,4\nprefill,1,1,0,3\n", "no tokens of"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_table_is_refused(tmp_path: Path, fault: str) -> None:
    content, message = BROKEN[fault]
    path = saved(tmp_path / "f", content)

    with pytest.raises(TraceError, match=r"^[^\n]*$") as caught:
        load_trace(path, experts=8)

    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)


def test_a_broken_record_is_refused(tmp_path: Path) -> None:
    good = chunk(routing(3, 2, 8, 2))
    broken = {
        b"\x01\x00": "byte 72: 2 bytes are no record",
        struct.pack("<iii", 0, 10**9, 8): "byte 72: a record of 1000000000 tokens of 8 experts",
        struct.pack("<iii", 0, -1, 2): "byte 72: a record of -1 tokens",
        struct.pack("<iiii", 0, 1, 1, 3): "legal are 2 experts and 16 bytes",
        struct.pack("<iiiii", -5, 1, 2, 3, 4): "layer[6] is -5",
        struct.pack("<iiiii", 1, 1, 2, 3, -4): "expert[6, 1] is -4",
    }
    for tail, message in broken.items():
        path = saved(tmp_path / "f", good + tail)
        with pytest.raises(TraceError) as caught:
            load_trace(path, experts=8)
        assert message in str(caught.value)


def test_a_table_of_many_layers_and_passes_allocates_little(tmp_path: Path) -> None:
    # Taken at its word: 10 million cells, for passes that lack nearly all of the 1024 layers.
    lines = [f"-1,{layer},0" for layer in range(1024)]
    lines += [f"{i},{1023 - i % 2},0" for i in range(20_000)]

    with pytest.raises(TraceError, match="rows are too few for 10001 passes through 1024 layers"):
        load_trace(saved(tmp_path / "f", "\n".join(lines)), experts=8)


def test_the_models_top_k_must_be_that_of_the_file(data: Path, spec: ModelSpec) -> None:
    wide = msgspec.structs.replace(spec, top_k=3)
    with pytest.raises(TraceError, match="top-2; data has 2 with experts from 1 to 2, top-3"):
        load_trace(data / "llama-rows.csv", spec=wide)
