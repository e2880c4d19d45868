import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moesim.errors import InputError
from moesim.policies.api import Setting
from moesim.policies.registry import choose
from moesim.sim.replay import Replayed
from moesim.traces.format import Trace
from moesim.types import COPY_IN, DECODE, EXPERT_CPU, EXPERT_GPU, OUTCOMES, WHOLE

LAYERS, EXPERTS = 3, 8

Run = Callable[..., Replayed]
MakeSetting = Callable[..., Setting]


def resident(spec: str, setting: Setting) -> list[list[int]]:
    """Return the experts on the GPU of each layer; check that slots are exactly those used."""
    placement = choose(spec).make(setting).place(setting)
    assert set(placement.cached.ravel().tolist()) <= {0, WHOLE}
    inside = [np.flatnonzero(layer).tolist() for layer in placement.cached]
    assert placement.cache_slots.tolist() == [len(layer) for layer in inside]
    assert placement.cache_slots.sum() <= setting.slots
    assert placement.staging_slots == 0
    assert placement.predictions == ()
    return inside


@pytest.mark.parametrize(
    ("slots", "layers_on_gpu"),
    [(0, 0), (1, 0), (7, 0), (8, 1), (15, 1), (16, 2), (23, 2), (24, 3), (99, 3)],
)
def test_by_layer_keeps_the_experts_of_the_first_layers_on_the_cpu(
    make_setting: MakeSetting, slots: int, layers_on_gpu: int
) -> None:
    """As llama.cpp's --n-cpu-moe: whole layers only, the last ones on the GPU."""
    setting = make_setting(slots, layers=LAYERS)
    on_cpu = LAYERS - layers_on_gpu
    expected: list[list[int]] = [[]] * on_cpu + [list(range(EXPERTS))] * layers_on_gpu
    assert resident("static", setting) == expected
    assert resident("static:by=layer,order=index", setting) == expected


@pytest.mark.parametrize(
    ("slots", "per_layer"),
    [
        (0, (0, 0, 0)),
        (1, (1, 0, 0)),
        (6, (2, 2, 2)),
        (11, (4, 4, 3)),
        (24, (8, 8, 8)),
        (90, (8,) * 3),
    ],
)
def test_by_expert_keeps_the_first_ones_equally_many_per_layer(
    make_setting: MakeSetting, slots: int, per_layer: tuple[int, ...]
) -> None:
    setting = make_setting(slots, layers=LAYERS)
    assert resident("static:by=expert", setting) == [list(range(n)) for n in per_layer]


def test_popularity_takes_the_most_used_pairs_and_the_lower_one_of_equals(
    make_setting: MakeSetting,
) -> None:
    setting = make_setting(4, layers=LAYERS)
    counts = np.zeros((LAYERS, EXPERTS), np.int64)
    counts[2, 5] = 9
    counts[0, [3, 6]] = 4
    counts[1, 1] = 4
    counts[2, 0] = 4
    setting = setting._replace(popularity=counts)
    spec = "static:by=expert,order=popularity"

    assert resident(spec, setting) == [[3, 6], [1], [5]]
    assert resident(spec, make_setting(1, layers=LAYERS)._replace(popularity=counts)) == [
        [],
        [],
        [5],
    ]
    with pytest.raises(InputError, match="not replayed"):
        resident(spec, make_setting(4, layers=LAYERS))
    with pytest.raises(InputError, match="by=expert"):
        resident("static:by=layer,order=popularity", setting)


@pytest.mark.parametrize("slots", [1, 5, 11, 20])
def test_popularity_counts_what_is_not_replayed(run: Run, trace: Trace, slots: int) -> None:
    """Sequence 0 is replayed; the others are counted."""
    replayed = run("static:by=expert,order=popularity", slots, of=trace, batch=1)
    counts = np.zeros((LAYERS, EXPERTS), np.int64)
    for token in np.flatnonzero(trace.sequence != trace.sequence[0]):
        for layer in range(LAYERS):
            for expert in trace.experts[token, layer]:
                counts[layer, expert] += 1
    everything = np.zeros_like(counts)
    np.add.at(everything, (np.arange(LAYERS)[None, :, None], trace.experts), 1)
    assert (replayed.prepared.setting.popularity == counts).all()
    assert (counts != everything).any()

    pairs = sorted(np.ndindex(*counts.shape), key=lambda at: (-counts[at], at))[:slots]
    assert sorted(map(tuple, np.argwhere(replayed.prepared.placement.cached))) == sorted(pairs)


def test_popularity_has_nothing_to_count_if_all_is_replayed(run: Run) -> None:
    with pytest.raises(InputError, match="nothing is left of it"):
        run("static:by=expert,order=popularity", 5, batch=4)


def listed(tmp_path: Path, by: str, entries: object) -> str:
    """Return the spec of a policy with this list."""
    file = tmp_path / "experts.json"
    file.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return f"static:by={by},order=list,file={file}"


def test_list_of_experts_is_taken_in_its_order_as_far_as_the_budget_goes(
    tmp_path: Path, make_setting: MakeSetting
) -> None:
    spec = listed(tmp_path, "expert", [[2, 7], [0, 0], [2, 1], [1, 4]])
    assert resident(spec, make_setting(9, layers=LAYERS)) == [[0], [4], [1, 7]]
    assert resident(spec, make_setting(3, layers=LAYERS)) == [[0], [], [1, 7]]
    assert resident(spec, make_setting(0, layers=LAYERS)) == [[], [], []]
    assert resident(listed(tmp_path, "expert", []), make_setting(9, layers=LAYERS)) == [[], [], []]


