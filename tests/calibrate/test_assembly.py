"""A machine that is known exactly comes out of its series; the rest stays another machine's."""

import math
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from measured import (
    CPU_BYTES_PER_NS,
    CPU_FLOPS_PER_NS,
    EXPERTS,
    GPU_BYTES_PER_NS,
    GPU_FLOPS_PER_NS,
    HIDDEN,
    LAUNCH_NS,
    LINK_BYTES_PER_NS,
    TOKENS,
    TOP_K,
    WIDTH,
    expert,
    expert_ns,
    fake_bench,
    machine,
    made,
    tasks,
)
from moesim.calibrate.assembly import Assembled, assemble, profile_text
from moesim.calibrate.calibration import Calibration, run_tasks
from moesim.calibrate.facts import Facts
from moesim.calibrate.series import Series, Task
from moesim.calibrate.tables import rates_alone
from moesim.cli.hardware import command
from moesim.costs import build_costs, copy_ns
from moesim.errors import CalibrationError
from moesim.model import GroupedQuery, ModelSpec, load_model
from moesim.profile import load_profile, parse_profile, user_profile_path
from moesim.types import (
    COMBINE,
    DECODE,
    DISK,
    EXTRAPOLATED,
    GATE,
    H2D,
    HEAD,
    INTERPOLATED,
    MEASURED,
    PREFILL,
)

BASE = load_profile("rtx4090-pcie4-ddr5")[0]
MODEL = ModelSpec(
    name="small", model_type="mixtral", hidden_layers=1, layer_ids=(0,), experts=EXPERTS,
    top_k=TOP_K, hidden=HIDDEN, expert_width=WIDTH, shared_width=0, dense_width=0, vocab=1000,
    attention=GroupedQuery(heads=4, kv_heads=4, head_dim=64),
)  # fmt: skip


def calibrated(
    found: Iterable[Series], folder: Path, label: str = "emulated", load: float = 0.0
) -> Calibration:
    bench = fake_bench(label)
    made = run_tasks(tasks(found), bench, folder=folder)
    bench.device.close()
    facts = Facts(
        cpu="Abacus 2 @ 1 Hz", cores=2, threads=4, memory_bytes=1 << 34, load=load, mhz=0.0
    )
    return made._replace(before=facts, after=facts)


@pytest.fixture
def whole(tmp_path: Path) -> Assembled:
    return assemble(calibrated(machine(), tmp_path), [MODEL], BASE)


def test_the_rates_are_those_of_the_machine(whole: Assembled) -> None:
    gpu, cpu = whole.profile.gpu, whole.profile.cpu
    assert gpu.launch_ns == pytest.approx(LAUNCH_NS, abs=2)
    assert gpu.memory_bytes_per_s == pytest.approx(1e9 * GPU_BYTES_PER_NS, rel=1e-3)
    assert gpu.flops_per_s == pytest.approx(1e9 * GPU_FLOPS_PER_NS, rel=1e-3)
    assert gpu.kernels.gate == 4
    assert gpu.kernels.head == BASE.gpu.kernels.head
    assert gpu.memory_bytes == 1 << 30
    assert cpu.flops_per_s == pytest.approx(1e9 * CPU_FLOPS_PER_NS, rel=1e-3)
    assert cpu.memory_bytes_per_s == pytest.approx(40e9)
    assert (cpu.name, cpu.threads, cpu.memory_bytes) == ("Abacus 2 @ 1 Hz", 3, 1 << 34)
    link = whole.profile.link
    assert link.h2d.bytes_per_s == pytest.approx(1e9 * LINK_BYTES_PER_NS, rel=1e-3)
    assert link.d2h.latency_ns == pytest.approx(20_000, abs=20)
    assert link.h2d_pageable is None
    assert link.chunk_bytes == 1 << 20  # 3.6 % slower than the whole; 256 KiB are 15 %
    assert whole.profile.disk.bytes_per_s == pytest.approx(1e9, rel=1e-3)


