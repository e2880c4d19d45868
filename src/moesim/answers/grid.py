"""A grid: what is swept, over what, and the points that come of it.

A grid file is YAML: fields of a point, which are the same for all points, and under `grid` and
`zip` lists of them. Lists of `grid` are crossed. `zip` is a list of groups; the lists of a group
have one length and go together. Beside the fields of `points.Point` there are

    hardware.<path>       a number of the hardware profile, or a factor on it, as x2
    stretch.<section>     a factor on what a section of the machine takes
    policy.<parameter>    a parameter, added to those that `policy` has
    trace.<argument>      of a trace that is made up; see `traces.synthetic.synthesize`

Paths of files are relative to the grid's own folder.
"""

import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import msgspec

from moesim.answers.inputs import MAX_CONTEXT
from moesim.answers.points import Point, changed, digest, kept_profile
from moesim.answers.stretch import SECTIONS, check_sections
from moesim.errors import InputError, MoesimError
from moesim.model import model_names
from moesim.policies.registry import choose
from moesim.profile import (
    DEFAULT_PRESET,
    parse_yaml,
    profile_names,
    read_text,
    user_profile_path,
    with_overrides,
)
from moesim.run import MAX_SEED
from moesim.sim.engine import WANTED
from moesim.traces.synthetic import synthesize

MOST_POINTS = 1_000_000
TABLES = {"hardware": "settings", "stretch": "stretch", "trace": "synth"}
"""Fields of a point that hold several things, by what their keys begin with in a grid."""
FIELDS = tuple(name for name in Point.__struct_fields__ if name not in TABLES.values())
ARGUMENTS = tuple(inspect.signature(synthesize).parameters)
MOST_NUMBER = 1 << 63
"""A number is less: tables have 64 bits."""


class Axis(NamedTuple):
    """Keys that change together; each of the values has one for every key."""

    keys: tuple[str, ...]
    values: tuple[tuple[Any, ...], ...]


