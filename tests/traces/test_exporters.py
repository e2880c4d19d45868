import csv
import itertools
import json
import re
import sys
import tracemalloc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from moesim.cli.trace import command
from moesim.errors import InputError, MoesimError
from moesim.model import ModelSpec, expert_bytes, load_model, spec_from_dict, spec_to_dict
from moesim.sim.curves import curves
from moesim.traces import exporters
from moesim.traces.edit import take
from moesim.traces.exporters import (
    ACCESS,
    export_libcachesim,
    export_sglang,
    export_table,
    layer_counts,
)
from moesim.traces.format import MISSING, Trace, write_trace
from moesim.traces.stats import lru_hits, popularity

MakeTrace = Callable[..., Trace]

linux = pytest.mark.skipif(sys.platform != "linux", reason="libcachesim is for Linux")


@pytest.fixture(scope="module")
def spec() -> ModelSpec:
    """Return a model of five layers, of which 1, 2 and 4 have six experts."""
    plain = spec_to_dict(load_model("qwen1.5-moe-a2.7b"))
    shape = {"hidden_layers": 5, "layer_ids": [1, 2, 4], "experts": 6, "top_k": 2}
    return spec_from_dict({**plain, **shape, "name": "tiny", "dense_width": 8})


def with_numbers(trace: Trace, *numbers: int) -> Trace:
    return msgspec.structs.replace(trace, layer_ids=np.array(numbers, np.int32))


def with_gaps(trace: Trace) -> Trace:
    experts = trace.experts.copy()
    experts[1, 2] = MISSING
    experts[3, 0, 1] = MISSING
    experts[-1] = MISSING
    return msgspec.structs.replace(trace, experts=experts)


@pytest.fixture(params=[1 << 18, 7], ids=["whole", "in chunks"])
def _chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporters, "CHUNK", request.param)


def accesses(trace: Trace) -> Iterator[tuple[int, int, int, int]]:
    """Yield row, layer, rank and expert as the order is said: by row, by layer, by rank."""
    for row, layer, rank in itertools.product(*map(range, trace.experts.shape)):
        if trace.experts[row, layer, rank] != MISSING:
            yield row, layer, rank, int(trace.experts[row, layer, rank])


# SGLang and KTransformers.


def test_counts_have_a_row_for_every_hidden_layer(make_trace: MakeTrace, spec: ModelSpec) -> None:
    trace = with_numbers(make_trace((40, 30), (3, 2)), 1, 2, 4)

    counts = layer_counts(trace, spec)

    assert counts.shape == (5, 6)
    assert (counts[[1, 2, 4]] == popularity(trace)).all()
    assert not counts[[0, 3]].any()
    assert counts.sum() == trace.experts.size


def test_layers_count_by_order_where_their_numbers_were_not_known(
    make_trace: MakeTrace, spec: ModelSpec
) -> None:
    trace = make_trace()

    counted = layer_counts(with_numbers(trace, 1, 2, 4), spec)
    assert (layer_counts(trace, spec) == counted).all()


def test_without_a_model_layers_from_0_on_are_all_there_are(make_trace: MakeTrace) -> None:
    trace = make_trace()

    assert (layer_counts(trace) == popularity(trace)).all()
    for unsaid in (
        with_numbers(trace, 1, 2, 3),
        with_numbers(trace, 0, 2, 4),
        take(trace, layers=(0, 2)),
        msgspec.structs.replace(trace, meta={"model": "tiny"}),
    ):
        with pytest.raises(InputError, match="say --model"):
            layer_counts(unsaid)


def test_what_the_engines_refuse_is_not_written(
    make_trace: MakeTrace, spec: ModelSpec, tmp_path: Path
) -> None:
    trace = make_trace()
    experts = trace.experts.copy()
    experts[:, 1] = MISSING
    unseen = msgspec.structs.replace(trace, experts=experts)

    for broken, of, message in (
        (unseen, spec, "no counts of layer 2;"),
        (unseen, None, "no counts of layer 1;"),
        (take(trace, layers=(0, 2)), spec, "2 MoE layers, tiny has 3"),
        (make_trace(experts=9), spec, "9 experts per layer, tiny has 6"),
    ):
        with pytest.raises(InputError, match=re.escape(message)) as refused:
            export_sglang(broken, tmp_path / "counts.json", of)
        assert "\n" not in str(refused.value)
    with pytest.raises(InputError, match=r"legal are \.json and \.pt"):
        export_sglang(trace, tmp_path / "counts.txt", spec)
    assert list(tmp_path.iterdir()) == []


