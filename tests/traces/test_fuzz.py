"""Whatever bytes a file holds, a reader gives a valid trace or says in one line what is wrong.

Files of every kind are built, then damaged: as bytes, and inside of their containers, so that
checksums do not protect what lies deeper. All cases are drawn from seeds.
"""

import base64
import io
import json
import pickle
import re
import struct
import sys
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest

from moesim.errors import MoesimError
from moesim.model import ModelSpec, load_model, spec_from_dict, spec_to_dict
from moesim.traces.format import MISSING, Trace, check, read_trace
from moesim.traces.importers import IMPORTERS, Popularity, load_popularity, load_trace

CASES = 2000
"""Of all kinds of file together."""

PEAK_FACTOR, PEAK_BYTES = 100, 16 << 20
"""What reading may allocate: so many times the file, and so much for any file."""

GROWTH_BYTES = 200 << 20
"""What the process may grow by in all cases of a file, which counts libraries in C too."""

EXPERTS, TOP_K, LAYERS, HIDDEN_LAYERS = 8, 2, (1, 2), 3
PROMPT, GENERATED = 4, 3
TOKENS = PROMPT + GENERATED - 1


class Seed(NamedTuple):
    """A valid file: its kind, its bytes, and the options that its reader needs."""

    kind: str
    data: bytes
    options: Mapping[str, Any] = MappingProxyType({})


def tiny_spec() -> ModelSpec:
    plain = spec_to_dict(load_model("qwen1.5-moe-a2.7b"))
    shape = {"hidden_layers": HIDDEN_LAYERS, "layer_ids": LAYERS, "dense_width": 8}
    return spec_from_dict({**plain, **shape, "name": "tiny", "experts": EXPERTS, "top_k": TOP_K})


SPEC = tiny_spec()
WITH_SPEC = {"spec": SPEC}


