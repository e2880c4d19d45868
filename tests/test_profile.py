"""Hardware profiles: presets, interference in fixed point, overrides, and what is refused."""

import copy
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from moesim.errors import ProfileError
from moesim.profile import (
    Contention,
    HardwareProfile,
    decision_ns,
    load_profile,
    parse_profile,
    profile_digest,
    profile_names,
    user_profile_path,
    with_overrides,
)
from moesim.types import CPU, D2H, DISK, GPU, H2D, LANES

PRESETS = {
    "rtx3090-pcie4-ddr4",
    "rtx4090-pcie4-ddr5",
    "rtx5090-pcie5-ddr5",
    "a6000-pcie4",
    "l40s-pcie4",
    "a100-pcie4",
    "h100-pcie5",
    "h200-pcie5",
    "rtxpro6000-pcie5",
    "dali-3090",
    "fate-3090",
    "fate-1080ti",
    "moepic-a6000",
    "klotski-env1",
    "klotski-env2",
    "huang-4090",
}


def preset(name: str = "rtx3090-pcie4-ddr4") -> HardwareProfile:
    return load_profile(name)[0]


def plain() -> dict[str, Any]:
    values: dict[str, Any] = msgspec.to_builtins(preset())
    return values


def interfering(*entries: Contention) -> HardwareProfile:
    return msgspec.structs.replace(preset(), interference=entries)


def pair(a: int, b: int, slow_a: int, slow_b: int) -> Contention:
    slow = {LANES[a]: slow_a / 1024, LANES[b]: slow_b / 1024}
    return msgspec.convert({"busy": list(slow), "slow": slow}, Contention)


def test_the_shipped_presets_are_those_of_the_list() -> None:
    assert set(profile_names()) == PRESETS


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_admits_where_it_comes_from(name: str) -> None:
    profile = preset(name)

    assert profile.name == name
    for section in profile.provenance.__struct_fields__:
        origin = getattr(profile.provenance, section)
        assert origin.source != "measured"
        assert origin.note
    assert "derived, not measured" in profile.provenance.interference.note


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_interference_of_a_preset_is_the_stated_formula(name: str) -> None:
    profile = preset(name)
    cpu, link = profile.cpu, profile.link.h2d.bytes_per_s
    factor = min(1.0, cpu.memory_bytes_per_s / (cpu.expert_bytes_per_s + link))
    stolen = link / (profile.gpu.memory_bytes_per_s / 0.8)
    rates = profile.rates()

    assert rates[1 << CPU | 1 << H2D, CPU] == pytest.approx(1024 * factor, abs=1)
    assert rates[1 << CPU | 1 << H2D, H2D] == pytest.approx(1024 * factor, abs=1)
    assert rates[1 << GPU | 1 << H2D, GPU] == pytest.approx(1024 * (1 - stolen), abs=1)
    assert rates[1 << GPU | 1 << H2D, H2D] == 1024


@pytest.mark.parametrize(
    ("name", "expert_bytes", "copy_ms"),
    [
        ("huang-4090", 352_321_536, 14.0),  # 28.02 ms for two experts
        ("klotski-env1", 352_321_536, 21.0),
        ("moepic-a6000", 17_301_504, 1.72),
    ],
)
def test_a_paper_s_link_copies_as_the_paper_says(
    name: str, expert_bytes: int, copy_ms: float
) -> None:
    link = preset(name).link.h2d

    seconds = link.latency_ns / 1e9 + expert_bytes / link.bytes_per_s
    assert seconds * 1e3 == pytest.approx(copy_ms, rel=0.01)


def test_rates_by_hand() -> None:
    """512/1024 and 333/1024 make 166, rounded down from 166.5; a set of three replaces that."""
    profile = interfering(
        Contention(busy=("cpu", "h2d"), slow={"cpu": 0.5, "h2d": 0.75}),
        Contention(busy=("disk", "cpu"), slow={"cpu": 333 / 1024}),
        Contention(busy=("gpu", "cpu", "d2h"), slow={"cpu": 0.25}),
        Contention(busy=("gpu", "d2h"), slow={"gpu": 0.5}),
    )
    rates = profile.rates()

    assert rates.shape == (32, 5)
    assert rates.dtype == np.int64
    assert rates.flags.c_contiguous
    assert (rates[0] == 1024).all()
    assert all(rates[1 << lane, lane] == 1024 for lane in range(5))
    assert rates[1 << CPU | 1 << H2D].tolist() == [1024, 512, 768, 1024, 1024]
    assert rates[1 << CPU | 1 << DISK].tolist() == [1024, 333, 1024, 1024, 1024]
    assert rates[1 << CPU | 1 << H2D | 1 << DISK].tolist() == [1024, 166, 768, 1024, 1024]
    assert rates[1 << GPU | 1 << CPU | 1 << D2H].tolist() == [512, 256, 1024, 1024, 1024]
    # The set counts only when exactly its lanes are busy.
    assert rates[1 << GPU | 1 << CPU | 1 << D2H | 1 << H2D, CPU] == 512


