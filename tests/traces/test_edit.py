import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from moesim.cli.trace import command
from moesim.errors import MoesimError, TraceError
from moesim.traces.edit import join, take
from moesim.traces.format import Trace, check, read_trace, write_trace
from moesim.traces.stats import popularity
from moesim.types import DECODE

MakeTrace = Callable[..., Trace]

shapes = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 3)), min_size=2, max_size=5)


def made(make_trace: MakeTrace, shape: list[tuple[int, int]], **options: Any) -> Trace:
    """Return a trace of sequences of so many prefill and decode tokens."""
    lengths, prompts = [p + d for p, d in shape], [p for p, _ in shape]
    return make_trace(lengths, prompts, **options)


def same(a: Trace, b: Trace) -> bool:
    """Compare all but meta."""
    return (
        msgspec.structs.replace(a, meta={}).digest() == msgspec.structs.replace(b, meta={}).digest()
    )


def names(count: int) -> list[str]:
    return [f"{i}.npz" for i in range(count)]


@given(shapes, st.data(), st.booleans())
def test_joining_what_was_cut_gives_the_trace_again(
    make_trace: MakeTrace, shape: list[tuple[int, int]], data: st.DataObject, full: bool
) -> None:
    trace = made(make_trace, shape, full=full)
    borders = data.draw(st.sets(st.integers(1, len(shape) - 1)).map(sorted))
    ranges = list(zip([0, *borders], [*borders, len(shape)], strict=True))
    parts = [take(trace, sequences=each) for each in ranges]

    again, notes = join(parts, names(len(parts)))

    assert same(again, trace)
    assert notes == ()
    assert again.n_experts == trace.n_experts
    assert again.meta["model"] == trace.meta["model"]


@given(shapes, st.integers(1, 3), st.integers(1, 8))
def test_counts_are_conserved_and_parts_are_traces(
    make_trace: MakeTrace, shape: list[tuple[int, int]], border: int, tokens: int
) -> None:
    trace = made(make_trace, shape, layers=4)
    counts = popularity(trace)

    top, bottom = take(trace, layers=(0, border)), take(trace, layers=(border, None))
    first = take(trace, tokens=tokens)
    parts = [top, bottom, first, take(trace, phase="prefill")]
    if (trace.phase == DECODE).any():
        parts.append(take(trace, phase="decode"))

    assert (np.concatenate([popularity(top), popularity(bottom)]) == counts).all()
    assert (np.sum([popularity(part) for part in parts[3:]], axis=0) == counts).all()
    assert first.tokens == sum(min(tokens, p + d) for p, d in shape)
    for part in parts:
        check(part)


@given(shapes, st.integers(1, 4))
def test_cuts_of_different_kinds_commute(
    make_trace: MakeTrace, shape: list[tuple[int, int]], tokens: int
) -> None:
    trace = made(make_trace, shape)
    by_steps = take(
        take(take(trace, sequences=(1, None)), phase="prefill"), tokens=tokens, drop=["gate1"]
    )
    at_once = take(trace, sequences=(1, None), phase="prefill", tokens=tokens, drop=["gate1"])

    assert same(by_steps, at_once)
    assert same(take(trace), trace)


def test_parts_by_hand(make_trace: MakeTrace) -> None:
    """Rows 0-4, 5-7, 8-11; prompts of 3, 2 and 1."""
    trace = make_trace((5, 3, 4), (3, 2, 1))

    def rows(part: Trace) -> list[int]:
        where = [(int(s), int(p)) for s, p in zip(trace.sequence, trace.position, strict=True)]
        return [
            where.index((int(s), int(p))) for s, p in zip(part.sequence, part.position, strict=True)
        ]

    assert rows(take(trace, sequences=(1, 2))) == [5, 6, 7]
    assert rows(take(trace, sequences=(1, None))) == [5, 6, 7, 8, 9, 10, 11]
    assert rows(take(trace, tokens=2)) == [0, 1, 5, 6, 8, 9]
    assert rows(take(trace, phase="decode")) == [3, 4, 7, 9, 10, 11]
    assert rows(take(trace, phase="decode", tokens=2)) == [3, 4, 7, 9, 10]
    part = take(trace, sequences=(1, 3), layers=(1, 3), tokens=1)
    assert rows(part) == [5, 8]
    assert part.layer_ids.tolist() == [1, 2]
    assert (part.experts == trace.experts[[5, 8], 1:]).all()
    assert (part.candidates["gate1"] == trace.candidates["gate1"][[5, 8], 1:]).all()
    assert part.meta["cut"] == [{"sequences": [1, 3], "tokens": 1, "layers": [1, 3]}]
    assert take(part, sequences=(0, 1)).meta["cut"] == [*part.meta["cut"], {"sequences": [0, 1]}]