def ids(layers: int = HIDDEN_LAYERS) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Return experts (tokens, layers, top_k); every token of a layer has expert 0 or 1."""
    every = np.tile(np.arange(2, EXPERTS), (TOKENS, layers, 1))
    chosen = np.random.default_rng(0).permuted(every, axis=2)[:, :, :TOP_K]
    chosen[:, :, 0] = np.arange(TOKENS)[:, None] % 2
    return chosen


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def npz(**arrays: Any) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def saved(value: object) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def ours() -> bytes:
    return npz(
        schema=np.array("moesim.trace/1"),
        meta=np.array(json.dumps({"model": "tiny", "num_experts": EXPERTS})),
        experts=ids(2).astype(np.uint16),
        weights=np.full((TOKENS, 2, TOP_K), 0.5, np.float16),
        layer_ids=np.array(LAYERS, np.int32),
        phase=(np.arange(TOKENS) >= PROMPT).astype(np.uint8),
        sequence=np.zeros(TOKENS, np.int32),
        position=np.arange(TOKENS, dtype=np.int32),
        token_id=np.arange(TOKENS, dtype=np.int32),
        candidates_gate1=ids(2).astype(np.uint16),
        candidate_scores_gate1=np.zeros((TOKENS, 2, TOP_K), np.float16),
    )


def windows() -> bytes:
    meta = json.dumps({"model": "tiny", "num_experts": EXPERTS, "window": 4})
    return npz(experts=ids(2).transpose(1, 0, 2).astype(np.int16), meta=np.array(meta))


def vllm(carry: Callable[[Any], Any]) -> bytes:
    usage = {"prompt_tokens": PROMPT, "completion_tokens": GENERATED}
    choice = {"token_ids": [5] * GENERATED, "routed_experts": carry(ids())}
    return json.dumps({"model": "tiny", "choices": [choice], "usage": usage}).encode()


def base64_npy(array: Any) -> str:
    return base64.b64encode(npy(array.astype(np.uint8))).decode()


def shaped(array: Any) -> dict[str, Any]:
    raw = base64.b64encode(array.astype("<i2").tobytes()).decode()
    return {"shape": list(array.shape), "data": raw}


def sglang() -> bytes:
    raw = base64.b64encode(ids().astype("<i4").tobytes()).decode()
    info = {"prompt_tokens": PROMPT, "completion_tokens": GENERATED, "cached_tokens": 1}
    lines = [json.dumps({"text": "", "meta_info": {**info, "routed_experts": raw}})] * 2
    return "\n".join(lines).encode()


def recorded_tokens() -> bytes:
    import torch

    slots = np.full((HIDDEN_LAYERS, TOKENS, 8), -1, np.int32)
    slots[LAYERS, :, :TOP_K] = ids(2).transpose(1, 0, 2)

    def record(first: int, end: int, mode: int) -> dict[str, Any]:
        return {
            "forward_pass_id": first,
            "rank": 0,
            "input_ids": [7] * (end - first),
            "positions": list(range(first, end)),
            "extend_seq_lens": [end - first] if mode == 1 else None,
            "forward_mode": mode,
            "topk_ids_of_layer": torch.from_numpy(slots[:, first:end].copy()),
        }

    steps = [record(n, n + 1, 2) for n in range(PROMPT, TOKENS)]
    return saved({"records": [record(0, PROMPT, 1), *steps], **identity_map()})


def identity_map() -> dict[str, Any]:
    import torch

    return {"last_physical_to_logical_map": torch.arange(EXPERTS).repeat(HIDDEN_LAYERS, 1)}


def recorded_passes() -> bytes:
    import torch

    counts = torch.ones((HIDDEN_LAYERS, EXPERTS), dtype=torch.int32)
    records = [{"forward_pass_id": n, "global_physical_count": counts} for n in range(3)]
    return saved({"records": records, **identity_map()})


def recorded_stat() -> bytes:
    import torch

    return saved({"rank": 0, "logical_count": torch.ones((2, HIDDEN_LAYERS, EXPERTS)).int()})


def llama_rows() -> bytes:
    lines = []
    for token in range(TOKENS):
        for layer, chosen in zip(LAYERS, ids(2)[token].tolist(), strict=True):
            label = token - PROMPT
            lines.append(",".join(map(str, [label, layer, *chosen])))
    return "\n".join(lines).encode() + b"\n"


def llama_ranks() -> bytes:
    lines = ["phase,token,layer,rank,expert"]
    for token in range(TOKENS):
        phase = "prefill" if token < PROMPT else "decode"
        for layer, chosen in zip(LAYERS, ids(2)[token].tolist(), strict=True):
            lines += [f"{phase},{token},{layer},{rank},{e}" for rank, e in enumerate(chosen)]
    return "\n".join(lines).encode() + b"\n"


def llama_pairs() -> bytes:
    rows = [f"{layer},{e}" for layer in LAYERS for e in ids(2)[:, layer - 1].ravel().tolist()]
    return "\n".join(["layer,expert", *rows]).encode()


def llama_chunks() -> bytes:
    records = [
        struct.pack("<iii", layer, TOKENS, TOP_K) + ids(2)[:, at].astype("<i4").tobytes()
        for _ in range(2)
        for at, layer in enumerate(LAYERS)
    ]
    return b"".join(records)


LLAMA = {"experts": EXPERTS}

SEEDS: list[Callable[[], Seed]] = [
    lambda: Seed("moesim", ours()),
    lambda: Seed("windows", windows()),
    lambda: Seed("vllm", vllm(base64_npy), WITH_SPEC),
    lambda: Seed("vllm", vllm(shaped), WITH_SPEC),
    lambda: Seed("vllm", vllm(lambda array: array.tolist()), WITH_SPEC),
    lambda: Seed("vllm", npy(ids().astype(np.int32)), {**WITH_SPEC, "prompt_tokens": PROMPT}),
    lambda: Seed(
        "vllm",
        npz(routed_experts=ids(2), prompt_token_ids=np.arange(PROMPT)),
        WITH_SPEC,
    ),
    lambda: Seed("sglang", sglang(), WITH_SPEC),
    lambda: Seed("sglang-tokens", recorded_tokens(), WITH_SPEC),
    lambda: Seed("sglang-passes", recorded_passes(), WITH_SPEC),
    lambda: Seed("sglang-stat", recorded_stat(), WITH_SPEC),
    lambda: Seed("llama-ranks", llama_ranks(), LLAMA),
    lambda: Seed("llama-rows", llama_rows(), LLAMA),
    lambda: Seed("llama-chunks", llama_chunks(), LLAMA),
    lambda: Seed("llama-pairs", llama_pairs(), {"top_k": TOP_K}),
]

DATA = Path(__file__).resolve().parent / "data"


def golden(path: Path) -> Callable[[], Seed]:
    """Return a maker of the seed of a golden file, which is named after its kind."""
    kind = max((kind for kind in IMPORTERS if path.name.startswith(kind)), key=len)
    return lambda: Seed(kind, path.read_bytes(), WITH_SPEC)


SEEDS += [golden(path) for path in sorted(DATA.glob("*")) if path.name != "config.json"]

Random = np.random.Generator
Mutation = Callable[[bytes, Random], bytes]

NUMBERS = (
    "-1", "0", "1", "7", "8", "255", "65535", "65536", "2147483647", "2147483648", "-2147483649",
    "18446744073709551616", "9" * 400, "1e400", "1.5", "-0", "0x10", "NaN", "null", "true", "",
)  # fmt: skip
INTEGERS = (-1, 0, 1, 8, 255, 65535, 65536, (1 << 31) - 1, -(1 << 31), 1 << 20)


def truncate(data: bytes, rng: Random) -> bytes:
    return data[: rng.integers(len(data) + 1)]


def flip(data: bytes, rng: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.integers(1, 9)):
        changed[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def insert(data: bytes, rng: Random) -> bytes:
    at = int(rng.integers(len(data) + 1))
    filling = (rng.bytes(16), b"\0" * 64, b"[" * 64, b"\n", b",,,", b"\xff\xfe", b"'\"")
    return data[:at] + filling[rng.integers(len(filling))] + data[at:]


def remove(data: bytes, rng: Random) -> bytes:
    at, length = rng.integers(len(data)), rng.integers(1, 40)
    return data[:at] + data[at + length :]


def repeat(data: bytes, rng: Random) -> bytes:
    at, length = rng.integers(len(data)), rng.integers(1, 200)
    return data[: at + length] + data[at : at + length] * int(rng.integers(1, 5)) + data[at:]


def lines(data: bytes, rng: Random) -> bytes:
    """Drop, repeat or exchange lines, or join two."""
    parts = data.splitlines(keepends=True)
    a, b = rng.integers(len(parts), size=2)
    what = rng.integers(4)
    if what == 0:
        del parts[a]
    elif what == 1:
        parts.insert(a, parts[b])
    elif what == 2:
        parts[a], parts[b] = parts[b], parts[a]
    else:
        parts[a] = parts[a].rstrip() + b","
    return b"".join(parts)


def number(data: bytes, rng: Random) -> bytes:
    """Put another number in place of one that is written in digits."""
    found = list(re.finditer(rb"-?\d+", data))
    if not found:
        return flip(data, rng)
    at = found[rng.integers(len(found))]
    return data[: at.start()] + NUMBERS[rng.integers(len(NUMBERS))].encode() + data[at.end() :]


def integer(data: bytes, rng: Random) -> bytes:
    """Put another int32 in place of one at a multiple of four bytes."""
    at = 4 * int(rng.integers(max(1, len(data) // 4)))
    return data[:at] + struct.pack("<i", INTEGERS[rng.integers(len(INTEGERS))]) + data[at + 4 :]


BYTES: tuple[Mutation, ...] = (truncate, flip, insert, remove, repeat, lines, number, integer)


def any_bytes(data: bytes, rng: Random) -> bytes:
    for _ in range(rng.integers(1, 3)):
        if data:
            data = BYTES[rng.integers(len(BYTES))](data, rng)
    return data


HEADERS = (
    "{'descr': '<i4', 'fortran_order': False, 'shape': (1000000, 1000000, 8), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (4294967296, 4294967296, 1), }",
    "{'descr': '<u2', 'fortran_order': True, 'shape': (-1, 2, 2), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (-6, -2, 2), }",
    "{'descr': '<u2', 'fortran_order': False, 'shape': (0, 1000000000000, 2), }",
    "{'descr': '|V0', 'fortran_order': False, 'shape': (1000000000, 2, 2), }",
    "{'descr': '<U0', 'fortran_order': False, 'shape': (1000000000,), }",
    "{'descr': '<U1000000000', 'fortran_order': False, 'shape': (), }",
    "{'descr': '|O', 'fortran_order': False, 'shape': (6, 2, 2), }",
    "{'descr': [('a', '<i4', (99999, 99999)), ('b', '|O')], 'fortran_order': False, 'shape': (1,)}",
    "{'descr': '<m8[ns]', 'fortran_order': False, 'shape': (6, 2, 2), }",
    "{'descr': '>c16', 'fortran_order': False, 'shape': (6, 2, 2), }",
    "{'descr': '<i4', 'fortran_order': 7, 'shape': (6.5, True, None), }",
    "{'descr': '<u2', 'shape': (6, 2, 2)}",
    "{'shape': " + "(" * 90 + ")" * 90 + "}",
    "__import__('os').abort()",
)
"""Of npy files, as no array has them."""


def header(data: bytes, rng: Random) -> bytes:
    """Put a hostile header before the data of an npy file."""
    text = HEADERS[rng.integers(len(HEADERS))].encode()
    version = bytes([rng.integers(1, 5), 0])
    length = struct.pack("<H" if version[0] == 1 else "<I", len(text))
    return b"\x93NUMPY" + version + length + text + data[128:]


DTYPES = ("u1", "i1", "<i2", ">u2", "<u2", "<i4", "<i8", "<u8", "<f4", "<f2", "?", "<U9")
ELEMENTS = np.array([-1, 7, 8, 255, MISSING, np.inf, np.nan, -(2.0**31)])


def other_array(data: bytes, rng: Random) -> bytes:
    """Change dtype, shape or an element of an npy file's array."""
    array = np.load(io.BytesIO(data))
    what = rng.integers(6)
    with np.errstate(all="ignore"):
        if array.dtype.kind == "U" and what < 4:
            array = np.array(damaged(str(array).encode(), rng).decode("utf-8", "replace"))
        elif what == 0:
            array = array.astype(DTYPES[rng.integers(len(DTYPES))])
        elif what == 1:
            array = array.reshape(-1)[: rng.integers(array.size + 1)]
        elif what == 2:
            array = np.repeat(array[None], rng.integers(3), axis=0)
        elif what == 3:
            array = np.asfortranarray(array.T)
        elif what == 4 and array.ndim:
            array = np.concatenate([array] * 3, axis=int(rng.integers(array.ndim)))
        else:
            value = ELEMENTS[rng.integers(len(ELEMENTS))]
            array.flat[rng.integers(array.size)] = value.astype(array.dtype)
    return npy(array)


