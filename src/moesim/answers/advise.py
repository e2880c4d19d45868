"""What to do on a machine with a model: the fastest policy, what limits it, what would help.

Nothing is guessed: every speed is that of a replay; `phases` says of which.
"""

import html
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

from moesim import __version__
from moesim.answers.compare import names_in, policies_of
from moesim.answers.engines import EngineSetting, settings_for
from moesim.answers.inputs import MAX_CONTEXT, RESERVE_BYTES
from moesim.answers.memory import (
    LEAST_CONTEXT,
    PRECISIONS,
    Question,
    fits,
    lacks,
    memory_of,
    naive_of,
)
from moesim.answers.phases import (
    DECODE,
    PROMPT,
    Clock,
    Kind,
    Measured,
    Progress,
    Scene,
    loaded,
    made_up,
    scene_of,
)
from moesim.answers.result import frame_of
from moesim.answers.ties import CERTAIN, Timed, doubt, own_doubt
from moesim.answers.uncertainty import uncertainty_of
from moesim.answers.verdict import FUTURE
from moesim.errors import InputError
from moesim.model import ModelSpec, load_model, model_digest
from moesim.profile import HardwareProfile, load_profile, profile_digest, with_overrides
from moesim.traces.format import Trace

if TYPE_CHECKING:
    import pandas as pd

BASELINE = "static"
"""What llama.cpp's --n-cpu-moe does: the experts of the last layers on the GPU, all others not."""
POLICIES = (
    "hybrimoe", "dali:swap=guarded", "fate", "lru", "fiddler",
    "static:by=expert,order=popularity", BASELINE,
)  # fmt: skip
"""Those that came first or close to it on some machine, besides the settings of engines."""
WHOLE = "all-gpu"
SECTIONS = ("gpu", "cpu", "link", "host")
"""Sections of the machine that a run without a disk rests on."""
WORTH = 1.02
"""A setting that changes results is shown if it is so many times as fast."""
UNCHANGED = 0.005
"""A share of the speed that is no difference."""
TOP = 2
"""So many of the fastest policies are tried with each upgrade."""
GIB = 1 << 30


class Advice:
    """What `moesim advise` found. `data` holds everything that `moesim advise --json` prints."""

    def __init__(self, data: dict[str, Any]) -> None:
        """Take what was found."""
        self.data = data

    @property
    def fits(self) -> str:
        """`wholly`, `partly`, or `no`: then nothing was simulated."""
        return str(self.data["fits"])

    @property
    def policy(self) -> str | None:
        """The fastest policy; None if the model does not fit."""
        found = self.data["recommended"]
        return None if found is None else str(found["policy"])

    @property
    def tokens_per_s(self) -> float | None:
        """In decode, of all sequences; None if the model does not fit."""
        found = self.data["recommended"]
        return None if found is None else float(found["decode_tokens_per_s"])

    def frame(self) -> "pd.DataFrame":
        """Return one row per policy, the fastest in decode first."""
        return frame_of(self.data["candidates"])

    def __repr__(self) -> str:
        """Return the answer in one line."""
        return headline(self.data)

    def _repr_html_(self) -> str:
        """Return the answer and the policies, for notebooks."""
        rows = "".join(
            f"<tr><td>{html.escape(row['policy'])}</td><td>{row['decode_tokens_per_s']:.1f}</td>"
            f"<td>{row['prefill_tokens_per_s']:.0f}</td><td>{html.escape(row['changes'])}</td></tr>"
            for row in self.data["candidates"]
        )
        return (
            f"<p><b>{html.escape(headline(self.data))}</b></p><table><tr><th>policy</th>"
            "<th>decode, tokens/s</th><th>prefill, tokens/s</th><th>changes results</th></tr>"
            f"{rows}</table>"
        )


class Upgrade(NamedTuple):
    """A better machine."""

    name: str
    settings: Mapping[str, str]
    stretch: Mapping[str, float]
    """In place of settings where times were measured, which no rate changes."""