def test_json_and_pt_hold_the_same_counts(
    make_trace: MakeTrace, spec: ModelSpec, tmp_path: Path
) -> None:
    trace = make_trace((40, 30), (3, 2))

    plain = export_sglang(trace, tmp_path / "my counts.json", spec)
    both = export_sglang(trace, tmp_path / "my counts.pt", spec)
    again = tmp_path / "again.pt"
    export_sglang(trace, again, spec)

    counts = json.loads((tmp_path / "my counts.json").read_text())
    saved = torch.load(tmp_path / "my counts.pt", weights_only=True)
    assert counts == {"logical_count": layer_counts(trace, spec).tolist()}
    assert saved.keys() == {"logical_count"}
    assert saved["logical_count"].dtype == torch.int32
    assert saved["logical_count"].tolist() == [counts["logical_count"]]
    assert again.read_bytes() == (tmp_path / "my counts.pt").read_bytes()
    assert len(plain) == 1
    assert plain[0].endswith(f"--init-expert-location '{tmp_path}/my counts.json'")
    assert "--kt-expert-placement-strategy frequency" in both[1]


# libCacheSim.


@pytest.mark.usefixtures("_chunk")
def test_accesses_by_hand(tmp_path: Path) -> None:
    """Layers 3 and 5 of 4 experts, so that objects are 12 to 15 and 20 to 23."""
    trace = Trace(
        experts=np.array([[[1, 0], [2, MISSING]], [[0, 3], [2, 1]]], np.uint16),
        layer_ids=np.array([3, 5], np.int32),
        phase=np.zeros(2, np.uint8),
        sequence=np.zeros(2, np.int32),
        position=np.arange(2, dtype=np.int32),
        meta={"num_experts": 4},
    )

    assert export_libcachesim(trace, tmp_path / "all") == 7
    assert export_libcachesim(trace, tmp_path / "one", layer=5) == 3

    assert (tmp_path / "all").stat().st_size == 7 * 24
    assert np.fromfile(tmp_path / "all", ACCESS).tolist() == [
        (0, 13, 1, -1),
        (0, 12, 1, 4),
        (0, 22, 1, 6),
        (1, 12, 1, -1),
        (1, 15, 1, -1),
        (1, 22, 1, -1),
        (1, 21, 1, -1),
    ]
    assert np.fromfile(tmp_path / "one", ACCESS).tolist() == [
        (0, 22, 1, 2),
        (1, 22, 1, -1),
        (1, 21, 1, -1),
    ]