def test_one_size_of_expert_does_not_tell_its_fixed_time(whole: Assembled) -> None:
    """On the CPU 39,321.6 ns of reading and 5,000 of handing over are 44,321.6 of reading."""
    assert whole.profile.cpu.overhead_ns == 0
    assert whole.profile.cpu.expert_bytes_per_s == pytest.approx(786_432 / 44_321.6e-9, rel=1e-3)
    assert "fixed time is in the rate" in whole.profile.provenance.cpu.note


def test_two_sizes_of_expert_tell_the_fixed_time(tmp_path: Path) -> None:
    found = [*machine(), expert("cpu", 4 * WIDTH)]
    cpu = assemble(calibrated(found, tmp_path), [MODEL], BASE).profile.cpu
    assert cpu.overhead_ns == pytest.approx(5_000, rel=0.01)
    assert cpu.expert_bytes_per_s == pytest.approx(1e9 * CPU_BYTES_PER_NS, rel=0.01)


def test_what_was_measured_is_what_is_simulated(whole: Assembled) -> None:
    costs = build_costs(MODEL, whole.profile, 1024, 1)
    at = [int(n) for n in TOKENS]
    for lane, table in (("gpu", costs.expert_gpu_ns), ("cpu", costs.expert_cpu_ns)):
        truth = [expert_ns(lane, WIDTH)(n) for n in TOKENS]
        assert table[0, at] == pytest.approx(np.ceil(truth), abs=1)
    assert (costs.expert_gpu_source[0, at] == MEASURED).all()
    assert costs.expert_gpu_source[0, 512] == INTERPOLATED  # held out
    assert costs.expert_gpu_source[1, 1] == EXTRAPOLATED
    assert costs.attention_ns[PREFILL, 64] == pytest.approx(50_000 + 100 * 64, rel=0.01)
    assert costs.attention_ns[DECODE, 4] == pytest.approx(50_000 + 100 * 4, rel=0.01)
    assert costs.context_fp[:, 64] / 2**20 == pytest.approx([0.5, 2.0], rel=0.01)
    assert costs.gate_ns[1] == 40_164
    assert costs.combine_ns[256] == pytest.approx(LAUNCH_NS + 26, abs=1)
    assert costs.kind_source[GATE] == costs.kind_source[COMBINE] == INTERPOLATED
    assert costs.kind_source[HEAD] == EXTRAPOLATED


def test_the_host_and_interference_by_hand(whole: Assembled) -> None:
    host = whole.profile.host
    assert (host.per_layer_ns, host.per_launch_ns, host.per_sync_ns) == (1_000, 5_000, 4_000)
    assert host.decision_ns_by_policy == pytest.approx({"dali": 7_000, "lru": 5_000}, rel=0.011)
    assert host.decision_ns == pytest.approx(6_000, rel=0.011)
    assert [entry.busy for entry in whole.profile.interference] == [("gpu", "cpu"), ("cpu", "h2d")]
    assert all(set(entry.slow.values()) == {0.8} for entry in whole.profile.interference)


def test_every_section_says_where_it_is_from(whole: Assembled) -> None:
    for section in whole.profile.provenance.__struct_fields__:
        origin = getattr(whole.profile.provenance, section)
        assert origin.source == "measured", section
        assert origin.script == "moesim calibrate"
        assert origin.date
        assert origin.versions.keys() >= {"moesim", "torch", "python"}
        assert origin.repetitions == 7
        assert origin.spread_pct == 1.0
        assert "medians up to 1.0 % above" in origin.note
    assert "at points held out" in whole.profile.provenance.gpu.note
    assert not whole.absent


def test_an_emulated_device_is_called_that_wherever_it_is_named(whole: Assembled) -> None:
    profile = whole.profile
    assert profile.name == "emulated-abacus-2"
    assert profile.description.startswith("EMULATED device")
    assert profile.gpu.name == "abacus (emulated)"
    assert profile.provenance.gpu.note.startswith("emulated device, no GPU")
    assert any("nothing is said about any GPU" in notice for notice in whole.notices)


def test_the_profile_reads_back_as_it_was_written(whole: Assembled) -> None:
    assert parse_profile(profile_text(whole.profile), "it") == whole.profile


