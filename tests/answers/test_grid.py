"""Grids: which points they are, worked out by hand, and what is refused."""

import shutil
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import msgspec
import pytest

from moesim.answers.grid import FIELDS, Grid, grid_of, read_grid
from moesim.answers.points import Point, digest, named, row_of
from moesim.errors import InputError, MoesimError
from moesim.profile import DEFAULT_PRESET
from moesim.traces.bundled import example_path
from moesim.traces.synthetic import synthesize


@pytest.fixture(autouse=True)
def _not_calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))


def points(grid: Grid) -> list[Point]:
    return [grid.point(values) for values in grid.swept()]


def written(folder: Path, text: str) -> Path:
    path = folder / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_grid_by_hand(tmp_path: Path) -> None:
    grid = read_grid(
        written(
            tmp_path,
            """
bits: 8
grid:
  policy: [lru, "dali:cache=lru"]
  cache_ratio: [0.25, 1]
  hardware.link.h2d.bytes_per_s: [x2, 55e9]
""",
        )
    )

    assert grid.keys == ("policy", "cache_ratio", "hardware.link.h2d.bytes_per_s")
    assert grid.count == 8
    assert points(grid) == [
        Point(
            policy=policy,
            cache_ratio=ratio,
            bits=8,
            hardware=DEFAULT_PRESET,
            settings={"link.h2d.bytes_per_s": rate},
        )
        for policy, ratio, rate in product(("lru", "dali:cache=lru"), (0.25, 1.0), ("x2", "55e9"))
    ]
    assert list(grid.swept())[5] == {
        "policy": "dali:cache=lru",
        "cache_ratio": 0.25,
        "hardware.link.h2d.bytes_per_s": "55e9",
    }


def test_zipped_lists_go_together_and_are_crossed_with_others() -> None:
    grid = grid_of(
        {
            "grid": {"batch": [1, 2]},
            "zip": [{"prompt": [4, 8], "generate": [2, 3]}, {"seed": [5, 6], "start": [1, 0]}],
        }
    )

    assert [(p.batch, p.prompt, p.generate, p.seed, p.start) for p in points(grid)] == [
        (batch, *length, *seed)
        for batch in (1, 2)
        for length in ((4, 2), (8, 3))
        for seed in ((5, 1), (6, 0))
    ]
    alone = grid_of({"zip": {"prompt": [4, 8], "generate": [2, 3]}})
    assert [(p.prompt, p.generate) for p in points(alone)] == [(4, 2), (8, 3)]


def test_parameters_are_added_to_the_policy() -> None:
    crossed = {"policy": ["dali", "dali:cache=lru"], "policy.prefetch_size": [1, 2]}
    grid = grid_of({"policy.count_prefill": True, "grid": crossed})

    assert [point.policy for point in points(grid)] == [
        "dali:count_prefill=true,prefetch_size=1",
        "dali:count_prefill=true,prefetch_size=2",
        "dali:cache=lru,count_prefill=true,prefetch_size=1",
        "dali:cache=lru,count_prefill=true,prefetch_size=2",
    ]


def test_tables_of_a_point() -> None:
    grid = grid_of({"stretch.link": 0.5, "grid": {"stretch.gpu": [1, 2], "trace.seed": [3]}})

    assert [(p.stretch, p.synth) for p in points(grid)] == [
        ({"link": 0.5, "gpu": gpu}, {"seed": 3}) for gpu in (1, 2)
    ]


def test_without_lists_there_is_one_point() -> None:
    assert points(grid_of({"seed": 3})) == [Point(seed=3, hardware=DEFAULT_PRESET)]