def test_a_rate_is_at_least_one() -> None:
    tiny = [Contention(busy=("gpu", lane), slow={"gpu": 1e-9}) for lane in ("cpu", "h2d", "disk")]

    assert interfering(*tiny).rates().min() == 1


@given(
    st.dictionaries(
        st.tuples(st.integers(0, 4), st.integers(0, 4)).filter(lambda p: p[0] < p[1]),
        st.tuples(st.integers(1, 1024), st.integers(1, 1024)),
    )
)
def test_more_busy_lanes_are_never_faster(pairs: dict[tuple[int, int], tuple[int, int]]) -> None:
    entries = [pair(*lanes, *slow) for lanes, slow in pairs.items()]
    rates = interfering(*entries).rates()

    assert rates.min() >= 1
    assert rates.max() == 1024
    for mask in range(32):
        for own in range(5):
            for other in range(5):
                if mask >> own & 1:
                    assert rates[mask | 1 << other, own] <= rates[mask, own]


def test_without_a_name_the_default_preset_is_taken_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profile, notice = load_profile(None)

    assert profile.name == "rtx3090-pcie4-ddr4"
    assert "rtx3090-pcie4-ddr4" in notice
    assert load_profile("RTX3090-PCIe4-DDR4") == (profile, "")


def test_without_a_name_this_machine_s_profile_comes_first(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    own = user_profile_path()
    own.parent.mkdir()
    own.write_text(yaml.safe_dump({**plain(), "name": "mine"}), encoding="utf-8")
    profile, notice = load_profile(None)

    assert own == tmp_path / "moesim" / "hardware.yaml"
    assert profile.name == "mine"
    assert str(own) in notice


def test_without_a_variable_the_home_folder_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")

    assert user_profile_path() == Path("/home/somebody/.config/moesim/hardware.yaml")


def test_a_profile_survives_yaml(tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    path.write_text(yaml.safe_dump(plain()), encoding="utf-8")
    again, notice = load_profile(str(path))

    assert notice == ""
    assert again == preset()
    assert profile_digest(again) == profile_digest(preset())


def test_bytes_may_be_written_with_an_exponent() -> None:
    text = yaml.safe_dump(plain()).replace("25769803776", "24.0e+9")

    assert parse_profile(text, "x").gpu.memory_bytes == 24_000_000_000


def test_a_date_stays_text() -> None:
    values = plain()
    values["provenance"]["gpu"]["date"] = "WHEN"
    text = yaml.safe_dump(values).replace("WHEN", "2025-01-31")

    assert parse_profile(text, "x").provenance.gpu.date == "2025-01-31"


def test_an_unknown_name_lists_the_presets() -> None:
    with pytest.raises(ProfileError, match="no hardware named 'abacus'; there are: a100-pcie4, "):
        load_profile("abacus")


def changed(path: str, value: object) -> str:
    """The default preset as YAML with one value changed, or dropped where it is ...."""
    values = plain()
    *parents, last = path.split(".")
    table = values
    for key in parents:
        table = table[key]
    if value is ...:
        del table[last]
    else:
        table[last] = value
    return str(yaml.safe_dump(values))


TABLE = {
    "hidden": 2048,
    "width": 768,
    "bits": 16,
    "points": [[1, 100], [2, 100]],
    "provenance": {"source": "measured", "note": "n"},
}


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("schema", "moesim.hardware/9", "schema: no 'moesim.hardware/9'; there are: moesim.hard"),
        ("colour", "red", "unknown key colour; there are: schema, name, description, gpu"),
        ("gpu.colour", "red", "unknown key gpu.colour; there are: name, memory_bytes, "),
        ("link.h2d.colour", 1, "unknown key link.h2d.colour; there are: latency_ns, bytes_per_s"),
        ("gpu.launch_ns", ..., "gpu.launch_ns is missing"),
        ("disk", ..., "disk is missing"),
        ("gpu.flops_per_s", "25e9", r"YAML reads 25e9 as text, write 25.0e\+9"),
        ("gpu.flops_per_s", -1.0, "gpu.flops_per_s: Expected `float` >= 1000.0"),
        ("gpu.flops_per_s", float("inf"), "gpu.flops_per_s: Expected `float` <= "),
        ("gpu.flops_per_s", float("nan"), "gpu.flops_per_s: Expected `float`"),
        ("link.h2d.bytes_per_s", 0, "link.h2d.bytes_per_s: Expected `float` >= 1000.0"),
        ("link.h2d.latency_ns", -5, "link.h2d.latency_ns: Expected `int` >= 0"),
        ("link.chunk_bytes", 0, "link.chunk_bytes: Expected `int` >= 1"),
        ("host.per_sync_ns", 1.5, "host.per_sync_ns: Expected `int`, got `float`"),
        ("host.decision_ns_by_policy", {"dali": -1}, "host.decision_ns_by_policy"),
        ("gpu", None, "gpu: Expected `object`, got `null`"),
        ("provenance.gpu.source", "guessed", "no 'guessed'; there are: measured, datasheet, scal"),
        ("interference", [{"busy": ["cpu"], "slow": {}}], "length >= 2"),
        ("interference", [{"busy": ["cpu", "npu"], "slow": {}}], "no 'npu'; there are: gpu, cpu, "),
        ("interference", [{"busy": ["cpu", "cpu"], "slow": {}}], "busy: names a lane twice"),
        ("interference", [{"busy": ["cpu", "gpu"], "slow": {"cpu": 2}}], "Expected `float` <= 1.0"),
        ("interference", [{"busy": ["cpu", "gpu"], "slow": {"cpu": 0}}], "Expected `float` > 0"),
        ("interference", [{"busy": ["cpu", "gpu"], "slow": {"h2d": 1}}], "h2d is not among the b"),
        ("interference", [{"busy": ["cpu", "gpu"], "slow": {"npu": 1}}], "no 'npu'; there are: g"),
        (
            "interference",
            [{"busy": ["cpu", "gpu"], "slow": {}}, {"busy": ["gpu", "cpu"], "slow": {}}],
            r"interference\[1\].busy: gpu, cpu has an entry already",
        ),
        ("tables.expert_gpu", [{**TABLE, "bits": 3}], "no 3; there are: 16, 8, 4, 2"),
        ("tables.expert_gpu", [{**TABLE, "points": []}], "length >= 1"),
        ("tables.expert_gpu", [{**TABLE, "points": [[2, 1], [1, 2]]}], "tokens must ascend, not"),
        ("tables.expert_cpu", [{**TABLE, "points": [[0, 1]]}], "Expected `int` >= 1"),
        ("tables.expert_cpu", [{**TABLE, "points": [[1, 0]]}], "Expected `float` > 0"),
        (
            "tables.expert_cpu",
            [TABLE, copy.deepcopy(TABLE)],
            r"a table for \(2048, 768, 16\) already",
        ),
    ],
)
def test_a_bad_value_is_refused_by_key(path: str, value: object, message: str) -> None:
    with pytest.raises(ProfileError, match=message) as caught:
        parse_profile(changed(path, value), "box.yaml")
    assert str(caught.value).startswith("box.yaml: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [", "line 1: expected the node content"),
        ("a: 1\nb: [1\nc: 2", "line 3: "),
        ("", "has keys and values"),
        ("- 1", "has keys and values"),
        ("a: &x 1\nb: *x", "line 2: aliases are not allowed"),
        ("a: 1\na: 2", "line 2: key 'a' is there twice"),
        ("? [a]\n: b", "line 1: found unhashable key"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("[" * 100_000, "nested too deeply"),
        ("a: " + "9" * 5000, "Exceeds the limit"),
        ("a: \x00", "special characters are not allowed"),
        ("1: 2", "Expected `str`"),
    ],
)
def test_bad_yaml_is_refused_in_one_line(text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message) as caught:
        parse_profile(text, "box.yaml")
    assert str(caught.value).startswith("box.yaml: ")
    assert "\n" not in str(caught.value)