def test_interleaved_sequences_are_counted_in_order_of_appearance(make_trace: MakeTrace) -> None:
    mixed = msgspec.structs.replace(
        make_trace((2, 2, 2), (1, 1, 1)),
        sequence=np.array([9, 4, 9, 4, 0, 0], np.int32),
        position=np.array([0, 0, 1, 7, 2, 3], np.int32),
    )

    part = take(mixed, sequences=(0, 2), tokens=1)
    joined, _ = join([mixed, mixed], names(2))

    assert part.sequence.tolist() == [9, 4]
    assert joined.sequence.tolist() == [0, 1, 0, 1, 2, 2, 3, 4, 3, 4, 5, 5]
    check(joined)


def test_the_experts_of_a_part_are_those_of_the_model(make_trace: MakeTrace) -> None:
    trace = msgspec.structs.replace(make_trace((60,), (1,)), meta={})

    assert {take(trace, tokens=n).n_experts for n in (1, 2, 60)} == {trace.n_experts}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sequences": (1, 4)}, "sequences 1:4 is no range of the trace; legal are 0:3"),
        ({"sequences": (3, None)}, "sequences 3: is no range of the trace; legal are 0:3"),
        ({"sequences": (2, 1)}, "sequences 2:1 is no range"),
        ({"layers": (0, 8)}, "layers 0:8 is no range of the trace; legal are 0:6"),
        ({"layers": (2, 5)}, "layers 2:5 have no experts; those that do: 0, 1, 5"),
        ({"phase": "warm-up"}, "no phase 'warm-up'; there are: prefill, decode"),
        ({"phase": "decode", "sequences": (1, 2)}, "sequences 1..1 have no decode tokens"),
        ({"tokens": 0}, "tokens is 0; it must be at least 1"),
        ({"drop": ["gate3"]}, "no predictor 'gate3' in the trace; there are: gate1"),
    ],
)
def test_what_is_not_there_is_refused(
    make_trace: MakeTrace, options: dict[str, Any], message: str
) -> None:
    trace = make_trace((5, 3, 4), (3, 3, 1))
    trace = msgspec.structs.replace(trace, layer_ids=np.array([0, 1, 5], np.int32))

    with pytest.raises(TraceError, match=re.escape(message)) as refused:
        take(trace, **options)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": 2}, "b.npz has layers 0..1, a.npz has 0..2;"),
        ({"experts": 7}, "b.npz has experts per layer 7, a.npz has 6;"),
        ({"top_k": 3}, "b.npz has top_k 3, a.npz has 2;"),
    ],
)
def test_traces_of_other_shapes_do_not_join(
    make_trace: MakeTrace, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(TraceError, match=re.escape(message)) as refused:
        join([make_trace(), make_trace(**options)], ["a.npz", "b.npz"])
    assert "\n" not in str(refused.value)


def test_models_are_told_apart_by_name_and_quantised_ones_are_not(make_trace: MakeTrace) -> None:
    def of(model: str | None) -> Trace:
        meta = {"num_experts": 6} | ({"model": model} if model else {})
        return msgspec.structs.replace(make_trace(), meta=meta)

    for models in (("Qwen/M-Q4_K_M", "m"), ("m", None), (None, "m", "m-awq")):
        join([of(model) for model in models], names(len(models)))
    with pytest.raises(TraceError, match=r"2\.npz has model b, 1\.npz has a; only traces of one"):
        join([of(None), of("a"), of("b")], names(3))


def test_what_only_some_have_is_dropped_and_said(make_trace: MakeTrace) -> None:
    full, bare = make_trace(), make_trace(full=False)
    fewer = msgspec.structs.replace(
        full, candidates={"gate1": full.candidates["gate1"][:, :, :2]}, candidate_scores={}
    )

    joined, notes = join([full, bare], ["a", "b"])
    narrow, said = join([full, fewer], ["a", "b"])

    assert joined.weights is None
    assert joined.token_id is None
    assert joined.candidates == {}
    assert notes == (
        "guesses of gate1 are dropped: b has none",
        "weights are dropped: b has none",
        "token ids are dropped: b has none",
    )
    assert narrow.candidates["gate1"].shape[2] == 2
    assert narrow.candidate_scores == {}
    assert narrow.weights is not None
    assert said == (
        "guesses of gate1 are cut to the first 2",
        "scores of gate1 are dropped: b has none",
    )
    for trace in (joined, narrow):
        check(trace)


def test_meta_keeps_what_all_say_and_lists_the_rest(make_trace: MakeTrace) -> None:
    def with_meta(**meta: Any) -> Trace:
        return msgspec.structs.replace(make_trace(), meta={"num_experts": 6, **meta})

    a = with_meta(engine="x", data="code", has_rank_order=True)
    b = with_meta(engine="x", data="chat", has_rank_order=False)
    joined, _ = join([a, b], ["a.npz", "b.npz"])

    assert joined.meta["engine"] == "x"
    assert joined.meta["num_experts"] == 6
    assert joined.meta["has_rank_order"] is False
    assert "data" not in joined.meta
    first, second = joined.meta["sources"]
    assert first == {
        "name": "a.npz",
        "digest": a.digest(),
        "tokens": 8,
        "sequences": 2,
        "meta": {"data": "code", "has_rank_order": True},
    }
    assert second["meta"]["data"] == "chat"
    json.dumps(joined.meta)


def test_topics_go_with_their_sequences(make_trace: MakeTrace) -> None:
    trace = make_trace((3, 2, 2), (1, 1, 1))
    trace = msgspec.structs.replace(trace, meta={**trace.meta, "topics": ["code", "chat", "law"]})
    last, first = take(trace, sequences=(1, None)), take(trace, sequences=(0, 1))

    joined, _ = join([last, first, make_trace((2,), (1,))], names(3))

    assert joined.meta["topics"] == ["chat", "law", "code", None]


# The commands.


def run(*words: object) -> str:
    result = CliRunner().invoke(command, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_commands_cut_and_join(make_trace: MakeTrace, tmp_path: Path) -> None:
    trace = make_trace((5, 3, 4), (3, 2, 1))
    a, b, again = (tmp_path / name for name in ("a.npz", "b.npz", "again.npz"))
    write_trace(trace, tmp_path / "t.npz")

    said = run("cut", tmp_path / "t.npz", "-o", a, "--sequences", "0:2")
    run("cut", tmp_path / "t.npz", "-o", b, "--sequences", "2:")
    joined = run("join", a, b, "-o", again)
    rest = run(
        *("cut", again, "-o", tmp_path / "c.npz", "--layers", ":2", "--phase", "decode"),
        *("--tokens", 1, "--drop", "gate1"),
    )

    assert same(read_trace(again), trace)
    assert said.startswith(f"{a}: 8 tokens of 2 sequences, 3 layers, ")
    assert joined.startswith(f"{again}: 12 tokens of 3 sequences, ")
    assert rest.startswith(f"{tmp_path / 'c.npz'}: 3 tokens of 3 sequences, 2 layers, ")
    assert read_trace(tmp_path / "c.npz").candidates == {}


def test_join_notes_what_is_lost(make_trace: MakeTrace, tmp_path: Path) -> None:
    write_trace(make_trace(), tmp_path / "a.npz")
    write_trace(make_trace(full=False), tmp_path / "b.npz")

    said = run("join", tmp_path / "a.npz", tmp_path / "b.npz", "-o", tmp_path / "c.npz")

    assert f"note: weights are dropped: {tmp_path / 'b.npz'} has none\n" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("cut t.npz -o t.npz", "t.npz is the trace itself"),
        ("cut t.npz -o none/x.npz", "there is no folder"),
        ("cut t.npz -o x.npz --sequences 1", "--sequences 1: write A:B, as 0:16, 16: or :16"),
        ("cut t.npz -o x.npz --layers -1:2", "--layers -1:2: write A:B"),
        ("cut t.npz -o x.npz --layers 0:9", "legal are 0:3"),
        ("cut none.npz -o x.npz", "none.npz: no such file"),
        ("join t.npz -o x.npz", "1 traces to join; give at least 2"),
        ("join t.npz t.npz -o t.npz", "t.npz is one of the traces"),
        ("join t.npz none.npz -o x.npz", "none.npz: no such file"),
    ],
)
def test_bad_input_is_an_error_of_ours(
    make_trace: MakeTrace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str, message: str
) -> None:
    write_trace(make_trace(), tmp_path / "t.npz")
    monkeypatch.chdir(tmp_path)

    result = CliRunner().invoke(command, words.split())

    assert isinstance(result.exception, MoesimError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]