class Grid(msgspec.Struct, frozen=True):
    """What is swept. `fixed` is the same for all points; axes are crossed, the last one fastest."""

    fixed: dict[str, Any]
    axes: tuple[Axis, ...]
    folder: Path

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that are swept."""
        return tuple(key for axis in self.axes for key in axis.keys)

    @property
    def count(self) -> int:
        """How many points there are."""
        return math.prod(len(axis.values) for axis in self.axes)

    def swept(self) -> Iterator[dict[str, Any]]:
        """Return the values of each point as they were written, by swept key."""
        for chosen in product(*(axis.values for axis in self.axes)):
            values = [value for together in chosen for value in together]
            yield dict(zip(self.keys, values, strict=True))

    def point(self, values: Mapping[str, Any]) -> Point:
        """Return the point of some swept values; raise InputError for one of a wrong type."""
        plain: dict[str, Any] = {name: {} for name in TABLES.values()}
        parameters: list[str] = []
        for key, value in {**self.fixed, **values}.items():
            head, dot, rest = key.partition(".")
            if not dot:
                plain[key] = value
            elif head == "policy":
                parameters.append(f"{rest}={text_of(value)}")
            else:
                plain[TABLES[head]][rest] = text_of(value) if head == "hardware" else value
        policy = self.file(plain.get("policy", "dali"), is_python)
        if parameters and isinstance(policy, str):
            policy += ("," if ":" in policy else ":") + ",".join(parameters)
        plain["policy"] = policy
        plain["hardware"] = self.hardware(plain.get("hardware"))
        if plain.get("trace") is not None:
            plain["trace"] = self.file(plain["trace"], lambda _: True)
        if plain.get("model") is not None:
            plain["model"] = self.file(plain["model"], self.is_model_file)
        try:
            return msgspec.convert(plain, Point)
        except msgspec.ValidationError as error:
            raise InputError(f"{error}".replace(" - at `$.", " - at `")) from None

    def hardware(self, name: Any) -> Any:
        """Return a machine by name or path; None is this one, which other machines are not."""
        if name is None:
            own = user_profile_path()
            return str(own) if own.is_file() else DEFAULT_PRESET
        return self.file(name, self.is_profile)

    def file(self, name: Any, is_file: Callable[[str], bool]) -> Any:
        """Return a name, or the whole path of a file."""
        if not isinstance(name, str) or not is_file(name):
            return name
        # As pathlib does it, but for a million points.
        return os.path.abspath(os.path.join(self.folder, name))

    def is_profile(self, name: str) -> bool:
        """Say whether a machine is the profile of a file."""
        if name.lower() in kept_names("hardware"):
            return False
        return name.endswith((".yaml", ".yml")) or (self.folder / name).is_file()

    def is_model_file(self, name: str) -> bool:
        """Say whether a model is one that lies beside the grid."""
        return name.lower() not in kept_names("model") and (self.folder / name).exists()


@cache
def kept_names(what: str) -> tuple[str, ...]:
    """Return the names of machines or models that ship with moesim."""
    return tuple(profile_names() if what == "hardware" else model_names())


def is_python(policy: str) -> bool:
    """Say whether a policy is one of a file."""
    return policy.partition(":")[0].endswith(".py")


def text_of(value: Any) -> str:
    """Return a value as it is written in YAML."""
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def read_grid(path: Path) -> Grid:
    """Return the grid of a YAML file; raise InputError, in one line, for a bad one."""
    plain = parse_yaml(read_text(path, "grid"), str(path), "grid")
    try:
        return grid_of(plain, path.parent)
    except MoesimError as error:
        raise InputError(f"{path}: {error}") from None


def grid_of(plain: Mapping[str, Any], folder: Path | str = ".") -> Grid:
    """Return the grid that a file with such keys and values describes; see the module.

    Every value is tried once, with the first ones of all other lists. Raises InputError naming the
    key that is not known, repeated, or has a value that is not legal.
    """
    crossed = plain.get("grid") or {}
    groups = plain.get("zip") or []
    if isinstance(groups, Mapping):
        groups = [groups]
    if not isinstance(crossed, Mapping):
        raise InputError("grid: write keys, each with a list of values")
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        raise InputError("zip: write a list of groups, each of keys with a list of values")
    fixed = {key: value for key, value in plain.items() if key not in ("grid", "zip")}
    for key, value in fixed.items():
        check_key(key)
        if isinstance(value, list):
            raise InputError(f"{key} has a list of values: write it under grid, or zip")
        check_scalar(key, value)
    axes = [axis_of({key: values}) for key, values in crossed.items()]
    axes += [axis_of(group) for group in groups]
    grid = Grid(fixed, tuple(axes), Path(folder))
    seen = [*fixed, *grid.keys]
    if repeated := [key for key in seen if seen.count(key) > 1]:
        raise InputError(f"{repeated[0]} is there twice; a key has one place")
    if {"budget", "cache_ratio"} <= set(seen):
        raise InputError("budget and cache_ratio exclude each other")
    if grid.count > MOST_POINTS:
        raise InputError(f"the grid has {grid.count:,} points; legal are {MOST_POINTS:,}")
    check_points(grid)
    return grid


def axis_of(group: Mapping[str, Any]) -> Axis:
    """Return the axis of keys whose lists go together."""
    lengths = {}
    for key, values in group.items():
        check_key(key)
        if not isinstance(values, list) or not values:
            raise InputError(f"{key}: write a list of values, as [1, 2]; not {text_of(values)!r}")
        for value in values:
            check_scalar(key, value)
        lengths[key] = len(values)
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{key} has {length}" for key, length in lengths.items())
        raise InputError(f"lists of a group of zip go together: {told} values")
    if not group:
        raise InputError("a group of zip is empty: write keys, each with a list of values")
    values = list(zip(*group.values(), strict=True))
    texts = [msgspec.json.encode(value) for value in values]
    if len(set(texts)) < len(texts):
        again = next(v for i, v in enumerate(values) if texts[i] in texts[:i])
        raise InputError(f"{', '.join(group)}: {', '.join(map(text_of, again))} is there twice")
    return Axis(tuple(group), tuple(values))


def check_key(key: Any) -> None:
    """Raise InputError for what cannot be swept, listing what can."""
    head, dot, rest = str(key).partition(".")
    if not dot and head in FIELDS:
        return
    legal = {"hardware": (rest,), "policy": (rest,), "stretch": SECTIONS, "trace": ARGUMENTS}
    if dot and head in legal:
        if rest and rest in legal[head]:
            return
        there = ", ".join(f"{head}.{name}" for name in legal[head] if name) or f"{head}.<name>"
        raise InputError(f"no key {key!r}; there are: {there}")
    raise InputError(
        f"no key {key!r}; there are: {', '.join(FIELDS)}, hardware.<path of a number>, "
        "policy.<parameter>, stretch.<section>, trace.<argument of moesim trace synth>, "
        "and for lists grid and zip"
    )


def check_scalar(key: str, value: Any) -> None:
    """Raise InputError for a value that is none by itself."""
    if not isinstance(value, str | int | float | None):
        raise InputError(f"{key}: {value!r} is no number and no text")
    if isinstance(value, int | float) and not -MOST_NUMBER <= value < MOST_NUMBER:
        raise InputError(f"{key}: {value} is too large, or no number")


def check_points(grid: Grid) -> None:
    """Try every value once; raise InputError for one that is not legal."""
    chosen = cache(choose)
    first = [axis.values[0] for axis in grid.axes]
    machines: set[tuple[Any, ...]] = set()
    for at, axis in enumerate(grid.axes or (Axis((), ((),)),)):
        for together in axis.values:
            values = [*first[:at], together, *first[at + 1 :]]
            flat = [value for values_of_axis in values for value in values_of_axis]
            point = grid.point(dict(zip(grid.keys, flat, strict=True)))
            chosen(point.policy)
            check_numbers(point)
            digest(point)  # loads what is named
            machine = (point.hardware, *sorted(point.settings.items()))
            if machine not in machines:
                machines.add(machine)
                hardware = point.hardware or ""
                with_overrides(kept_profile(hardware, changed(hardware)), point.settings)


def check_numbers(point: Point) -> None:
    """Raise InputError for numbers that no point can have."""
    check_sections(point.stretch)
    for name, value, least, most in (
        ("cache_ratio", point.cache_ratio, 0, 1),
        ("batch", point.batch, 1, None),
        ("prompt", point.prompt, 1, None),
        ("generate", point.generate, 1, None),
        ("start", point.start, 0, None),
        ("layers", point.layers, 1, None),
        ("context", point.context, 0, MAX_CONTEXT),
        ("seed", point.seed, 0, MAX_SEED),
        ("jitter", point.jitter, 0, 1),
    ):
        if value is not None and not (least <= value and (most is None or value <= most)):
            legal = f"{least}..{most}" if most is not None else f"{least} or more"
            raise InputError(f"{name} is {value}; legal are {legal}")
    for name, text, words in (
        ("bits", point.bits, (16, 8, 4)),
        ("machine", point.machine, WANTED),
    ):
        if text not in words:
            raise InputError(f"{name} is {text}; legal are {', '.join(map(str, words))}")
    if point.synth and point.trace is not None:
        raise InputError("trace and trace.<argument> exclude each other")
    hints = get_type_hints(synthesize)
    for name, value in point.synth.items():
        try:
            msgspec.convert(value, hints[name])
        except msgspec.ValidationError as error:
            raise InputError(f"trace.{name}: {error}") from None