def test_what_is_used_again_makes_the_same_profile(tmp_path: Path) -> None:
    first, again = (calibrated(machine(), tmp_path) for _ in range(2))
    assert all(outcome.reused for outcome in again.outcomes)
    texts = {profile_text(assemble(found, [MODEL], BASE).profile) for found in (first, again)}
    assert len(texts) == 1


def test_without_a_device_gpu_and_link_stay_those_of_the_other_machine(tmp_path: Path) -> None:
    found = [s for s in machine() if s.name in ("memory/host/read", "disk/read")]
    made = assemble(calibrated([*found, expert("cpu")], tmp_path, "cpu"), [MODEL], BASE)
    profile = made.profile
    assert (profile.gpu, profile.link) == (BASE.gpu, BASE.link)
    assert profile.provenance.gpu.source == "datasheet"
    assert profile.provenance.gpu.note.startswith("not measured here; from rtx4090-pcie4-ddr5: ")
    assert profile.provenance.cpu.source == profile.provenance.disk.source == "measured"
    assert profile.name == "abacus-2-with-rtx4090-pcie4-ddr5"
    assert [line.split(",")[0] for line in made.absent] == ["gpu", "link", "host", "interference"]
    assert parse_profile(profile_text(profile), "it") == profile


def test_nothing_measured_is_no_profile(tmp_path: Path) -> None:
    def fail(_: object) -> Series:
        raise CalibrationError("no room")

    bench = fake_bench()
    found = run_tasks([Task("expert/cpu/1x1/16", 1.0, fail)], bench, folder=tmp_path)
    bench.device.close()
    with pytest.raises(CalibrationError, match="nothing was measured; expert/cpu/1x1/16: no room"):
        assemble(found, [MODEL], BASE)


def test_copies_faster_than_memory_are_not_believed(tmp_path: Path) -> None:
    fast = made("copy/h2d/pinned/queued", "bytes", lambda size: 1 + size / 500, [1e4, 1e6, 1e7])
    found = [fast if s.name == fast.name else s for s in machine()]
    made_of = assemble(calibrated(found, tmp_path), [MODEL], BASE)
    assert made_of.profile.link == BASE.link
    assert made_of.profile.provenance.link.source == "datasheet"
    assert any("cannot be true" in notice for notice in made_of.notices)


def test_copies_faster_than_their_throttle_are_not_believed(tmp_path: Path) -> None:
    found = calibrated(machine(), tmp_path)

    def stated(bytes_per_s: float) -> Assembled:
        link = {"latency_ns": 20_000, "bytes_per_s": bytes_per_s}
        return assemble(found._replace(device={**found.device, "link": link}), [MODEL], BASE)

    assert stated(2e9).profile.provenance.link.source == "measured"
    assert "a link stated as 20000 ns and 2e+09 bytes/s" in stated(2e9).profile.description
    faster = stated(1.9e9)
    assert faster.profile.link == BASE.link
    assert any("throttled to" in notice for notice in faster.notices)


def test_experts_faster_than_their_weights_are_read_are_not_believed(tmp_path: Path) -> None:
    fast = expert("cpu")
    points = tuple(msgspec.structs.replace(p, ns=p.ns / 10) for p in fast.points)
    found = [
        msgspec.structs.replace(fast, points=points) if s.name == fast.name else s
        for s in machine()
    ]
    made_of = assemble(calibrated(found, tmp_path), [MODEL], BASE)
    assert made_of.profile.tables.expert_cpu == ()
    assert made_of.profile.cpu == BASE.cpu
    assert any("expert/cpu/512x256/16 is not used" in notice for notice in made_of.notices)
    assert any("no table of its experts on the CPU" in notice for notice in made_of.notices)


