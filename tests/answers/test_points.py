"""Points: the same replay by plain values, wherever it is evaluated; and by the library."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import moesim
from moesim.answers.inputs import Inputs, left_bytes
from moesim.answers.parallel import spread
from moesim.answers.points import Point, digest, flat, own_sources, row_of, source_of
from moesim.answers.stretch import KINDS_OF
from moesim.costs import COPY_LANES, TABLES_OF, build_costs, copy_ns, stretched
from moesim.errors import InputError, MoesimError
from moesim.model import kv_bytes_per_token, load_model
from moesim.profile import load_profile
from moesim.traces.bundled import example_path
from moesim.traces.format import write_trace
from moesim.types import EXPERT_CPU, H2D, KINDS, PAUSE

SMALL = Point(policy="lru", cache_ratio=0.25, prompt=4, generate=4, machine="simpy")


def plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without what differs from one execution to the next."""
    return {key: value for key, value in row.items() if key != "run.wall_s"}


def test_a_point_is_the_replay_of_the_library() -> None:
    found = moesim.replay(policy="lru", cache_ratio=0.25, prompt=4, generate=4, machine="simpy")
    assert plain(row_of(SMALL)) == plain(flat(found.data))
    assert found.tokens_per_s == found.data["tokens_per_s"]
    assert found.makespan_ns == sum(found.data["time_ns"].values())


def test_processes_give_the_same_rows() -> None:
    points = [
        msgspec.structs.replace(SMALL, policy=policy, batch=batch)
        for policy in ("lru", "dali", "static", "all-cpu")
        for batch in (1, 2)
    ]
    here = dict(spread(row_of, points, jobs=1))
    there = dict(spread(row_of, points, jobs=2))
    assert sorted(there) == list(range(len(points)))
    assert {k: plain(row) for k, row in here.items()} == {k: plain(r) for k, r in there.items()}


def test_a_digest_tells_points_apart_by_what_they_hold(tmp_path: Path) -> None:
    """A copy of the trace under another name is the same; another budget or seed is not."""
    copy = tmp_path / "copy.npz"
    copy.write_bytes(example_path().read_bytes())
    own = digest(SMALL)
    assert digest(msgspec.structs.replace(SMALL, trace=str(copy))) == own
    assert digest(msgspec.structs.replace(SMALL, machine="compiled")) == own
    others = [
        msgspec.structs.replace(SMALL, **change)
        for change in (
            {"cache_ratio": 0.5}, {"seed": 1}, {"policy": "dali"}, {"stretch": {"link": 1.1}},
            {"settings": {"link.h2d.bytes_per_s": "1e9"}}, {"hardware": "rtx4090-pcie4-ddr5"},
        )
    ]  # fmt: skip
    assert len({own, *map(digest, others)}) == 1 + len(others)


def test_a_digest_does_not_hang_on_how_a_point_was_made() -> None:
    """What is written out as its default is the default, in this process and in another."""
    plain_point = Point(policy="lru", cache_ratio=0.25)
    same = Point(policy="lru", cache_ratio=0.25, jitter=float("0"), synth={}, bits=16)
    there = dict(spread(digest, [plain_point], apart=True))
    assert {digest(plain_point), digest(same), *there.values()} == {digest(plain_point)}


def test_a_digest_changes_with_code_and_what_a_trace_says_of_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = digest(SMALL)
    trace = moesim.load_trace(example_path())
    path = tmp_path / "trace.npz"
    write_trace(msgspec.structs.replace(trace, meta={**trace.meta, "model": "other"}), path)
    assert digest(msgspec.structs.replace(SMALL, trace=str(path))) != own

    monkeypatch.setattr("moesim.answers.points.own_sources", lambda: "another simulator")
    assert digest(SMALL) != own
    code = tmp_path / "mine.py"
    code.write_text("from moesim.policies.lru import Lru\n\nclass Mine(Lru):\n    pass\n", "utf-8")
    mine = msgspec.structs.replace(SMALL, policy=str(code))
    before = digest(mine)
    code.write_text(code.read_text("utf-8") + "    lists = 3\n", "utf-8")
    assert digest(mine) != before


def test_code_of_another_package_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moesim.answers.points.load_class", lambda _: Point)
    source_of.cache_clear()
    assert source_of("theirs").endswith("points.py")
    assert source_of("lru") == ""
    source_of.cache_clear()
    assert len(own_sources()) == 64


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "trace.npz"
    trace = moesim.load_trace(example_path())
    write_trace(trace.at(np.arange(2000)), path)
    point = msgspec.structs.replace(SMALL, trace=str(path))
    first = digest(point)
    write_trace(trace.at(np.arange(3000)), path)
    assert digest(point) != first


def test_a_stretched_section_takes_so_many_times_as_long() -> None:
    """Everything on the CPU: with twice the time for the CPU, twice the time of its experts."""
    own = msgspec.structs.replace(SMALL, policy="all-cpu", cache_ratio=0.0)
    plain_row = row_of(own)
    slower = row_of(msgspec.structs.replace(own, stretch={"cpu": 2.0}))
    same = row_of(msgspec.structs.replace(own, stretch={"cpu": 1.0}))
    assert plain(same) == plain(plain_row)
    busy_ns, twice_ns = (row["lanes.cpu"] * row["makespan_ns"] for row in (plain_row, slower))
    assert twice_ns == pytest.approx(2 * busy_ns, rel=1e-3)
    for section in ("gpu", "link", "host"):
        stretch = {section: 1.5}
        assert (
            row_of(msgspec.structs.replace(own, stretch=stretch))["makespan_ns"]
            > (plain_row["makespan_ns"])
        )


