"""The files that moesim's commands write, told apart by what is in them, and read strictly.

Only what a report shows is named here; whatever else a file holds is ignored.
"""

import gzip
import hashlib
import math
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from moesim.answers.store import ROWS_AT_ONCE, imported
from moesim.errors import InputError
from moesim.sim.metrics import TIMES
from moesim.types import CAUSES, LANES

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"
"""What such files begin with."""
MOST_BYTES = 1 << 29
"""What is larger, unpacked, is not read."""

Positive = Annotated[float, Meta(gt=0)]
Times = dict[str, int]
"""ns by what the GPU did or waited for."""


class Row(Struct, kw_only=True):
    """How fast a policy is at a budget and a batch: a row of `moesim compare`, or one replay."""

    policy: str
    batch: int
    budget_bytes: int
    tokens_per_s: Positive
    low: float | None = None
    high: float | None = None
    speedup: float | None = None
    ttft_ms: float
    tpot_ms: float | None = None
    makespan_ns: Annotated[int, Meta(gt=0)]
    hit_rate: float | None = None
    gain: float | None = None
    bound_tokens_per_s: float | None = None
    why: str = ""
    time_ns: Times
    hit_rate_by_layer: list[float | None] | None = None


class Identity(Struct, kw_only=True):
    """What identifies a run; digests have 16 hex digits."""

    moesim: str
    machine: str
    trace: str
    workload: str = ""
    model: str
    model_digest: str
    hardware: str
    hardware_digest: str
    budget_bytes: int
    bits: int
    seed: int
    jitter: float = 0.0
    layer_steps: int
    operations: int


class Prefetched(Struct):
    """What became of prefetches."""

    fetched: int
    used: int
    wasted_bytes: int


class Run(Struct, kw_only=True):
    """What `moesim replay --json` and `moesim real --json` print."""

    policy: str
    tokens_per_s: Positive
    ttft_ms: float
    tpot_ms: float | None
    makespan_ns: Annotated[int, Meta(gt=0)]
    time_ns: Times
    activations: dict[str, int]
    hit_rate: float | None
    hit_rate_by_layer: list[float | None]
    link_bytes: dict[str, int]
    lanes: dict[str, float]
    prefetch: Prefetched
    provenance: dict[str, float]
    sequences: int
    prompt_tokens: int
    output_tokens: int
    notices: list[str]
    run: Identity

    def __post_init__(self) -> None:
        """Raise ValueError, which msgspec turns into an error of its own, for missing causes."""
        for name, needed in (("time_ns", TIMES), ("lanes", LANES), ("link_bytes", CAUSES[1:])):
            missing = [key for key in needed if key not in getattr(self, name)]
            if missing:
                raise ValueError(f"{name} lacks {', '.join(missing)}")


class Ranked(Row, kw_only=True):
    """A row of `moesim compare`."""

    rank: int
    low: Positive
    high: Positive
    speedup_low: float | None
    speedup_high: float | None
    output_tokens: Annotated[int, Meta(gt=0)]
    link_bytes: int
    exposed_ns: int
    bound_tokens_per_s: Positive
    changes: list[str]
    notices: list[str]
    tied: list[str]


class Refused(Struct, kw_only=True):
    """A policy that cannot run where others can."""

    policy: str
    batch: int
    budget_bytes: int
    error: str


class Cell(Struct, kw_only=True):
    """What holds for all policies at a budget and a batch."""

    batch: int
    budget_bytes: int
    cache_ratio: float
    windows: int
    bound_tokens_per_s: Positive | None
    on_demand_tokens_per_s: float | None
    oracle_tokens_per_s: float | None


class Doubt(Struct):
    """By what share a section's numbers may be off, and why."""

    share: float
    source: str


class Doubts(Struct):
    """What certainty rests on."""

    sections: dict[str, Doubt]
    certain_from_deviations: float


class Compared(Struct, kw_only=True):
    """What `moesim compare --json` prints."""

    baseline: str
    cells: Annotated[list[Cell], Meta(min_length=1)]
    rows: list[Ranked]
    refused: list[Refused]
    notices: list[str]
    model: str
    hardware: str
    workload: dict[str, Any]
    uncertainty: Doubts


class Untried(Struct):
    """A policy that cannot run there."""

    policy: str
    error: str