@pytest.mark.parametrize("part", ["gate", "attention"])
def test_weights_of_other_parts_are_not_read_faster_than_memory_either(
    tmp_path: Path, part: str
) -> None:
    """Weights of 1 GiB in some 50 us are 21 TB/s; those of 1 MB are 21 GB/s."""
    for size, believed in ((1 << 30, False), (1 << 20, True)):
        facts = {"weight_bytes": size, "buffer_bytes": 4 << 30, "cache_bytes": 1 << 20}
        found = [
            msgspec.structs.replace(s, facts={**s.facts, **facts}) if s.name.startswith(part) else s
            for s in machine()
        ]
        made_of = assemble(calibrated(found, tmp_path / part / str(size)), [MODEL], BASE)
        tables = made_of.profile.tables
        there = tables.attention if part == "attention" else tables.layer
        kinds = {getattr(table, "kind", "attention") for table in there}
        assert (part in kinds) == believed
        told = [n for n in made_of.notices if n.startswith(part) and "cannot be true" in n]
        assert bool(told) != believed


def test_a_real_device_copies_faster_than_few_threads_read(tmp_path: Path) -> None:
    """50 GB/s of a link are below the device's memory, and above the 40 of the host's threads."""
    fast = [
        made(f"copy/{lane}/pinned/queued", "bytes", lambda size: 1 + size / 55, [1e4, 1e6, 1e7])
        for lane in ("h2d", "d2h")
    ]
    names = {s.name for s in fast}
    found = calibrated([*(s for s in machine() if s.name not in names), *fast], tmp_path)
    for label, believed in (("emulated", False), ("cuda", True)):
        found.device.update(label=label)
        link = assemble(found, [MODEL], BASE).profile.link
        assert (link.h2d.bytes_per_s == pytest.approx(55e9, rel=1e-3)) == believed


def test_a_fit_that_misses_is_said_and_the_points_are_used(tmp_path: Path) -> None:
    """A step at 30 tokens: no floor and line fit it, the points do at least there."""
    own = expert("gpu")
    points = tuple(
        msgspec.structs.replace(p, ns=p.ns * (3.0 if p.at > 30 else 1.0)) for p in own.points
    )
    stepped = msgspec.structs.replace(own, points=points)
    found = [stepped if s.name == own.name else s for s in machine()]
    made_of = assemble(calibrated(found, tmp_path), [MODEL], BASE)
    assert any(
        line.startswith("expert/gpu/512x256/16: max(floor, a + b n)") for line in made_of.misses
    )
    (table,) = made_of.profile.tables.expert_gpu
    assert table.points == tuple((int(p.at), p.ns) for p in points if not p.held_out)


@pytest.mark.parametrize(("factor", "said"), [(1.07, False), (1.15, True)])
def test_attention_that_misses_by_a_tenth_is_said(
    tmp_path: Path, factor: float, said: bool
) -> None:
    """Points held out take longer than what the others say; the shape is named once."""
    found = [
        msgspec.structs.replace(
            own,
            points=tuple(
                msgspec.structs.replace(p, ns=p.ns * (factor if p.held_out else 1.0))
                for p in own.points
            ),
        )
        if own.name.startswith("attention/")
        else own
        for own in machine()
    ]
    made_of = assemble(calibrated(found, tmp_path), [MODEL], BASE)
    lines = [line.partition(":")[0] for line in made_of.misses]
    assert lines == [f"{phase} 512-4-4-64" for phase in ("prefill", "decode") if said]


@pytest.mark.parametrize(("factor", "said"), [(1.05, False), (1.2, True)])
def test_rates_that_miss_a_table_by_a_tenth_are_said(
    tmp_path: Path, factor: float, said: bool
) -> None:
    """The gate's last point takes longer than launches and roofline say."""
    found = [
        msgspec.structs.replace(
            own,
            points=(
                *own.points[:-1],
                msgspec.structs.replace(own.points[-1], ns=own.points[-1].ns * factor),
            ),
        )
        if own.name.startswith("gate/")
        else own
        for own in machine()
    ]
    made_of = assemble(calibrated(found, tmp_path), [MODEL], BASE)
    assert any("17 % (gate)" in line for line in made_of.notices) == said
    assert not any(line.startswith("gate") for line in made_of.misses)