def advise(
    model: ModelSpec | str, *, hardware: HardwareProfile | str | None = None,
    trace: Trace | Path | str | None = None, context: int = 4096, bits: int = 16, batch: int = 1,
    settings: Mapping[str, Any] | None = None, policies: str | Sequence[str] | None = None,
    allow_changes: bool = False, jobs: int | None = None, machine: str = "auto",
    progress: Progress | None = None,
) -> Advice:  # fmt: skip
    """Say which policy and settings are fastest for a model on a machine: `moesim advise`.

    `hardware` None is this machine's profile, or else a preset; `trace` None is routing made up
    after statistics. Each of `batch` sequences has `context` tokens. `policies` are compared in
    place of `POLICIES`, `all` being all that ship with moesim; those that change the model's
    results are recommended only if `allow_changes` says so, those that see the future never. Where
    all experts fit on the GPU, none of them is replayed. `jobs` processes work, by default one
    per core; `progress` is called with the replays done and those in all so far.

    Raises MoesimError, in one line, for what is not there or not legal; what does not fit is an
    answer.
    """
    if not LEAST_CONTEXT <= context <= MAX_CONTEXT:
        raise InputError(f"context {context} is not in {LEAST_CONTEXT}..{MAX_CONTEXT}")
    if not 1 <= batch <= PROMPT:
        raise InputError(f"batch {batch} is not in 1..{PROMPT}")
    if bits not in PRECISIONS:
        raise InputError(f"bits {bits!r}: legal are {', '.join(map(str, PRECISIONS))}")
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs is {jobs}; it must be at least 1")
    if isinstance(policies, str):
        policies = names_in(policies)
    chosen = policies_of([*(POLICIES if policies is None else policies), BASELINE])
    specs = [one.spec for one in chosen]
    spec = load_model(model) if isinstance(model, str) else model
    profile, notice = (
        (hardware, "") if isinstance(hardware, HardwareProfile) else load_profile(hardware)
    )
    texts = {key: str(value) for key, value in (settings or {}).items()}
    asked = Question(spec, with_overrides(profile, texts), context, bits, batch)
    memory = memory_of(asked)
    data: dict[str, Any] = {
        "moesim": __version__,
        "model": spec.name,
        "model_digest": model_digest(spec),
        "hardware": asked.profile.name,
        "hardware_digest": profile_digest(asked.profile),
        "context": context,
        "bits": bits,
        "batch": batch,
        "fits": fits(memory),
        "memory": memory,
        "recommended": None,
        "baseline": None,
        "candidates": [],
        "refused": [],
        "limits": None,
        "upgrades": [],
        "naive": naive_of(asked),
        "engines": [],
        "workload": None,
        "uncertainty": {},
        "notices": [notice] if notice else [],
    }
    if data["fits"] == "no":
        return Advice(data)
    routing, said = made_up(spec, context, batch) if trace is None else (loaded(trace, spec), "")
    data["notices"] += [said] if said else []
    clock = Clock(jobs, progress)
    with TemporaryDirectory(prefix="moesim-advise-") as folder:
        scene = scene_of(asked, routing, Path(folder), machine)
        data["workload"] = {
            "trace": routing.digest(),
            "made_up": trace is None,
            "prefill_tokens": scene.prompt,
            "warm_tokens": scene.warm,
            "decode_tokens": DECODE,
            "measured_tokens": DECODE - DECODE // 2,
        }
        data |= answers(scene, memory, specs, clock, allow_changes=allow_changes)
    data["notices"] += [
        *data.pop("said"),
        "KV cache and weights outside the experts in 16 bit, "
        f"{RESERVE_BYTES / GIB:.0f} GiB left for activations and the runtime",
        "ranges: the machine's numbers off by "
        + ", ".join(f"{share:.0%} ({name})" for name, share in data["uncertainty"].items())
        + f", {CERTAIN:.0f} standard deviations",
        "upgrades change what they name and nothing else: how lanes slow each other down is kept",
    ]
    if data["fits"] == "wholly" and policies is not None:
        data["notices"].append(
            f"all experts fit on the GPU, where policies do not differ: {WHOLE} stands for them all"
        )
    if any(row["gain"] < -UNCHANGED for row in data["upgrades"]):
        data["notices"].append(
            "an upgrade with a loss: policies decide otherwise there, and those tried no better"
        )
    return Advice(data)