@pytest.mark.parametrize("field", FIELDS)
def test_every_field_can_be_swept(field: str, tmp_path: Path) -> None:
    value = {
        "policy": "lru", "trace": "a.npz", "model": "mixtral-8x7b", "budget": "8GiB",
        "hardware": "rtx4090-pcie4-ddr5", "repeat": True, "machine": "simpy", "bits": 4,
        "cache_ratio": 0.5, "jitter": 0.5,
    }.get(field, 2)  # fmt: skip
    shutil.copy(example_path(), tmp_path / "a.npz")
    (point,) = points(grid_of({"grid": {field: [value]}}, tmp_path))

    found = str(tmp_path / "a.npz") if field == "trace" else value
    assert getattr(point, field) == found


def test_files_are_found_from_the_grid(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    shutil.copy(example_path(), tmp_path / "mine/t.npz")
    config = files("moesim.calibrate") / "models/mixtral-8x7b.json"
    (tmp_path / "mine/config.json").write_bytes(config.read_bytes())
    hardware = ["rtx3090-pcie4-ddr4"]
    plain = {"trace": "mine/t.npz", "model": "mine", "grid": {"hardware": hardware}}
    (point,) = points(grid_of(plain, tmp_path))

    assert point.trace == str(tmp_path / "mine/t.npz")
    assert point.model == str(tmp_path / "mine")
    assert point.hardware == "rtx3090-pcie4-ddr4"
    assert points(grid_of({"model": "mixtral-8x7b"}, tmp_path))[0].model == "mixtral-8x7b"
    with pytest.raises(MoesimError, match=f"{tmp_path}/none.npz"):
        grid_of({"grid": {"trace": ["mine/t.npz", "none.npz"]}}, tmp_path)
    with pytest.raises(MoesimError, match=f"{tmp_path}/box.yaml"):
        grid_of({"hardware": "box.yaml"}, tmp_path)
    with pytest.raises(MoesimError, match=f"{tmp_path}/mine.py"):
        grid_of({"policy": "mine.py"}, tmp_path)


def test_a_made_up_trace_is_that_of_synthesize() -> None:
    shape = {"layers": 2, "experts": 8, "top_k": 2, "sequences": 2, "prompt": 4, "generate": 3}
    plain = {f"trace.{key}": value for key, value in shape.items()} | {"model": "mixtral-8x7b"}
    (point,) = points(grid_of(plain))

    assert named(point).trace.digest() == synthesize(**shape).digest()  # type: ignore[arg-type]
    assert digest(point) != digest(msgspec.structs.replace(point, synth={**point.synth, "seed": 1}))
    with pytest.raises(InputError, match="exclude each other"):
        row_of(msgspec.structs.replace(point, trace=str(example_path())))


def test_a_policy_of_a_file_counts_by_what_it_says(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    text = "from moesim.policies.lru import Lru\n\n\nclass Mine(Lru):\n    pass\n"
    path.write_text(text, encoding="utf-8")
    (point,) = points(grid_of({"policy": "mine.py"}, tmp_path))
    first = digest(point)
    path.write_text(text + "\n\n# Changed.\n", encoding="utf-8")

    assert point.policy == str(path)
    assert digest(point) != first


LONG = list(range(1001))


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ({"polcy": "lru"}, "no key 'polcy'; there are: policy, trace, model, hardware, budget, "),
        ({"grid": {"settings": [1]}}, "no key 'settings'; there are: policy, "),
        ({"hardware.": 1}, "no key 'hardware.'; there are: hardware.<name>"),
        ({"colour.x": 1}, "no key 'colour.x'; there are: policy, "),
        ({5: 1}, "no key 5; there are"),
        ({"stretch.gpus": 1}, "no key 'stretch.gpus'; there are: stretch.gpu, stretch.cpu, "),
        ({"trace.size": 1}, "no key 'trace.size'; there are: trace.preset, trace.layers, "),
        ({"policy": ["lru"]}, "policy has a list of values: write it under grid, or zip"),
        ({"grid": {"policy": "lru"}}, "policy: write a list of values, as [1, 2]; not 'lru'"),
        ({"grid": {"policy": []}}, "policy: write a list of values"),
        ({"grid": {"policy": [["lru"]]}}, "policy: ['lru'] is no number and no text"),
        ({"grid": ["policy"]}, "grid: write keys, each with a list of values"),
        ({"zip": ["policy"]}, "zip: write a list of groups"),
        ({"zip": [{}]}, "a group of zip is empty"),
        ({"zip": {"seed": [1, 2], "batch": [1]}}, "seed has 2, batch has 1 values"),
        ({"grid": {"seed": [1, 2, 1]}}, "seed: 1 is there twice"),
        ({"seed": 1, "grid": {"seed": [1, 2]}}, "seed is there twice; a key has one place"),
        ({"budget": 1, "grid": {"cache_ratio": [0.5]}}, "budget and cache_ratio exclude"),
        ({"trace": "a.npz", "trace.seed": 1}, "trace and trace.<argument> exclude each other"),
        ({"grid": {"policy": ["lru", "lfru"]}}, "no policy named 'lfru'; there are: "),
        (
            {"grid": {"policy": ["dali", "lru"], "policy.prefetch_size": [1]}},
            "policy lru: no parameter 'prefetch_size=1'; there are: ",
        ),
        ({"grid": {"hardware": ["box"]}}, "no hardware named 'box'; there are: "),
        ({"hardware.link.x": 1}, "no key link.x; link has: h2d, "),
        ({"grid": {"hardware.gpu.launch_ns": [1, "fast"]}}, "gpu.launch_ns: Expected `int`"),
        ({"grid": {"batch": [1, "two"]}}, "Expected `int`, got `str` - at `batch`"),
        ({"grid": {"batch": [1, 0]}}, "batch is 0; legal are 1 or more"),
        ({"cache_ratio": 1.5}, "cache_ratio is 1.5; legal are 0..1"),
        ({"jitter": float("nan")}, "jitter: nan is too large, or no number"),
        ({"jitter": 1.5}, "jitter is 1.5; legal are 0..1"),
        ({"grid": {"trace.seed": [0, 1 << 63]}}, "trace.seed: 9223372036854775808 is too large"),
        ({"context": -1}, "context is -1; legal are 0..16777216"),
        ({"seed": -1}, "seed is -1; legal are 0..2147483647"),
        ({"bits": 7}, "bits is 7; legal are 16, 8, 4"),
        ({"machine": "fast"}, "machine is fast; legal are auto, simpy, compiled"),
        ({"stretch.gpu": 0}, "stretch of gpu: 0.0 is not in 0.01..100"),
        ({"trace.layers": "many"}, "trace.layers: Expected `int | null`, got `str`"),
        ({"policy": 5}, "Expected `str`, got `int` - at `policy`"),
        ({"grid": {"seed": LONG, "start": LONG}}, "has 1,002,001 points; legal are 1,000,000"),
    ],
)
def test_bad_grids_are_one_line(plain: dict[Any, Any], said: str) -> None:
    with pytest.raises(MoesimError) as caught:
        grid_of(plain)

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("grid: {seed: [1, 2]", "grid.yaml: line "),
        ("- 1", "grid.yaml: a grid has keys and values"),
        ("seed: 1\nseed: 2", "grid.yaml: line 2: key 'seed' is there twice"),
        ("a: &a [1]\ngrid: {seed: *a}", "grid.yaml: line 2: aliases are not allowed"),
        ("grid: {seed: !!python/name:os.system ''}", "grid.yaml: line 1: could not determine"),
        ("seed: 2026-01-01x", "grid.yaml: Expected `int`, got `str` - at `seed`"),
        ("#" * 1_000_001, "grid.yaml is larger than 1000000 bytes: no grid"),
    ],
)
def test_bad_files_are_one_line(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(MoesimError) as caught:
        read_grid(written(tmp_path, text))

    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MoesimError, match=r"cannot read .*none.yaml: No such file"):
        read_grid(tmp_path / "none.yaml")