def any_npy(data: bytes, rng: Random) -> bytes:
    return (header, other_array, any_bytes)[rng.integers(3)](data, rng)


def hostile_value(rng: Random) -> Any:
    """Return what JSON can hold and no reader wants."""
    values: tuple[Any, ...] = (
        None, True, -1, 1 << 70, 1.5, "", "x" * 100, "\ud7ff\n", [], {}, [[]], [[[]]],
        [[[0]], [[0, 1]]], [[[float(0)]]],
        "k05VTVBZ" + "A" * 4000, base64.b64encode(bytes(3000)).decode(), [0] * 500, [[[-2]]],
        {"shape": [1 << 30, 1 << 30, 1 << 30], "data": ""}, {"shape": [-1, 3, 2], "data": "AAAA"},
        {"shape": [0, 0, 0], "data": ""}, base64_npy(np.zeros((1, 1, 1))),
    )  # fmt: skip
    return values[rng.integers(len(values))]


def any_json(data: bytes, rng: Random) -> bytes:
    """Change one value, at any depth, of one document, or its text."""
    if rng.integers(4) == 0:
        return any_bytes(data, rng)
    documents = [json.loads(line) for line in data.splitlines()]
    at: Any = documents
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = keys[rng.integers(len(keys))]
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.8:
            at = at[key]
            continue
        if rng.integers(5) == 0:
            del at[key]
        elif isinstance(at, list) and rng.integers(4) == 0:
            at.append(at[key])
        else:
            at[key] = hostile_value(rng)
        break
    return "\n".join(json.dumps(document) for document in documents).encode()


