"""What a machine can do: bandwidths, latencies and measured tables, with their provenance."""

import hashlib
import math
import os
import re
from collections.abc import Hashable, Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec
import numpy as np
import yaml
from msgspec import Meta

from moesim.errors import ProfileError
from moesim.types import LANES, IntArray

SCHEMA = "moesim.hardware/1"
DEFAULT_PRESET = "rtx3090-pcie4-ddr4"
MAX_PROFILE_BYTES = 1_000_000
FULL_SPEED = 1024

Nanoseconds = Annotated[int, Meta(ge=0, le=10**12)]
Bytes = Annotated[int, Meta(ge=1, le=1 << 60)]
BytesPerSecond = Annotated[float, Meta(ge=1e3, le=1e18)]
FlopsPerSecond = Annotated[float, Meta(ge=1e3, le=1e21)]
Count = Annotated[int, Meta(ge=1, le=1 << 20)]
Tokens = Annotated[int, Meta(ge=1, le=1 << 24)]
MeasuredNanoseconds = Annotated[float, Meta(gt=0, le=1e15)]
FittedNanoseconds = Annotated[float, Meta(ge=0, le=1e15)]
Factor = Annotated[float, Meta(gt=0, le=1)]
Lane = Literal["gpu", "cpu", "h2d", "d2h", "disk"]


