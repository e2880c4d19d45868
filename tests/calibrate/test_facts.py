"""What the system says of a machine, and what it does not."""

from pathlib import Path

import msgspec
import pytest

from moesim.calibrate import facts
from moesim.calibrate.assembly import description_of
from moesim.calibrate.calibration import Calibration
from moesim.calibrate.facts import Facts, clock_mhz, machine_facts
from moesim.profile import DEFAULT_PRESET, load_profile


def test_a_machine_has_no_more_cores_than_threads() -> None:
    found = machine_facts()
    assert 1 <= found.cores <= found.threads
    assert found.mhz >= 0
    assert found.cpu


@pytest.mark.parametrize(
    ("text", "mhz"),
    [
        ("model name : abacus\ncpu MHz\t\t: 800.0\n\ncpu MHz\t\t: 4100.5\ncpu MHz : 820.0\n", 820),
        ("cpu MHz : 1000\ncpu MHz : 3000\n", 2000),
        ("processor : 0\nBogoMIPS : 50.00\n", 0),
        ("cpu MHz : unknown\n", 0),
    ],
)
def test_the_clock_is_the_median_of_the_threads(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str, mhz: float
) -> None:
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(facts, "CPUINFO", path)
    assert clock_mhz() == 0
    path.write_text(text)
    assert clock_mhz() == mhz


@pytest.mark.parametrize("mhz", [0.0, 2600.4])
def test_the_profile_says_cores_threads_load_and_clock(mhz: float) -> None:
    before = Facts(cpu="Abacus", cores=2, threads=4, memory_bytes=1 << 34, load=0.25, mhz=mhz)
    after = msgspec.structs.replace(before, load=1.5, mhz=3100.0)
    device = {"label": "cpu", "name": "Abacus", "memory_bytes": 0, "threads": {"cpu": 2}}
    text = description_of(
        Calibration((), device, before, after, False), load_profile(DEFAULT_PRESET)[0]
    )
    assert "Abacus, 2 cores, 4 threads, 16.0 GiB; threads: 2 for lane cpu." in text
    assert "Load average 0.2 before, 1.5 after." in text
    assert ("Clock 2600 MHz before, 3100 after." in text) == (mhz > 0)