@pytest.mark.usefixtures("_chunk")
def test_every_access_names_the_next_one(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = with_gaps(with_numbers(make_trace((9, 6), (3, 2)), 1, 2, 4))

    export_libcachesim(trace, tmp_path / "all")

    found = np.fromfile(tmp_path / "all", ACCESS)
    objects = [int(trace.layer_ids[layer]) * 6 + e for _, layer, _, e in accesses(trace)]
    assert found["object"].tolist() == objects
    assert found["time"].tolist() == [row for row, _, _, _ in accesses(trace)]
    for number, (this, following) in enumerate(zip(objects, found["next"], strict=True), 1):
        later = objects[number:]
        assert following == (number + 1 + later.index(this) if this in later else -1)


def test_sizes_are_those_of_the_model(
    make_trace: MakeTrace, spec: ModelSpec, tmp_path: Path
) -> None:
    trace = make_trace()
    export_libcachesim(trace, tmp_path / "a", spec)
    export_libcachesim(trace, tmp_path / "b", spec, bits=4)

    for name, bits in (("a", 16), ("b", 4)):
        sizes = np.fromfile(tmp_path / name, ACCESS)["size"]
        assert set(sizes.tolist()) == {expert_bytes(spec, bits)}


def test_experts_without_weights_are_no_accesses(
    make_trace: MakeTrace, spec: ModelSpec, tmp_path: Path
) -> None:
    trace = make_trace(experts=8)
    passing = msgspec.structs.replace(spec, weightless_experts=2)

    count = export_libcachesim(trace, tmp_path / "a", passing)

    assert count == (trace.experts < 6).sum()
    assert (layer_counts(trace, passing)[[1, 2, 4]] == popularity(trace)[:, :6]).all()


def libcachesim_misses(rule: str, path: Path, size: int) -> int:
    import libcachesim

    reader = libcachesim.TraceReader(str(path), libcachesim.TraceType.ORACLE_GENERAL_TRACE)
    cache = getattr(libcachesim, rule)(cache_size=size)
    missed, _ = cache.process_trace(reader)
    misses: float = missed * reader.get_num_of_req()
    return round(misses)


@linux
@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("size", [1, 2, 4])
def test_libcachesim_misses_as_often_as_we_say(
    make_trace: MakeTrace, tmp_path: Path, size: int
) -> None:
    trace = with_gaps(with_numbers(make_trace((60, 40), (3, 2)), 1, 2, 4))
    made = curves(trace, ["lru", "belady"], [size], "access", compiled=False)
    misses = (made.lookups - made.hits)[:, 0]

    for at, layer in enumerate(trace.layer_ids.tolist()):
        path = tmp_path / f"{layer}.oracleGeneral"
        count = export_libcachesim(trace, path, layer=layer)
        assert count == made.lookups[at]
        assert libcachesim_misses("LRU", path, size) == misses[0, at]
        assert libcachesim_misses("Belady", path, size) == misses[1, at]
        hits = lru_hits(trace, [size], protect=False)[0, at] * count
        assert libcachesim_misses("LRU", path, size) == count - round(hits)


@linux
@pytest.mark.parametrize("room", [1, 5, 12])
def test_libcachesim_counts_in_bytes_over_all_layers(
    make_trace: MakeTrace, spec: ModelSpec, tmp_path: Path, room: int
) -> None:
    trace = make_trace((60, 40), (3, 2))
    export_libcachesim(trace, tmp_path / "all", spec)
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    misses = 0
    for _, layer, _, expert in accesses(trace):
        misses += (layer, expert) not in cache
        cache[layer, expert] = None
        cache.move_to_end((layer, expert))
        if len(cache) > room:
            cache.popitem(last=False)

    assert libcachesim_misses("LRU", tmp_path / "all", room * expert_bytes(spec)) == misses


def test_libcachesim_cannot_take_everything(
    make_trace: MakeTrace, spec: ModelSpec, tmp_path: Path
) -> None:
    trace = make_trace()
    huge = msgspec.structs.replace(spec, hidden=1 << 20, expert_width=1 << 20)

    with pytest.raises(InputError, match=r"no MoE layer 3 in the trace; there are: 0\.\.2"):
        export_libcachesim(trace, tmp_path / "x", layer=3)
    with pytest.raises(InputError, match="up to 4294967295"):
        export_libcachesim(trace, tmp_path / "x", huge)
    with pytest.raises(InputError, match="tiny has 6"):
        export_libcachesim(make_trace(experts=9), tmp_path / "x", spec)
    assert list(tmp_path.iterdir()) == []


# Tables.


def expected_rows(trace: Trace) -> list[dict[str, Any]]:
    return [
        {
            "row": row,
            "sequence": int(trace.sequence[row]),
            "position": int(trace.position[row]),
            "phase": ("prefill", "decode")[trace.phase[row]],
            "layer": int(trace.layer_ids[layer]),
            "rank": rank,
            "expert": expert,
            "weight": None if trace.weights is None else float(trace.weights[row, layer, rank]),
        }
        for row, layer, rank, expert in accesses(trace)
    ]


def read_table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        from pyarrow.parquet import read_table as read
    else:
        from pyarrow.csv import read_csv as read
    rows: list[dict[str, Any]] = read(path).to_pylist()
    for row in rows:
        if row["weight"] is not None:
            # Text holds the shortest number that is this one in 32 bits.
            row["weight"] = float(np.float16(row["weight"]))
    return rows


@pytest.mark.usefixtures("_chunk")
@pytest.mark.parametrize("kind", ["csv", "parquet"])
@pytest.mark.parametrize("full", [True, False])
def test_tables_hold_the_trace(
    make_trace: MakeTrace, tmp_path: Path, kind: str, full: bool
) -> None:
    trace = with_gaps(with_numbers(make_trace((9, 6), (3, 2), full=full), 1, 2, 4))
    path = tmp_path / f"table.{kind}"

    count = export_table(trace, path, kind)

    rows = read_table(path)
    assert rows == expected_rows(trace)
    assert count == len(rows) == (trace.experts != MISSING).sum()
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_experts_in_no_order_have_no_rank(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_trace()
    unordered = msgspec.structs.replace(trace, meta={**trace.meta, "has_rank_order": False})
    for one, name in ((trace, "a.csv"), (unordered, "b.csv")):
        export_table(one, tmp_path / name, "csv")
    ranks = [[row["rank"] for row in read_table(tmp_path / name)] for name in ("a.csv", "b.csv")]

    assert set(ranks[0]) == {0, 1}
    assert set(ranks[1]) == {None}


def test_a_csv_is_plain(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_trace(full=False)
    export_table(trace, tmp_path / "t.csv", "csv")

    with (tmp_path / "t.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))

    assert [row["weight"] for row in rows] == [""] * trace.experts.size
    assert [int(row["expert"]) for row in rows] == trace.experts.ravel().tolist()


@pytest.mark.parametrize("target", ["csv", "parquet", "libcachesim"])
def test_memory_does_not_grow_with_the_trace(
    make_trace: MakeTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.setattr(exporters, "CHUNK", 1 << 10)
    peaks = []
    for tokens in (10, 500, 5000):  # the first only imports
        trace = make_trace((tokens,), (1,), full=False)
        tracemalloc.start()
        if target == "libcachesim":
            export_libcachesim(trace, tmp_path / "t")
        else:
            export_table(trace, tmp_path / "t", target)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()

    assert peaks[2] < peaks[1] + 64 * 1024


# The command.


@pytest.fixture
def saved(make_trace: MakeTrace, tmp_path: Path) -> Path:
    write_trace(make_trace(), tmp_path / "t.npz")
    return tmp_path / "t.npz"


def run(*words: object) -> str:
    result = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_command_says_what_the_file_is_for(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    assert run("export", saved, "--to", "sglang", "-o", "c.json") == (
        "c.json: counts of 8 tokens in 3 layers, for\n"
        "python -m sglang.launch_server --model MODEL --init-expert-location c.json\n"
    )
    assert run("export", saved, "--to", "libcachesim", "-o", "all.bin") == (
        "all.bin: 48 accesses to objects layer x 6 + expert, sizes are 1, for\n"
        "cachesim all.bin oracleGeneral lru SIZE\n"
    )
    assert "16 accesses" in run(
        "export", saved, "--to", "libcachesim", "-o", "one.bin", "--layer", 1
    )
    assert run("export", saved, "--to", "csv", "-o", "t.csv").startswith("t.csv: 48 rows, ")
    assert run("export", saved, "--to", "parquet", "-o", "t.pq").startswith("t.pq: 48 rows, ")


def test_the_model_decides_sizes_and_layers(
    make_trace: MakeTrace, spec: ModelSpec, tmp_path: Path
) -> None:
    trace = make_trace()
    meta = {**trace.meta, "spec": spec_to_dict(spec)}
    write_trace(msgspec.structs.replace(trace, meta=meta), tmp_path / "t.npz")

    assert "in 5 layers" in run(
        "export", tmp_path / "t.npz", "--to", "sglang", "-o", tmp_path / "c.json"
    )
    four_bits = run(
        "export", tmp_path / "t.npz", "--to", "libcachesim", "--bits", 4, "-o", tmp_path / "a"
    )
    assert "sizes are those of tiny" in four_bits
    assert np.fromfile(tmp_path / "a", ACCESS)["size"][0] == expert_bytes(spec, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--to csv -o none/t.csv", "there is no folder"),
        ("--to csv -o t.npz", "t.npz is the trace itself"),
        ("--to csv -o t.csv --layer 1", "--layer 1 is for --to libcachesim, not for csv"),
        ("--to sglang -o t.json --bits 4", "--bits 4 is for --to libcachesim"),
        ("--to sglang -o t.npy", "legal are .json and .pt"),
        ("--to sglang -o t.json --model mixtral-8x7b", "the trace has 3 MoE layers"),
        ("--to sglang -o t.json --model nope", "no model named 'nope'"),
    ],
)
def test_bad_input_is_an_error_of_ours(
    saved: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    monkeypatch.chdir(saved.parent)

    result = CliRunner().invoke(command, ["export", "t.npz", *words.split()])

    assert isinstance(result.exception, MoesimError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert [p.name for p in saved.parent.iterdir()] == ["t.npz"]


@pytest.mark.parametrize(
    ("package", "suffix", "extra"), [("torch", "pt", "torch"), ("pyarrow", "csv", "parquet")]
)
def test_what_is_not_installed_is_said(
    make_trace: MakeTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str,
    suffix: str, extra: str,
) -> None:  # fmt: skip
    monkeypatch.setitem(sys.modules, package, None)

    def export() -> object:
        if suffix == "pt":
            return export_sglang(make_trace(), tmp_path / "t.pt")
        return export_table(make_trace(), tmp_path / "t.csv", "csv")

    with pytest.raises(InputError, match=re.escape(f"pip install 'moesim[{extra}]'")):
        export()
    assert list(tmp_path.iterdir()) == []