def test_an_alias_bomb_does_not_go_off() -> None:
    lines = ["a0: &a0 [x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)]

    with pytest.raises(ProfileError, match="line 2: aliases are not allowed"):
        parse_profile("\n".join(lines), "bomb")


def test_a_file_is_bounded_and_text(tmp_path: Path) -> None:
    path = tmp_path / "box.yaml"
    path.write_bytes(b"#" * 1_000_001)
    with pytest.raises(ProfileError, match="is larger than 1000000 bytes"):
        load_profile(str(path))
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ProfileError, match="is not UTF-8 text"):
        load_profile(str(path))
    with pytest.raises(ProfileError, match=r"cannot read .*none.yaml: No such file"):
        load_profile(str(tmp_path / "none.yaml"))


@pytest.mark.parametrize("text", ["55e9", "55.0e+9", "55000000000", "5.5e10"])
def test_an_override_is_one_number(text: str) -> None:
    profile = with_overrides(preset(), {"link.h2d.bytes_per_s": text})

    assert profile.link.h2d.bytes_per_s == 55e9
    assert profile.link.d2h == preset().link.d2h
    assert profile_digest(profile) != profile_digest(preset())


def test_an_override_is_admitted_in_the_provenance() -> None:
    profile = with_overrides(preset(), {"link.h2d.bytes_per_s": "55e9", "gpu.memory_bytes": "1e10"})

    assert profile.provenance.link.source == "scaled"
    assert profile.provenance.link.note.endswith("link.h2d.bytes_per_s set to 55e9 by hand")
    assert profile.provenance.cpu == preset().provenance.cpu
    assert profile.gpu.memory_bytes == 10_000_000_000