def test_list_of_layers_is_taken_in_its_order_as_whole_layers(
    tmp_path: Path, make_setting: MakeSetting
) -> None:
    spec = listed(tmp_path, "layer", [1, 0])
    all_of_it = list(range(EXPERTS))
    assert resident(spec, make_setting(15, layers=LAYERS)) == [[], all_of_it, []]
    assert resident(spec, make_setting(24, layers=LAYERS)) == [all_of_it, all_of_it, []]


@pytest.mark.parametrize(
    ("by", "entries", "what"),
    [
        ("expert", [[0, 8]], r"\[0, 8\]"),
        ("expert", [[3, 0]], r"\[3, 0\]"),
        ("expert", [[-1, 0]], r"\[-1, 0\]"),
        ("expert", [[0, -1]], r"\[0, -1\]"),
        ("expert", [[0, 1], [0]], r"\[0\]"),
        ("expert", [[0, 1, 2]], r"\[0, 1, 2\]"),
        ("expert", [[0, 1.5]], r"\[0, 1.5\]"),
        ("expert", [[0, True]], r"\[0, True\]"),
        ("expert", [["0", "1"]], r"\['0', '1'\]"),
        ("expert", [1], "1"),
        ("expert", [None], "None"),
        ("expert", {"0": [1]}, "'0'"),
        ("expert", [[0, 1], [1, 1], [0, 1]], "twice"),
        ("layer", [3], "3"),
        ("layer", [-1], "-1"),
        ("layer", [1.0], "1.0"),
        ("layer", [True], "True"),
        ("layer", ["1"], "'1'"),
        ("layer", [[0, 1]], r"\[0, 1\]"),
        ("layer", [1, 1], "twice"),
        ("layer", 1, "1"),
        ("layer", None, "None"),
        ("layer", "[0, 1", "cannot read"),
        ("layer", "", "cannot read"),
        ("layer", "[" * 100_000, "cannot read"),
    ],
)
def test_bad_lists_are_refused(
    tmp_path: Path, make_setting: MakeSetting, by: str, entries: object, what: str
) -> None:
    with pytest.raises(InputError, match=what) as refused:
        choose(listed(tmp_path, by, entries)).make(make_setting(9, layers=LAYERS))
    message = str(refused.value)
    assert message.startswith("policy static: ")
    assert "experts.json" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("file", "what"),
    [("", "needs file=FILE"), ("missing.json", "No such file"), (".", "directory")],
)
def test_files_that_cannot_be_read_are_refused(
    tmp_path: Path, make_setting: MakeSetting, file: str, what: str
) -> None:
    path = tmp_path / file if file else ""
    with pytest.raises(InputError, match=what):
        choose(f"static:order=list,file={path}").make(make_setting(9, layers=LAYERS))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path, make_setting: MakeSetting) -> None:
    file = tmp_path / "experts.json"
    file.write_bytes(b"[\xff]")
    with pytest.raises(InputError, match="cannot read"):
        choose(f"static:order=list,file={file}").make(make_setting(9, layers=LAYERS))


def where_experts_ran(run: Replayed) -> tuple[set[tuple[Any, ...]], set[tuple[Any, ...]]]:
    """Return the (layer, expert) pairs that ran on GPU and CPU; check that no weights moved."""
    assert run.log is not None
    rows = run.log.operations
    assert not (rows["kind"] == COPY_IN).any()
    on_gpu, on_cpu = (
        {tuple(map(int, row)) for row in rows[rows["kind"] == kind][["layer", "expert"]]}
        for kind in (EXPERT_GPU, EXPERT_CPU)
    )
    return on_gpu, on_cpu


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("slots", [1, 8, 13, 24])
@pytest.mark.parametrize(
    "spec", ["static", "static:by=expert", "static:by=expert,order=popularity"]
)
def test_experts_run_where_they_are_and_no_weights_move(
    run: Run, spec: str, slots: int, batch: int
) -> None:
    replayed = run(spec, slots, batch=batch)
    on_gpu, on_cpu = where_experts_ran(replayed)
    inside = {tuple(map(int, at)) for at in np.argwhere(replayed.prepared.placement.cached)}
    assert on_gpu <= inside
    assert not on_cpu & inside
    counts = np.asarray(replayed.prepared.host.counts)[..., 0].sum(axis=(0, 1))
    used = {name for name, count in zip(OUTCOMES, counts, strict=True) if count}
    assert used == {name for name, ran in (("resident", on_gpu), ("cpu", on_cpu)) if ran}


def test_a_file_that_would_not_be_read_is_refused(make_setting: MakeSetting) -> None:
    with pytest.raises(InputError, match=r"file=pairs.json is read with order=list only"):
        choose("static:by=expert,file=pairs.json").make(make_setting(9, layers=LAYERS))


def test_listed_experts_run_on_the_gpu(run: Run, tmp_path: Path) -> None:
    pairs = {(0, 1), (2, 3), (1, 7)}
    replayed = run(listed(tmp_path, "expert", sorted(pairs)), 24, batch=4)
    on_gpu, on_cpu = where_experts_ran(replayed)
    assert on_gpu == pairs
    assert not on_cpu & pairs


@pytest.mark.parametrize(
    "spec", ["static", "static:by=expert", "static:by=expert,order=popularity"]
)
def test_without_a_budget_everything_runs_on_the_cpu(run: Run, trace: Trace, spec: str) -> None:
    replayed = run(spec, 0, batch=1)
    on_gpu, on_cpu = where_experts_ran(replayed)
    assert on_gpu == set()
    decode = trace.experts[(trace.sequence == trace.sequence[0]) & (trace.phase == DECODE)]
    assert {(layer, int(e)) for layer in range(LAYERS) for e in decode[:, layer].ravel()} <= on_cpu