def any_zip(data: bytes, rng: Random) -> bytes:
    """Change a member of an archive, its name or its method, checksums being right again."""
    if rng.integers(5) == 0:
        return any_bytes(data, rng)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at = int(rng.integers(len(members)))
    name, content = members[at]
    method = zipfile.ZIP_STORED
    what = rng.integers(10)
    if what == 0:
        del members[at]
    elif what == 1:
        other = members[rng.integers(len(members))][0]
        members[at] = (other if rng.integers(2) else "../" + name, content)
    elif what == 2:
        method = (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)[rng.integers(3)]
    elif name.endswith(".npy"):
        members[at] = (name, any_npy(content, rng))
    else:
        members[at] = (name, any_pickle(content, rng))
    stream = io.BytesIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # of equal names
        with zipfile.ZipFile(stream, "w", method) as archive:
            for name, content in members:
                archive.writestr(zipfile.ZipInfo(name), content, compress_type=method)
    return stream.getvalue()


def any_pickle(data: bytes, rng: Random) -> bytes:
    """Change a pickle, or data of its tensors; every fourth time it is one that runs code."""
    if not data.startswith(b"\x80"):
        return (any_bytes, integer)[rng.integers(2)](data, rng)
    what = rng.integers(6)
    if what == 0:
        return pickle.dumps(Harmful())
    if what == 1:
        return b"\x80\x02" + b"]" * 2000 + b"a" * 1999 + b"."
    if what == 2:
        # Small integers are written in a byte or two: sizes, strides and offsets of tensors.
        places = [at for at in range(2, len(data) - 1) if data[at : at + 1] in b"KM"]
        at = places[rng.integers(len(places))]
        return data[: at + 1] + bytes([rng.integers(256)]) + data[at + 2 :]
    if what == 3:
        # The same, as four bytes.
        places = [at for at in range(2, len(data) - 1) if data[at : at + 1] == b"K"]
        at = places[rng.integers(len(places))]
        value = struct.pack("<i", INTEGERS[rng.integers(len(INTEGERS))])
        return data[:at] + b"J" + value + data[at + 2 :]
    return any_bytes(data, rng)