@pytest.mark.parametrize(("text", "factor"), [("x2", 2), ("x 2", 2), ("x0.5", 0.5), ("x1e-1", 0.1)])
def test_an_override_may_be_a_factor(text: str, factor: float) -> None:
    own, found = preset(), with_overrides(preset(), {"link.h2d.bytes_per_s": text})

    assert found.link.h2d.bytes_per_s == own.link.h2d.bytes_per_s * factor
    assert found.provenance.link.source == "scaled"
    note = found.provenance.link.note
    assert note.endswith(f"link.h2d.bytes_per_s times {text[1:].strip()} by hand")
    whole = with_overrides(preset(), {"gpu.memory_bytes": text}).gpu.memory_bytes
    assert whole == round(own.gpu.memory_bytes * factor)


def test_a_factor_of_one_changes_nothing() -> None:
    assert with_overrides(preset(), {"link.h2d.bytes_per_s": "x1"}) == preset()


def test_a_rate_set_by_hand_counts_in_place_of_measured_points() -> None:
    points = ((1000, 900.0), (10**6, 50_000.0))
    own = preset()
    h2d = msgspec.structs.replace(own.link.h2d, points=points, interpolated=True)
    own = msgspec.structs.replace(own, link=msgspec.structs.replace(own.link, h2d=h2d))
    found = with_overrides(own, {"link.h2d.bytes_per_s": "x2"})

    assert found.link.h2d.bytes_per_s == 2 * h2d.bytes_per_s
    assert not found.link.h2d.interpolated
    assert found.provenance.link.note.endswith("in place of measured points, by hand")
    for other in ({"link.h2d.bytes_per_s": "x1"}, {"link.chunk_bytes": "4096"}):
        assert with_overrides(own, other).link.h2d == h2d


def test_a_name_may_begin_like_a_factor() -> None:
    assert with_overrides(preset(), {"gpu.name": "x2"}).gpu.name == "x2"


def test_nothing_overridden_changes_nothing() -> None:
    assert with_overrides(preset(), {}) == preset()


def test_a_policy_may_have_decisions_of_its_own() -> None:
    profile = with_overrides(preset(), {"host.decision_ns_by_policy.mine": "7"})

    assert decision_ns(profile, "mine") == 7
    assert decision_ns(profile, "other") == profile.host.decision_ns
    assert decision_ns(preset("dali-3090"), "dali") == 500_000


def test_interference_can_be_switched_off() -> None:
    assert (with_overrides(preset(), {"interference": "[]"}).rates() == 1024).all()


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("colour", "1", "no key colour; the profile has: schema, name, "),
        ("gpu.colour", "1", "no key gpu.colour; gpu has: name, memory_bytes, "),
        ("link.x.bytes_per_s", "1", "no key link.x.bytes_per_s; link has: h2d, d2h, "),
        ("gpu.name.x", "1", "no key gpu.name.x: gpu.name has no keys"),
        ("interference.0.busy", "1", "no key interference.0.busy: interference has no keys"),
        ("", "1", "the profile has: schema"),
        ("link.h2d", "1", "link.h2d is a section; there are: latency_ns, bytes_per_s"),
        ("gpu.launch_ns", "fast", "gpu.launch_ns: Expected `int`, got `str`"),
        ("gpu.launch_ns", "-1", "gpu.launch_ns: Expected `int` >= 0"),
        ("gpu.launch_ns", "[", "gpu.launch_ns: line 1: "),
        ("gpu.launch_ns", "*x", "gpu.launch_ns: line 1: aliases are not allowed"),
        ("gpu.memory_bytes", "1e300", "gpu.memory_bytes: Expected `int`"),
        ("gpu.launch_ns", "x-1", "gpu.launch_ns: Expected `int` >= 0"),
        ("gpu.launch_ns", "xnan", "gpu.launch_ns: nan is no factor"),
        ("gpu.launch_ns", "xx", "gpu.launch_ns: Expected `int`, got `str`"),
        ("interference", "x2", r"interference: a factor multiplies a number, and .* is none"),
        ("host.decision_ns_by_policy.mine", "x2", "a factor multiplies a number, and None is none"),
    ],
)
def test_a_bad_override_is_refused(path: str, text: str, message: str) -> None:
    with pytest.raises(ProfileError, match=message):
        with_overrides(preset(), {path: text})