def answers(
    scene: Scene, memory: Mapping[str, Any], specs: Sequence[str], clock: Clock, *,
    allow_changes: bool,
) -> dict[str, Any]:  # fmt: skip
    """Return everything that replays say."""
    asked = scene.asked
    budget = int(memory["budget_bytes"])
    whole = memory["experts"] == memory["all_experts"]
    if whole:
        specs = [WHOLE, BASELINE]
    engines = settings_for(
        asked.spec, asked.bits, budget, context=asked.context, batch=asked.batch,
        threads=asked.profile.cpu.threads, prompt=scene.prompt * asked.batch,
    )  # fmt: skip
    runs = [((name, budget), (name, budget)) for name in specs]
    runs += [
        ((one.policy, one.budget_bytes), (one.prefill_policy, one.prefill_bytes)) for one in engines
    ]
    first = clock.run(
        [
            task
            for decode, prefill in runs
            for task in (scene.task("decode", *decode), scene.task("prefill", *prefill))
        ]
    )
    pairs = list(zip(first[::2], first[1::2], strict=True))
    candidates, refused = candidates_of(specs, pairs)
    if not candidates:
        raise InputError(f"no policy can run: {refused[0]['error']}")
    legal = [
        row
        for row in candidates
        if not row["changes"] or (allow_changes and FUTURE not in row["changes"])
    ]
    if not legal:
        raise InputError("every policy that can run changes results: --allow-changes recommends it")
    best = legal[0] if not whole else next(r for r in legal if r["policy"] == WHOLE)
    own = str(best["policy"])
    uncertain = {
        name: share for name, share in uncertainty_of(asked.profile).items() if name in SECTIONS
    }
    better = upgrades_of(asked, whole=whole)
    tried = [row["policy"] for row in legal[:TOP]]
    parts: tuple[tuple[Kind, str], ...] = (("decode", own), ("prefill", own), ("decode", BASELINE))
    wants = [
        scene.task(kind, policy, budget, stretch={name: 1 + share})
        for kind, policy in parts
        for name, share in uncertain.items()
    ]
    stretched = len(wants)
    plans = [
        (upgrade, policy, size)
        for upgrade in better
        for size in [upgraded_budget(asked, upgrade)]
        for policy in (*tried, *([WHOLE] if size >= asked.all_bytes else []))
    ]
    wants += [
        scene.task("decode", policy, size, upgrade.settings, upgrade.stretch)
        for upgrade, policy, size in plans
    ]
    second = clock.run(wants)
    by_policy = dict(zip(specs, pairs, strict=False))
    own_decode, own_prefill = by_policy[own]
    timed = [
        timed_of(one, dict(zip(uncertain, second[at : at + len(uncertain)], strict=True)))
        for one, at in zip(
            (own_decode, own_prefill, by_policy[BASELINE][0]),
            range(0, stretched, len(uncertain)),
            strict=True,
        )
    ]
    return {
        "recommended": recommended_of(best, timed, by_policy[BASELINE][0]),
        "baseline": next((r for r in candidates if r["policy"] == BASELINE), None),
        "candidates": candidates,
        "refused": refused,
        "limits": limits_of(own_decode, timed[0], uncertain),
        "upgrades": rows_of_upgrades(plans, second[stretched:], own_decode.tokens_per_s, better),
        "engines": rows_of_engines(engines, pairs[len(specs) :], own_decode.tokens_per_s, own),
        "uncertainty": uncertain,
        "said": own_decode.detail["notices"],
    }