class Kernels(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How many kernels an operation launches; `expert` also counts for shared and dense FFNs."""

    attention: Count
    gate: Count
    expert: Count
    combine: Count
    head: Count


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The accelerator: its rates are those that kernels achieve, not those of the datasheet."""

    name: str
    memory_bytes: Bytes
    memory_bytes_per_s: BytesPerSecond
    flops_per_s: FlopsPerSecond
    """Dense bf16."""
    launch_ns: Nanoseconds
    """What one kernel costs on the device however little it does."""
    kernels: Kernels


class Cpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The processor that computes experts, and its memory."""

    name: str
    threads: Count
    memory_bytes: Bytes
    memory_bytes_per_s: BytesPerSecond
    """One long stream."""
    expert_bytes_per_s: BytesPerSecond
    """Weights of experts scattered over memory."""
    flops_per_s: FlopsPerSecond
    overhead_ns: Nanoseconds
    """Handing an expert to the threads and collecting them."""


class Channel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A copy takes `latency_ns` plus its bytes over the rate.

    `points` are what was measured, (bytes, ns), bytes ascending. Where latency and rate miss them,
    times are `interpolated`: they lie on the lines between the points, from the latency at no bytes
    on, and beyond the last one the rate counts.
    """

    latency_ns: Nanoseconds
    bytes_per_s: BytesPerSecond
    points: Annotated[tuple[tuple[Bytes, MeasuredNanoseconds], ...], Meta(max_length=64)] = ()
    interpolated: bool = False


class Link(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Host and GPU memory; pinned unless a channel says otherwise."""

    h2d: Channel
    d2h: Channel
    h2d_pageable: Channel | None = None
    chunk_bytes: Bytes
    """An urgent copy overtakes a background one at multiples of this."""


class Host(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the host program itself costs."""

    per_layer_ns: Nanoseconds
    per_launch_ns: Nanoseconds
    per_sync_ns: Nanoseconds
    decision_ns: Nanoseconds
    """All hooks of a policy in one layer step."""
    decision_ns_by_policy: dict[str, Nanoseconds] = {}


class Contention(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How far lanes slow down while all of `busy` are busy; lanes not named keep their speed.

    Two lanes make a factor of the product over pairs. Three or more replace that product for the
    lanes named, when exactly these are busy.
    """

    busy: Annotated[tuple[Lane, ...], Meta(min_length=2, max_length=len(LANES))]
    slow: dict[Lane, Factor]


class Provenance(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where numbers come from."""

    source: Literal["measured", "datasheet", "scaled"]
    """`scaled` numbers are derived: from others, from a paper's results, or set by hand."""
    note: str
    date: str = ""
    script: str = ""
    versions: dict[str, str] = {}
    repetitions: Annotated[int, Meta(ge=0)] = 0
    spread_pct: Annotated[float, Meta(ge=0, le=1e6)] = 0.0


class Origins(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The provenance of every section."""

    gpu: Provenance
    cpu: Provenance
    link: Provenance
    disk: Provenance
    host: Provenance
    interference: Provenance


class ExpertTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Times of one expert by tokens: `points` are (tokens, ns), tokens ascending."""

    hidden: Count
    width: Count
    bits: Literal[16, 8, 4, 2]
    points: Annotated[tuple[tuple[Tokens, MeasuredNanoseconds], ...], Meta(min_length=1)]
    provenance: Provenance


class AttentionTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Times of one layer's attention, norms and projections included.

    Rows are (tokens, ns, ns per token attended to), tokens ascending: so many new tokens take the
    first for themselves and the second for each token that one of them attends to, which in a
    prompt of n are n (n + 1) / 2. For latent attention `kv_heads` is `heads` and `head_dim` that of
    queries and keys.
    """

    hidden: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    prefill: Annotated[
        tuple[tuple[Tokens, FittedNanoseconds, FittedNanoseconds], ...], Meta(min_length=1)
    ]
    decode: Annotated[
        tuple[tuple[Tokens, FittedNanoseconds, FittedNanoseconds], ...], Meta(min_length=1)
    ]
    provenance: Provenance


class LayerTable(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Times of what a layer has beside attention and experts; `points` as in `ExpertTable`.

    `size` is the experts of a `gate`, the width of an `ffn` (shared experts together, or a layer
    without experts), top_k of `combine`, the vocabulary of the `head`, whose tokens are sequences.
    """

    kind: Literal["gate", "ffn", "combine", "head"]
    hidden: Count
    size: Count
    points: Annotated[tuple[tuple[Tokens, MeasuredNanoseconds], ...], Meta(min_length=1)]
    provenance: Provenance


class Tables(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Measured points, at most one table per shape and precision."""

    expert_gpu: tuple[ExpertTable, ...] = ()
    expert_cpu: tuple[ExpertTable, ...] = ()
    attention: tuple[AttentionTable, ...] = ()
    layer: tuple[LayerTable, ...] = ()


class HardwareProfile(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One machine. Raises ProfileError when its parts contradict each other."""

    schema: Literal["moesim.hardware/1"]
    name: str
    description: str
    gpu: Gpu
    cpu: Cpu
    link: Link
    disk: Channel
    host: Host
    interference: tuple[Contention, ...] = ()
    tables: Tables = Tables()
    provenance: Origins

    def __post_init__(self) -> None:
        """Raise ProfileError naming the entry that repeats or contradicts another."""
        sets: set[frozenset[str]] = set()
        for index, entry in enumerate(self.interference):
            where, busy = f"interference[{index}]", frozenset(entry.busy)
            if len(busy) < len(entry.busy):
                raise ProfileError(f"{where}.busy: names a lane twice: {', '.join(entry.busy)}")
            if busy in sets:
                raise ProfileError(f"{where}.busy: {', '.join(entry.busy)} has an entry already")
            if strange := sorted(set(entry.slow) - busy):
                raise ProfileError(f"{where}.slow: {strange[0]} is not among the busy lanes")
            sets.add(busy)
        for key in Tables.__struct_fields__:
            shapes = set()
            for index, table in enumerate(getattr(self.tables, key)):
                where = f"tables.{key}[{index}]"
                for rows in _ROWS.intersection(table.__struct_fields__):
                    _check_ascending(f"{where}.{rows}", "tokens", getattr(table, rows))
                if (shape := _shape(table)) in shapes:
                    raise ProfileError(f"{where}: there is a table for {shape} already")
                shapes.add(shape)
        for key, channel in (*_channels("link", self.link), ("disk", self.disk)):
            _check_ascending(f"{key}.points", "bytes", channel.points)

    def rates(self) -> IntArray:
        """Return (32, 5): 1/1024 of its speed of each lane for each set of busy lanes.

        Bit i of the row is lane i of `types.LANES`. Factors are rounded to 1/1024, the products
        of pairs down at each lane in order; a rate is at least 1, and 1024 where not busy.
        """
        pairs = np.full((len(LANES), len(LANES)), FULL_SPEED, np.int64)
        for entry in self.interference:
            if len(entry.busy) == 2:
                first, second = (LANES.index(lane) for lane in entry.busy)
                for lane, factor in entry.slow.items():
                    own = LANES.index(lane)
                    pairs[own, second if own == first else first] = _fixed_point(factor)
        rates = np.full((1 << len(LANES), len(LANES)), FULL_SPEED, np.int64)
        for mask in range(1 << len(LANES)):
            busy = [lane for lane in range(len(LANES)) if mask >> lane & 1]
            for own in busy:
                rate = FULL_SPEED
                for other in busy:
                    rate = rate * int(pairs[own, other]) // FULL_SPEED
                rates[mask, own] = max(1, rate)
        for entry in self.interference:
            if len(entry.busy) > 2:
                mask = sum(1 << LANES.index(lane) for lane in entry.busy)
                for lane, factor in entry.slow.items():
                    rates[mask, LANES.index(lane)] = _fixed_point(factor)
        return rates


def _fixed_point(factor: float) -> int:
    return max(1, round(factor * FULL_SPEED))


def _channels(where: str, link: Link) -> list[tuple[str, Channel]]:
    found = {f"{where}.{key}": getattr(link, key) for key in link.__struct_fields__}
    return [(key, value) for key, value in found.items() if isinstance(value, Channel)]


_ROWS = {"points", "prefill", "decode"}


def _check_ascending(where: str, what: str, rows: tuple[tuple[float, ...], ...]) -> None:
    at = [row[0] for row in rows]
    if at != sorted(set(at)):
        raise ProfileError(f"{where}: {what} must ascend, not {at}")


def _shape(table: ExpertTable | AttentionTable | LayerTable) -> tuple[int | str, ...]:
    if isinstance(table, ExpertTable):
        return table.hidden, table.width, table.bits
    if isinstance(table, LayerTable):
        return table.kind, table.hidden, table.size
    return table.hidden, table.heads, table.kv_heads, table.head_dim


def decision_ns(profile: HardwareProfile, policy: str) -> int:
    """Return what all hooks of a policy cost the host in one layer step."""
    return profile.host.decision_ns_by_policy.get(policy, profile.host.decision_ns)


def profile_digest(profile: HardwareProfile) -> str:
    """Return 16 hex digits that change with any number of the profile."""
    return hashlib.sha256(msgspec.json.encode(profile, order="deterministic")).hexdigest()[:16]


def profile_names() -> list[str]:
    """Return the names of the presets that ship with moesim."""
    folder = files("moesim.calibrate") / "profiles"
    return sorted(
        p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml")
    )


def user_profile_path() -> Path:
    """Return where this machine's calibrated profile is kept, whether it exists or not."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "moesim" / "hardware.yaml"


def load_profile(name_or_path: str | None) -> tuple[HardwareProfile, str]:
    """Return a preset, the profile of a YAML file or, with None, this machine's; and a notice.

    Without a calibrated profile None gives the default preset. The notice says which was taken
    where the caller did not, and is empty otherwise.

    Raises ProfileError listing the presets, or naming file and key of what is wrong.
    """
    if name_or_path is None:
        own = user_profile_path()
        if own.is_file():
            return _load_file(own), f"hardware: this machine's profile, {own}"
        notice = f"hardware: preset {DEFAULT_PRESET}, since this machine is not calibrated"
        return _load_preset(DEFAULT_PRESET), notice
    names = profile_names()
    if name_or_path.lower() in names:
        return _load_preset(name_or_path.lower()), ""
    path = Path(name_or_path)
    if path.is_file() or path.suffix in (".yaml", ".yml"):
        return _load_file(path), ""
    raise ProfileError(f"no hardware named {name_or_path!r}; there are: {', '.join(names)}")


def _load_preset(name: str) -> HardwareProfile:
    path = files("moesim.calibrate") / "profiles" / f"{name}.yaml"
    return parse_profile(path.read_text(encoding="utf-8"), name)


def _load_file(path: Path) -> HardwareProfile:
    return parse_profile(read_text(path, "hardware profile"), str(path))


def read_text(path: Path, what: str) -> str:
    """Return the text of a file that somebody wrote by hand; raise ProfileError in one line."""
    try:
        with path.open("rb") as file:
            content = file.read(MAX_PROFILE_BYTES + 1)
    except OSError as error:
        raise ProfileError(f"cannot read {path}: {error.strerror}") from None
    if len(content) > MAX_PROFILE_BYTES:
        raise ProfileError(f"{path} is larger than {MAX_PROFILE_BYTES} bytes: no {what}")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        raise ProfileError(f"{path} is not UTF-8 text") from None


class _Loader(yaml.SafeLoader):
    """YAML without aliases, which multiply, repeated keys, which hide, and dates."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not allowed", problem_mark=mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(
                        problem=f"key {key.value!r} is there twice", problem_mark=key.start_mark
                    )
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)

    def construct_number(self, node: Any) -> float:
        return _whole(self.construct_yaml_float(node))


_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_number)
_Loader.yaml_implicit_resolvers = {
    first: [rule for rule in rules if rule[0] != "tag:yaml.org,2002:timestamp"]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _whole(value: float) -> float:
    """Return 24.0e+9 as an integer, since byte counts are written so, too."""
    return int(value) if value.is_integer() and abs(value) < 1 << 62 else value


def parse_profile(text: str, origin: str) -> HardwareProfile:
    """Return the profile that a YAML text describes; `origin` names it in errors.

    Raises ProfileError in one line.
    """
    return _convert(parse_yaml(text, origin, "hardware profile"), origin)


def parse_yaml(text: str, origin: str, what: str) -> dict[Any, Any]:
    """Return the keys and values of a YAML text, without aliases, repeated keys and dates.

    Raises ProfileError in one line.
    """
    try:
        plain = yaml.load(text, _Loader)
    except RecursionError:
        raise ProfileError(f"{origin}: nested too deeply") from None
    except (yaml.YAMLError, ValueError) as error:
        raise ProfileError(f"{origin}: {_yaml_problem(error)}") from None
    if not isinstance(plain, dict):
        raise ProfileError(f"{origin}: a {what} has keys and values")
    return plain


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"line {error.problem_mark.line + 1}: {error.problem}"
    return " ".join(str(error).split())


def _convert(plain: object, origin: str) -> HardwareProfile:
    try:
        return msgspec.convert(plain, HardwareProfile)
    except msgspec.ValidationError as error:
        raise ProfileError(f"{origin}: {_explained(str(error))}") from None
    except ProfileError as error:
        raise ProfileError(f"{origin}: {error}") from None


def _explained(message: str) -> str:
    """Return msgspec's message with the dotted path first and what would be legal last."""
    what, _, where = message.partition(" - at `")
    path = where.rstrip("`").removeprefix("key` in `").removeprefix("$").removeprefix(".")
    if unknown := re.fullmatch("Object contains unknown field `(.*)`", what):
        struct = _struct_in(_kind_at(path))
        key = ".".join(filter(None, (path, unknown[1])))
        return (
            f"unknown key {key}; there are: {_listed(struct.__struct_fields__ if struct else ())}"
        )
    if missing := re.fullmatch("Object missing required field `(.*)`", what):
        return f"{'.'.join(filter(None, (path, missing[1])))} is missing"
    if bad := re.fullmatch("Invalid enum value (.*)", what):
        return f"{path}: no {bad[1]}; there are: {_listed(_literals_in(_kind_at(path)))}"
    if re.fullmatch("Expected `(int|float)`, got `str`", what):
        what += ": YAML reads 25e9 as text, write 25.0e+9"
    return f"{path}: {what}" if path else what


def _listed(names: Iterable[object]) -> str:
    return ", ".join(map(str, names))


def _kind_at(path: str) -> Any:
    """Return the type at a dotted path, with or without indices; None below a map."""
    kind: Any = HardwareProfile
    for part in filter(None, path.split(".")):
        struct = _struct_in(kind)
        kind = get_type_hints(struct)[part.partition("[")[0]] if struct else None
    return kind


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return kind
    return next(filter(None, map(_struct_in, get_args(kind))), None)


def _literals_in(kind: Any) -> tuple[object, ...]:
    if get_origin(kind) is Literal:
        return get_args(kind)
    return next(filter(None, map(_literals_in, get_args(kind))), ())


def with_overrides(profile: HardwareProfile, overrides: Mapping[str, str]) -> HardwareProfile:
    """Return the profile with values set by dotted path, as `link.h2d.bytes_per_s` to `55e9`.

    Values are read as YAML, exponents without a sign too; `x2` is twice the number that is there,
    rounded if that is a whole one. A channel of which rate or latency is set is not interpolated
    any more. The provenance of a section that was touched becomes `scaled`
    and says what was set.

    Raises ProfileError listing the keys at the level where a path fails, or naming a bad value.
    """
    plain = msgspec.to_builtins(profile)
    for path, text in overrides.items():
        *parents, last = path.split(".")
        table: Any = plain
        for depth, key in enumerate(parents):
            _check_key(table, key, parents[:depth], path)
            table = table[key]
        if not isinstance(table, dict) or _struct_in(_kind_at(".".join(parents))):
            _check_key(table, last, parents, path)
        if isinstance(table.get(last), dict):
            raise ProfileError(f"{path} is a section; there are: {', '.join(table[last])}")
        factor = _factor(text)
        if factor is not None and not isinstance(table.get(last), str):
            table[last] = _multiplied(path, table.get(last), factor)
            if factor == 1:
                continue
            what = f"times {text[1:].strip()}"
        else:
            table[last] = _value(path, text)
            what = f"set to {text}"
        if last in ("latency_ns", "bytes_per_s") and table.get("interpolated"):
            table["interpolated"] = False  # or the measured points would count in its place
            what += ", which counts in place of measured points,"
        section = path.partition(".")[0]
        if section in plain["provenance"]:
            origin = plain["provenance"][section]
            note = "; ".join(filter(None, (origin["note"], f"{path} {what} by hand")))
            plain["provenance"][section] = {**origin, "source": "scaled", "note": note}
    return _convert(plain, profile.name)


def _check_key(table: Any, key: str, parents: list[str], path: str) -> None:
    if not isinstance(table, dict):
        raise ProfileError(f"no key {path}: {'.'.join(parents)} has no keys")
    if key not in table:
        level = ".".join(parents) or "the profile"
        raise ProfileError(f"no key {path}; {level} has: {', '.join(table)}")


def _factor(text: str) -> float | None:
    """Return 2.0 for `x2`, None for what is no factor."""
    if not text.startswith("x"):
        return None
    try:
        return float(text[1:])
    except ValueError:
        return None


def _multiplied(path: str, value: object, factor: float) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ProfileError(f"{path}: a factor multiplies a number, and {value!r} is none")
    if not math.isfinite(factor):
        raise ProfileError(f"{path}: {factor} is no factor")
    return round(value * factor) if isinstance(value, int) else value * factor


def _value(path: str, text: str) -> Any:
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ProfileError(f"{path}: {_yaml_problem(error)}") from None
    try:
        return _whole(float(value)) if isinstance(value, str) else value
    except ValueError:
        return value