def test_numbers_that_no_profile_may_have_are_not_used(tmp_path: Path) -> None:
    """A device of 0 bytes; its experts were seen nevertheless."""
    made_of = assemble(calibrated(machine(), tmp_path, "cpu"), [MODEL], BASE)
    assert made_of.profile.gpu == BASE.gpu
    assert any(notice.startswith("gpu is not used: Expected `int`") for notice in made_of.notices)
    assert parse_profile(profile_text(made_of.profile), "it") == made_of.profile


def test_power_is_said_where_the_machine_tells_it(tmp_path: Path) -> None:
    """Two copies to the device at 40 and 60 W, one from it at 20; elsewhere nothing is told."""
    found = calibrated(machine(), tmp_path)
    told = {"copy/h2d/pinned/single": 40.0, "copy/h2d/pinned/queued": 60.0}
    told["copy/d2h/pinned/single"] = 20.0
    outcomes = tuple(
        one._replace(kept=msgspec.structs.replace(one.kept, watts={"package-0": told[one.task]}))
        if one.kept is not None and one.task in told
        else one
        for one in found.outcomes
    )
    notices = assemble(found._replace(outcomes=outcomes), [MODEL], BASE).notices
    assert "mean power: copy/h2d package-0 50 W, copy/d2h package-0 20 W" in notices
    assert not any("power" in line for line in assemble(found, [MODEL], BASE).notices)


def test_a_busy_machine_is_noticed(tmp_path: Path) -> None:
    quiet = assemble(calibrated(machine(), tmp_path, load=0.5), [MODEL], BASE)
    busy = assemble(calibrated(machine(), tmp_path, load=3.0), [MODEL], BASE)
    assert not any("busy" in notice for notice in quiet.notices)
    assert any("busy (load 3.0 on 4 threads" in notice for notice in busy.notices)
    assert "Load average 3.0 before" in busy.profile.description


def test_a_model_without_experts_measured_is_noticed(tmp_path: Path) -> None:
    other = msgspec.structs.replace(MODEL, name="other", expert_width=99)
    made_of = assemble(calibrated(machine(), tmp_path), [MODEL, other], BASE)
    assert [n for n in made_of.notices if "there is no table" in n] == [
        "other: there is no table of its experts on the CPU",
        "other: there is no table of its experts on the GPU",
    ]


def test_what_was_left_out_of_a_series_is_noticed(tmp_path: Path) -> None:
    own = machine()
    facts = {"stopped": "at 32, where one call takes 2 s, more than 1"}
    own[0] = msgspec.structs.replace(own[0], facts={**own[0].facts, **facts})
    notices = assemble(calibrated(own, tmp_path), [MODEL], BASE).notices
    assert f"{own[0].name}: stopped at 32, where one call takes 2 s, more than 1" in notices
    assert not any("without" in line for line in notices)


def test_attention_without_a_table_is_noticed(tmp_path: Path) -> None:
    """Four heads were measured; eight were not, and latent attention is nowhere."""
    eight = GroupedQuery(heads=8, kv_heads=4, head_dim=64)
    latent = load_model("deepseek-v3").attention
    others = [
        msgspec.structs.replace(MODEL, name=name, attention=own)
        for name, own in (("eight", eight), ("latent", latent))
    ]
    found = calibrated(machine(), tmp_path)
    told = [n for n in assemble(found, [MODEL, *others], BASE).notices if "attention" in n]
    assert told == [
        "eight: there is no table of its attention",
        "latent has latent attention, which is not measured; only grouped-query is:"
        " its attention is simulated from rates",
    ]


def test_without_a_device_its_interference_stays_that_of_the_other_machine(tmp_path: Path) -> None:
    """The processor and the disk were measured together; what copies do to experts was not."""
    both = Series(
        name="interference/512x256/cpu+disk",
        unit="lane",
        points=expert("cpu").points[:1],
        facts={"factor/cpu": 0.9, "factor/disk": 0.7},
    )
    found = calibrated([expert("cpu"), both], tmp_path, "cpu")
    made_of = assemble(found, [MODEL], BASE)
    profile = made_of.profile
    assert profile.interference[0].slow == {"cpu": 0.9, "disk": 0.7}
    assert profile.interference[1:] == BASE.interference
    assert len(BASE.interference) > 0
    origin = profile.provenance.interference
    assert origin.source == BASE.provenance.interference.source == "scaled"
    assert f"{len(BASE.interference)} sets with lanes of a device are those of" in origin.note
    assert f"interference, some of it, from {BASE.name} (scaled)" in made_of.absent