def candidates_of(
    specs: Sequence[str], pairs: Sequence[tuple[Measured, Measured]]
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Return a row per policy that can run, the fastest in decode first, and those that cannot."""
    rows, refused = [], []
    for name, (decode, prefill) in zip(specs, pairs, strict=False):
        if error := decode.error or prefill.error:
            refused.append({"policy": name, "error": error})
            continue
        rows.append(
            {
                "policy": name,
                "decode_tokens_per_s": decode.tokens_per_s,
                "prefill_tokens_per_s": prefill.tokens_per_s,
                "decode_ns": decode.ns,
                "prefill_ns": prefill.ns,
                "changes": decode.detail["changes"],
                "why": decode.detail["why"],
            }
        )
    rows.sort(key=lambda row: (-row["decode_tokens_per_s"], row["policy"]))
    return rows, refused


def timed_of(own: Measured, stretched: Mapping[str, Measured]) -> Timed:
    """Return a time, and how it grows with each section of the machine that may be slower."""
    shifts = {
        name: math.log(slower.ns / own.ns) for name, slower in stretched.items() if not slower.error
    }
    return Timed((own.ns,), (own.tokens,), shifts)


def recommended_of(
    best: Mapping[str, Any], timed: Sequence[Timed], baseline: Measured
) -> dict[str, Any]:
    """Return the row of the fastest policy with ranges, and how it compares with the baseline."""
    decode, prefill, base = timed

    def around(value: float, deviation: float, name: str) -> dict[str, float]:
        factor = math.exp(CERTAIN * deviation)
        return {f"{name}low": value / factor, f"{name}high": value * factor}

    found = {**best, **around(decode.tokens_per_s, own_doubt(decode), "decode_")}
    found |= around(prefill.tokens_per_s, own_doubt(prefill), "prefill_")
    if not baseline.error:
        ratio = decode.tokens_per_s / base.tokens_per_s
        found |= {"speedup": ratio, **around(ratio, doubt(decode, base), "speedup_")}
    return found


def limits_of(own: Measured, timed: Timed, uncertain: Mapping[str, float]) -> dict[str, Any]:
    """Return what the time went to, and what each section costs if it takes 10 % longer.

    That is read off the replays in which it takes as much longer as it may be off.
    """
    slower = {
        name: timed.shifts[name] / math.log1p(uncertain[name]) * math.log(1.1)
        for name in timed.shifts
    }
    costs = {name: math.expm1(shift) for name, shift in slower.items()}
    most = max(costs, key=lambda name: costs[name])
    total = own.ns
    return {
        "section": most,
        "slower_by_10_percent": costs,
        "why": own.detail["why"],
        "time": {name: ns / total for name, ns in own.detail["time_ns"].items() if ns},
        "lanes": {name: share for name, share in own.detail["lanes"].items() if share},
    }


def upgrades_of(asked: Question, *, whole: bool) -> list[Upgrade]:
    """Return the machines that people think of buying; `whole`: all experts fit on the GPU."""
    if whole:
        return [Upgrade("GPU twice as fast", {}, {"gpu": 0.5})]
    link, tables = asked.profile.link, asked.profile.tables
    now = asked.profile.gpu.memory_bytes
    by_link = ("link.h2d.bytes_per_s", "link.d2h.bytes_per_s")
    by_cpu = ("cpu.memory_bytes_per_s", "cpu.expert_bytes_per_s")
    measured_link = link.h2d.interpolated or link.d2h.interpolated
    return [
        twice_as_fast("PCIe one generation up", by_link, "link" if measured_link else ""),
        twice_as_fast("memory channels x 2", by_cpu, "cpu" if tables.expert_cpu else ""),
        *(
            Upgrade(
                f"GPU memory {name} ({size / GIB:.0f} GiB)", {"gpu.memory_bytes": str(size)}, {}
            )
            for name, size in (("+8 GiB", now + 8 * GIB), ("x 2", 2 * now))
        ),
    ]


def twice_as_fast(name: str, paths: Sequence[str], measured: str) -> Upgrade:
    """Return an upgrade of some rates; of the whole section, where its times are `measured`."""
    if measured:
        return Upgrade(name, {}, {measured: 0.5})
    return Upgrade(name, dict.fromkeys(paths, "x2"), {})


def upgraded_budget(asked: Question, upgrade: Upgrade) -> int:
    """Return the bytes for experts on the better machine's GPU."""
    better = with_overrides(asked.profile, upgrade.settings)
    return int(memory_of(asked._replace(profile=better))["budget_bytes"])


def rows_of_upgrades(
    plans: Sequence[tuple[Upgrade, str, int]], found: Sequence[Measured], now: float,
    better: Sequence[Upgrade],
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row per upgrade: its fastest policy of those tried, and what it gains over now."""
    rows = []
    for upgrade in better:
        tried = [
            (measured.tokens_per_s, policy, size)
            for (of, policy, size), measured in zip(plans, found, strict=True)
            if of is upgrade and not measured.error
        ]
        if not tried:
            continue
        speed, policy, size = max(tried, key=lambda one: (one[0], one[1] == WHOLE))
        rows.append(
            {
                "upgrade": upgrade.name,
                "settings": dict(upgrade.settings),
                "stretch": dict(upgrade.stretch),
                "policy": policy,
                "budget_bytes": size,
                "decode_tokens_per_s": speed,
                "gain": speed / now - 1,
            }
        )
    return rows


def rows_of_engines(
    engines: Sequence[EngineSetting], pairs: Sequence[tuple[Measured, Measured]], best: float,
    policy: str,
) -> list[dict[str, Any]]:  # fmt: skip
    """Return a row per engine and kind of result: its fastest setting, and what it lacks."""
    rows: list[dict[str, Any]] = []
    for setting, (decode, prefill) in zip(engines, pairs, strict=True):
        if decode.error or prefill.error:
            continue
        loss = 1 - decode.tokens_per_s / best
        notes = list(setting.notes)
        if policy not in (setting.policy, WHOLE) and loss > UNCHANGED:
            notes.append(f"{setting.engine} cannot do what {policy} does: {loss:.0%} are lost")
        elif loss < -UNCHANGED and not setting.changes_results:
            notes.append(f"faster than {policy}, the fastest of the policies above")
        rows.append(
            {
                "engine": setting.engine,
                "flags": setting.flags,
                "policy": setting.policy,
                "prefill_policy": setting.prefill_policy,
                "budget_bytes": setting.budget_bytes,
                "decode_tokens_per_s": decode.tokens_per_s,
                "prefill_tokens_per_s": prefill.tokens_per_s,
                "loss": loss,
                "changes": "experts late" if setting.changes_results else "",
                "notes": notes,
            }
        )
    rows.sort(key=lambda row: -row["decode_tokens_per_s"])
    fastest = {(row["engine"], bool(row["changes"])): row for row in reversed(rows)}
    same = {
        engine: row["decode_tokens_per_s"] for (engine, late), row in fastest.items() if not late
    }
    kept = [
        row
        for (engine, late), row in fastest.items()
        if not late or row["decode_tokens_per_s"] > WORTH * same.get(engine, 0.0)
    ]
    return sorted(kept, key=lambda row: (row["engine"] != "llama.cpp", bool(row["changes"])))


def headline(data: Mapping[str, Any]) -> str:
    """Return the answer in one line."""
    where = f"{data['model']} ({data['bits']} bit) on {data['hardware']}"
    found = data["recommended"]
    if found is None:
        return f"{where}: does not fit; {' and '.join(lacks(data['memory']))}"
    line = (
        f"{where}: {found['decode_tokens_per_s']:.1f} tokens/s {'in all ' * (data['batch'] > 1)}"
        f"({found['decode_low']:.1f}-{found['decode_high']:.1f}) with {found['policy']}"
    )
    if data["fits"] == "wholly":
        return f"{line}: the whole model fits on the GPU"
    if found["policy"] == BASELINE:
        return f"{line}: llama.cpp's --n-cpu-moe"
    if "speedup" not in found:
        return line
    return f"{line}, {found['speedup']:.1f}x llama.cpp's --n-cpu-moe"