class Candidate(Struct, kw_only=True):
    """A policy that `moesim advise` has tried."""

    policy: str
    decode_tokens_per_s: Positive
    prefill_tokens_per_s: Positive
    changes: str
    why: str


class Recommended(Candidate, kw_only=True):
    """The policy that it recommends, with ranges."""

    decode_low: float
    decode_high: float
    speedup: float | UnsetType = UNSET


class Upgrade(Struct, kw_only=True):
    """A better machine."""

    upgrade: str
    policy: str
    budget_bytes: int
    decode_tokens_per_s: Positive
    gain: float


class Engine(Struct, kw_only=True):
    """How an engine is set for that, and how fast it then is."""

    engine: str
    flags: str
    decode_tokens_per_s: Positive
    prefill_tokens_per_s: Positive
    loss: float
    notes: list[str]


class Precision(Struct, kw_only=True):
    """What the experts take in so many bits."""

    bits: int
    all_bytes: int
    host_fits: bool


class Memory(Struct, kw_only=True):
    """Who gets the GPU's memory, in bytes, and what would fit."""

    gpu: dict[str, int]
    missing: int
    host_missing: int
    most_context: int
    by_bits: Annotated[list[Precision], Meta(min_length=1)]


class Limits(Struct, kw_only=True):
    """What the recommended policy's time goes to, in shares, and what a slower machine costs."""

    why: str
    slower_by_10_percent: dict[str, float]
    time: dict[str, float]


class Advised(Struct, kw_only=True):
    """What `moesim advise --json` prints."""

    moesim: str
    model: str
    model_digest: str
    hardware: str
    hardware_digest: str
    context: int
    bits: int
    batch: int
    fits: str
    memory: Memory
    recommended: Recommended | None
    candidates: list[Candidate]
    refused: list[Untried]
    limits: Limits | None
    upgrades: list[Upgrade]
    engines: list[Engine]
    workload: dict[str, Any] | None
    notices: list[str]


class Point(Struct, kw_only=True):
    """A row of a sweep: what was swept, and what came of it."""

    swept: dict[str, Any]
    row: Row | None
    error: str | None


class Swept(Struct):
    """The table that `moesim sweep` writes."""

    points: list[Point]
    shared: dict[str, Any] = {}
    """What identifies its runs and is the same for all, as the model."""


class Both(Struct):
    """A number that was measured several times, and simulated."""

    measured: float | None
    simulated: float | None
    spread: float | None = None
    repeats: list[float | None] = []


class Part(Struct):
    """What a cause makes of an error, as a share of the makespan."""

    measured: float | None
    simulated: float | None
    part: float | None


class Checked(Struct, kw_only=True):
    """One policy, measured and simulated."""

    policy: str
    tpot_error: float | None
    ttft_error: float | None
    tokens_per_s_error: float | None
    tpot_ms: Both
    ttft_ms: Both
    tokens_per_s: Both
    makespan_ns: Both
    time_ns: dict[str, Part]
    explains: str


class Validated(Struct, kw_only=True):
    """What `moesim validate --json` prints."""

    policies: Annotated[list[Checked], Meta(min_length=1)]
    ranked_by: str
    kendall_tau: float | None
    swapped: list[dict[str, Any]]
    device: str
    device_name: str
    hardware: str
    hardware_digest: str
    provenance: dict[str, float]
    model: str
    workload: dict[str, Any]
    repeats: int
    machine: dict[str, Any]
    notices: list[str]


class Event(Struct):
    """An event of a Chrome trace; times are in microseconds."""

    ph: str
    name: str = ""
    cat: str = ""
    pid: int | str = 0
    tid: int | str = 0
    ts: float = 0.0
    dur: Annotated[float, Meta(ge=0)] = 0.0
    args: dict[str, Any] = {}


class Timed(Struct):
    """What `--timeline` writes."""

    traceEvents: list[Event]  # noqa: N815 - as Chrome spells it


class Kind(NamedTuple):
    """What tells a JSON document from others, its form, and the command that writes it."""

    keys: frozenset[str]
    form: type[Struct]
    command: str