def test_a_profile_of_a_gpu_is_called_after_it_too(tmp_path: Path) -> None:
    found = calibrated(machine(), tmp_path)
    found.device.update(label="cuda", name="NVIDIA Example 4090")
    assert assemble(found, [MODEL], BASE).profile.name == "nvidia-example-4090-abacus-2"


def test_show_says_that_a_models_experts_were_not_measured(
    whole: Assembled, tmp_path: Path
) -> None:
    file = tmp_path / "own.yaml"
    for profile, said in ((whole.profile, True), (BASE, False)):
        file.write_text(profile_text(profile))
        done = CliRunner().invoke(command, ["show", str(file), "--model", "mixtral-8x7b"])
        assert done.exit_code == 0
        assert ("no expert of mixtral-8x7b was measured" in done.stderr) == said
        assert ("experts of 512x256 were" in done.stderr) == said


def test_series_of_a_busy_machine_are_noticed_when_they_are_used_again(tmp_path: Path) -> None:
    found = calibrated(machine(), tmp_path)
    first = found.outcomes[0]
    assert first.kept is not None
    for busy, reused in ((True, True), (True, False), (False, True)):
        own = first._replace(kept=msgspec.structs.replace(first.kept, busy=busy), reused=reused)
        again = found._replace(outcomes=(own, *found.outcomes[1:]))
        notices = assemble(again, [MODEL], BASE).notices
        assert any("1 series that were kept" in line for line in notices) == (busy and reused)


def test_rates_are_judged_by_what_was_measured(whole: Assembled) -> None:
    """Experts and gate are rooflines. 1024 tokens are combined in 10,102 ns; reading and writing
    4 x 512 values of 2 bytes takes 41.9 us at 100 bytes per ns, with the launch 5.1 times as much.
    """
    found = rates_alone(whole.profile, [MODEL])
    assert found["gate"] == pytest.approx(0, abs=0.01)
    assert found["experts on the GPU"] == pytest.approx(0, abs=0.01)
    assert found["combine"] == pytest.approx(51_943 / 10_102.4 - 1, rel=0.01)
    assert any(line.endswith("414 % (combine)") for line in whole.notices)


@pytest.mark.parametrize("name", ["disk/read", "copy/h2d/pinned/queued"])
def test_copies_that_no_line_fits_keep_their_points(tmp_path: Path, name: str) -> None:
    """Eight times the bytes take sixteen times as long, held out or not."""

    def bent(own: Series) -> Series:
        points = tuple(
            msgspec.structs.replace(p, ns=1e4 * (p.at / 4096) ** (4 / 3)) for p in own.points
        )
        return msgspec.structs.replace(own, points=points)

    found = [bent(own) if own.name == name else own for own in machine()]
    made_of = assemble(calibrated(found, tmp_path), [MODEL], BASE)
    profile = made_of.profile
    channel = profile.disk if name == "disk/read" else profile.link.h2d
    own = next(s for s in found if s.name == name)
    truth = [(p.at, p.ns) for p in own.points if not p.held_out]
    assert np.array(channel.points) == pytest.approx(np.array(truth), rel=1e-5)
    assert channel.interpolated
    assert not profile.link.d2h.interpolated
    (line,) = [line for line in made_of.misses if line.startswith(name)]
    assert "its points are used instead" in line
    costs = build_costs(MODEL, profile, 1, 1)
    for size, ns in channel.points:
        assert copy_ns(costs, DISK if name == "disk/read" else H2D, size) == math.ceil(ns)
    assert parse_profile(profile_text(profile), "it") == profile


def test_the_profile_is_the_one_that_replays_use(
    whole: Assembled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    user_profile_path().parent.mkdir()
    user_profile_path().write_text(profile_text(whole.profile))
    found, notice = load_profile(None)
    assert found == whole.profile
    assert "this machine's profile" in notice