class Harmful:
    """Unpickled, it ends the tests."""

    def __reduce__(self) -> Any:
        return sys.exit, ("a pickle was run",)


def damaged(data: bytes, rng: Random) -> bytes:
    """Return a file's bytes, changed in a way that its form suggests."""
    if data.startswith(b"PK"):
        return any_zip(data, rng)
    if data.startswith(b"\x93NUMPY"):
        return any_npy(data, rng)
    if data[:1] in b"{[":
        return any_json(data, rng)
    return any_bytes(data, rng)


def peak_rss_bytes() -> int:
    """Return the most memory that this process has had, 0 where that is not known."""
    if sys.platform != "linux":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read(path: Path, kind: str, options: Mapping[str, Any], trace: bool = True) -> str | None:
    """Read a file; check what comes of it, or return the message of a refusal."""
    try:
        if kind == "moesim" and trace:
            found: Trace | Popularity = read_trace(path)
        elif trace:
            found = load_trace(path, kind=kind, **options)
        else:
            found = load_popularity(path, kind=kind, **options)
    except MoesimError as error:
        message = str(error)
        assert message.strip()
        assert len(message.splitlines()) == 1, message
        assert len(message) < 2000, message
        return message
    if isinstance(found, Trace):
        check(found)
    else:
        assert found.counts.shape[0] == len(found.layer_ids)
        assert found.counts.dtype == np.int64
        assert (found.counts >= 0).all()
    return None


def read_within_bounds(
    path: Path, kind: str, options: Mapping[str, Any], trace: bool = True
) -> str | None:
    """Do as `read`, and assert how much is allocated meanwhile."""
    tracemalloc.start()
    try:
        message = read(path, kind, options, trace)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < PEAK_FACTOR * path.stat().st_size + PEAK_BYTES
    return message


@pytest.fixture(scope="module", params=range(len(SEEDS)))
def seed(request: pytest.FixtureRequest) -> Seed:
    make: Callable[[], Seed] = SEEDS[request.param]
    return make()


def test_every_kind_has_a_file() -> None:
    assert {make().kind for make in SEEDS} == set(IMPORTERS)