KINDS = (
    Kind(frozenset({"policy", "tokens_per_s", "time_ns", "run"}), Run, "replay --json"),
    Kind(frozenset({"baseline", "cells", "rows", "refused"}), Compared, "compare --json"),
    Kind(frozenset({"policies", "kendall_tau", "repeats"}), Validated, "validate --json"),
    Kind(frozenset({"candidates", "recommended", "fits"}), Advised, "advise --json"),
    Kind(frozenset({"traceEvents"}), Timed, "replay --timeline"),
)


class Document(NamedTuple):
    """Something to report on."""

    name: str
    content: Any
    """A struct of `KINDS`."""
    digest: str = ""
    """16 hex digits of the SHA-256 of the file, empty for what came from no file."""


def read_document(path: Path) -> Document:
    """Read a file that a command of moesim has written; raise InputError for any other."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        unpacked = data
        if data.startswith(GZIP):
            with gzip.open(path) as packed:
                unpacked = packed.read(MOST_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path}: cannot be read: {why}") from None
    if len(unpacked) > MOST_BYTES:
        raise InputError(f"{path}: has more than {MOST_BYTES >> 20} MiB; a report takes less")
    digest = hashlib.sha256(data).hexdigest()[:16]
    if data.startswith(PARQUET):
        return Document(path.name, read_sweep(path), digest)
    try:
        found = msgspec.json.decode(unpacked)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is no JSON: {error}; {takes()}") from None
    return Document(path.name, understood(found, str(path)), digest)


def read_sweep(path: Path) -> Swept:
    """Read the table of a sweep; raise InputError for any other, and without pyarrow."""
    parquet = imported("pyarrow.parquet")
    try:
        with parquet.ParquetFile(path) as file:
            blocks = file.iter_batches(ROWS_AT_ONCE)
            return points_of((row for block in blocks for row in block.to_pylist()), str(path))
    except (OSError, ValueError, NotImplementedError) as error:  # bases of pyarrow's own errors
        raise InputError(f"{path}: cannot be read: {str(error).partition(chr(10))[0]}") from None


def points_of(rows: Iterable[Mapping[str, Any]], name: str) -> Swept:
    """Return the rows of a sweep in their form; raise InputError for any others."""
    unknown = InputError(f"{name}: is no table of `moesim sweep`; {takes()}")
    points: list[Point] = []
    keys: list[str] = []
    shared: dict[str, set[Any]] = {key: set() for key in Identity.__struct_fields__}
    for row in rows:
        if not {"point", "error"} <= row.keys():
            raise unknown
        if not points:
            columns = list(row)
            keys = columns[: columns.index("point")]
        own = None
        if row["error"] is None:
            try:
                own = msgspec.convert(nested(row), Row)
            except msgspec.ValidationError as error:
                raise InputError(f"{name}: is no table of `moesim sweep`: {error}") from None
            for key, values in shared.items():
                if len(values) < 2:
                    values.add(row.get(f"run.{key}"))
        points.append(Point(swept={key: row[key] for key in keys}, row=own, error=row["error"]))
    if not points:
        raise unknown
    one = {key: values.pop() for key, values in shared.items() if len(values) == 1}
    return Swept(points, {key: str(value) for key, value in one.items() if value is not None})


def nested(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a sweep in the form of `Row`."""
    times = {
        key.removeprefix("time_ns."): value
        for key, value in row.items()
        if key.startswith("time_ns.") and value is not None
    }
    own = {
        key: value
        for key, value in row.items()
        if not (isinstance(value, float) and math.isnan(value))
    }
    return own | {
        "policy": row.get("run.policy"),
        "batch": row.get("sequences"),
        "budget_bytes": row.get("run.budget_bytes"),
        "time_ns": times,
    }


def understood(found: Any, name: str) -> Struct:
    """Return what a command printed in its form; raise InputError for what none prints."""
    for kind in KINDS:
        if isinstance(found, dict) and kind.keys <= found.keys():
            try:
                return msgspec.convert(found, kind.form)
            except msgspec.ValidationError as error:
                raise InputError(f"{name}: is not from `moesim {kind.command}`: {error}") from None
    raise InputError(f"{name}: is not known; {takes()}")


def takes() -> str:
    """Return what a report takes, in words."""
    commands = [*(kind.command for kind in KINDS), "sweep"]
    return f"a report takes what `moesim {'`, `'.join(commands)}` write"