def test_sections_stretch_every_number_once() -> None:
    kinds = [kind for own in KINDS_OF.values() for kind in own]
    tables = [name for kind in kinds for name in TABLES_OF.get(kind, ())]
    lanes = [COPY_LANES[kind] for kind in kinds if kind in COPY_LANES]
    assert sorted(tables) == sorted({name for names in TABLES_OF.values() for name in names})
    assert sorted(lanes) == sorted(set(COPY_LANES.values()))


def test_stretched_costs_by_hand() -> None:
    model, profile = load_model("mixtral-8x7b"), load_profile("rtx3090-pcie4-ddr4")[0]
    costs = build_costs(model, profile, 8, 1)
    assert set(range(len(KINDS))) - {*COPY_LANES, *TABLES_OF} == {PAUSE}
    twice = stretched(costs, EXPERT_CPU, 2.0)
    assert (twice.expert_cpu_ns == 2 * costs.expert_cpu_ns).all()
    assert (twice.expert_gpu_ns == costs.expert_gpu_ns).all()
    for kind, lane in COPY_LANES.items():
        if lane == H2D:
            slower = stretched(costs, kind, 2.0)
            for size in (1, 4096, 10**8):
                assert copy_ns(slower, H2D, size) == pytest.approx(
                    2 * copy_ns(costs, H2D, size), abs=2
                )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stretch": {"gpus": 2.0}}, "no section 'gpus' to stretch; there are: gpu, cpu, link"),
        ({"stretch": {"gpu": 0.0}}, "stretch of gpu: 0.0 is not in 0.01..100"),
        ({"policy": "lfru"}, "no policy named 'lfru'"),
        ({"trace": "no.npz"}, "no.npz"),
        ({"budget": "8GiB"}, "budget and cache ratio exclude each other"),
    ],
)
def test_bad_points_are_one_line(change: dict[str, Any], said: str) -> None:
    with pytest.raises(MoesimError) as caught:
        row_of(msgspec.structs.replace(SMALL, **change))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"cache_ratio": float("nan")}, "cache ratio nan is not in 0..1"),
        ({"cache_ratio": float("inf")}, "cache ratio inf is not in 0..1"),
        ({"cache_ratio": 1.5}, "cache ratio 1.5 is not in 0..1"),
        ({"cache_ratio": -0.5}, "cache ratio -0.5 is not in 0..1"),
        ({"budget": -1}, "a budget of -1 bytes"),
        ({"seed": -1}, "seed -1 is not in 0..2147483647"),
        ({"machine": "numba"}, "no machine named 'numba'; there are: auto, simpy, compiled"),
    ],
)
def test_the_library_refuses_what_the_command_does(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        moesim.replay(policy="static", prompt=4, **options)
    assert said in str(caught.value)


def test_loaded_things_and_names_are_the_same() -> None:
    trace, profile = moesim.load_trace(example_path()), moesim.load_profile("rtx3090-pcie4-ddr4")[0]
    named = Inputs.load(example_path(), hardware="rtx3090-pcie4-ddr4", budget="12MiB")
    given = Inputs.load(trace, hardware=profile, budget=12 << 20)
    assert given[2:] == named[2:]
    assert given.trace.digest() == named.trace.digest()


def test_what_a_gpu_has_left_by_hand() -> None:
    """24 GiB, less other weights in 16 bit, keys and values, and 1 GiB."""
    model, profile = load_model("mixtral-8x7b"), load_profile("rtx3090-pcie4-ddr4")[0]
    left, other, kept = left_bytes(model, profile, 1000)
    assert kept == 1000 * sum(kv_bytes_per_token(model)) == 1000 * 32 * 2 * 8 * 128 * 2
    assert left == profile.gpu.memory_bytes - other - kept - (1 << 30)
    assert 2.5e9 < other < 4e9  # 1.6 of Mixtral's 46.7 billion parameters


def test_the_library_says_what_it_found() -> None:
    found = moesim.replay(policy="static", cache_ratio=0.5, prompt=4, generate=4, machine="simpy")
    first, second = repr(found).split("\n")
    assert first.startswith(f"static: {found.tokens_per_s:.2f} tokens/s, TTFT ")
    assert second == found.why
    assert f"<b>{first}</b>" in found._repr_html_()
    table = found.frame()
    assert table["duration_ns"].sum() == found.makespan_ns
    assert list(table["phase"]) == ["prefill", "decode", "decode", "decode"]
    with pytest.raises(InputError, match="record"):
        found.timeline("run.json")


def test_names_of_the_library() -> None:
    for name in moesim.__all__:
        assert getattr(moesim, name) is not None
        assert name in dir(moesim)
    with pytest.raises(AttributeError, match="no attribute 'replays'"):
        _ = moesim.replays