def test_the_files_are_valid(seed: Seed, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(seed.data)

    trace = IMPORTERS[seed.kind].granularity == "token"
    for kind in ("auto", seed.kind):
        assert read(path, kind, seed.options, trace) is None


def test_damaged_files(seed: Seed, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    which = request.node.callspec.params["seed"]
    path = tmp_path / "file"
    before_bytes = peak_rss_bytes()
    trace = IMPORTERS[seed.kind].granularity == "token"
    cases = -(-CASES // len(SEEDS))
    refused = 0
    for case in range(cases):
        data = damaged(seed.data, np.random.default_rng([which, case]))
        path.write_bytes(data)
        kind = ("auto", seed.kind)[case % 2]
        reader = read_within_bounds if case % 8 < 2 else read
        try:
            refused += reader(path, kind, seed.options, trace) is not None
        except BaseException as error:
            error.add_note(f"reading case {case} of file {which} as {kind}: {data[:200]!r}")
            raise

    assert refused > cases / 4
    assert peak_rss_bytes() - before_bytes < GROWTH_BYTES


def bomb(name: str, **arrays: Any) -> bytes:
    """Return an npz with a member of 200 MB of zeros in some 200 kB, and others."""
    stream = io.BytesIO(npz(**arrays))
    text = b"{'descr': '<i2', 'fortran_order': False, 'shape': (2, 25000000, 2), }\n"
    start = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text
    with zipfile.ZipFile(stream, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr(f"{name}.npy", start + bytes(200_000_000))
    return stream.getvalue()


def saved_tensor(make: Callable[[Any], Any]) -> bytes:
    import torch

    return saved({"logical_count": make(torch)})


def itself() -> bytes:
    records: list[Any] = []
    records.append(records)
    return saved({"records": records, **identity_map()})


HOSTILE: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "one byte": lambda: b"\0",
    "zip bomb": lambda: bomb("experts", meta=np.array("{}")),
    "zip bomb of ours": lambda: bomb("experts", schema=np.array("moesim.trace/1")),
    "bomb of a name": lambda: bomb("routed_experts"),
    "deep lists": lambda: b"[" * 1_000_000,
    "deep lists that end": lambda: b"[" * 100_000 + b"]" * 100_000,
    "deep objects": lambda: b'{"choices":' * 100_000,
    "deep meta": lambda: npz(
        experts=np.zeros((1, 1, 1), np.int16), meta=np.array('{"a":' + "[" * 100_000)
    ),
    "many documents": lambda: b"{}\n" * 100_000,
    "many empty lists": lambda: b"[" + b"[]," * 100_000 + b"[]]",
    "long base64": lambda: json.dumps(
        {"choices": [{"routed_experts": "A" * 4_000_000}], "usage": {"prompt_tokens": 3}}
    ).encode(),
    "long base64 of npy": lambda: json.dumps(
        {"choices": [{"routed_experts": "k05VTVBZ" + "A" * 4_000_000}]}
    ).encode(),
    "a number of a million digits": lambda: b"9" * 1_000_000 + b",1,2\n",
    "a line of a million numbers": lambda: b"0" + b",1" * 1_000_000,
    "many lines": lambda: b"0,0\n" * 200_000,
    "a long word": lambda: b"layer " * 500_000,
    "a long number in JSON": lambda: b'{"meta_info":{"prompt_tokens":' + b"9" * 1_000_000 + b"}}",
    "a long string in meta": lambda: npz(
        experts=np.zeros((1, 1, 1), np.int16),
        meta=np.array(json.dumps({"num_experts": "x" * 100_000, "window": "y" * 100_000})),
    ),
    "a long name": lambda: npz(**{"x" * 60_000: np.zeros(1)}),
    "hundreds of names": lambda: npz(**{f"x{n}": np.zeros(1) for n in range(300)}),
    "chunks of 2**31 - 1 tokens": lambda: struct.pack("<4i", 1, (1 << 31) - 1, (1 << 31) - 1, 1),
    "chunks of -1 tokens": lambda: struct.pack("<8i", 1, 1, 1, 1, 1, -1, -1, 1),
    "a pickle": lambda: pickle.dumps(Harmful()),
    "a saved pickle": lambda: saved({"logical_count": Harmful()}),
    "a list that holds itself": itself,
    "a number spread to terabytes": lambda: saved_tensor(
        lambda torch: torch.zeros(1).int().expand(1 << 20, 1 << 10, 1 << 10)
    ),
    "a sparse tensor": lambda: saved_tensor(
        lambda torch: torch.sparse_coo_tensor(
            torch.zeros((3, 0)), torch.zeros(0), (1 << 20, 1 << 10, 1 << 10), check_invariants=True
        )
    ),
    "a tensor without data": lambda: saved_tensor(
        lambda torch: torch.empty((1 << 20, 1 << 10, 1 << 10), device="meta")
    ),
    "a tensor of no dimension": lambda: saved_tensor(lambda torch: torch.tensor(1)),
    "an empty tensor": lambda: saved_tensor(lambda torch: torch.zeros((0, 3, 8)).int()),
    "a bfloat16 tensor": lambda: saved_tensor(lambda torch: torch.zeros((2, 3, 8)).bfloat16()),
    "a tensor that needs gradients": lambda: saved_tensor(
        lambda torch: torch.zeros((2, 3, 8), requires_grad=True)
    ),
}
"""Files that no damage leads to."""


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(HOSTILE[name]())

    for kind, trace in (("auto", True), ("auto", False), ("moesim", True)):
        read_within_bounds(path, kind, WITH_SPEC, trace)
