"""A calibration keeps what it has measured, goes on after anything, and says what it became."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from moesim.calibrate.calibration import (
    WALKED,
    Outcome,
    count_kept,
    digest,
    explained,
    run_tasks,
    state_folder,
    walked_digest,
)
from moesim.calibrate.facts import Facts, machine_facts
from moesim.calibrate.power import Counter, Reading
from moesim.calibrate.series import Bench, Point, Series, Task
from moesim.calibrate.tasks import tasks_of
from moesim.calibrate.timing import Limits
from moesim.errors import CalibrationError
from moesim.model import load_model
from moesim.real.devices import open_device


class Nothing:
    """A device that is none: tasks of these tests measure nothing on it."""

    label = "cpu"
    name = "abacus"
    memory_bytes = 0

    def __init__(self) -> None:
        self.lanes: dict[str, object] = {}
        self.freed = 0

    def free(self, tensor: object) -> None:
        raise NotImplementedError

    taken_bytes = 0

    def free_all(self, but: int = 0) -> None:
        self.freed += 1


def bench(**changes: object) -> Bench:
    device = Nothing()
    for name, value in changes.items():
        setattr(device, name, value)
    return Bench(device, Limits(), False)  # type: ignore[arg-type]


def series(name: str, *ns: float) -> Series:
    points = tuple(
        Point(
            at=2.0**i,
            ns=value,
            median_ns=value,
            spread=0.0,
            repetitions=7,
            settled=True,
            outliers=0,
        )
        for i, value in enumerate(ns or (1.0, 2.0))
    )
    return Series(name=name, unit="tokens", points=points)


def counted(name: str, calls: list[str], error: BaseException | None = None) -> Task:
    def run(_: Bench) -> Series:
        calls.append(name)
        if error is not None:
            raise error
        return series(name)

    return Task(name, 2.0, run)


def ticking(*moments: float) -> Callable[[], float]:
    return iter(moments).__next__


def test_a_repeated_calibration_measures_nothing_again(tmp_path: Path) -> None:
    calls: list[str] = []
    tasks = [counted(name, calls) for name in ("copy/a", "expert/b")]
    first = run_tasks(tasks, bench(), folder=tmp_path)
    again = run_tasks(tasks, bench(), folder=tmp_path)
    assert calls == ["copy/a", "expert/b"]
    assert [outcome.reused for outcome in first.outcomes] == [False, False]
    assert [outcome.reused for outcome in again.outcomes] == [True, True]
    assert first.series == again.series
    assert count_kept(tasks, bench(), tmp_path) == 2

    run_tasks(tasks, bench(), folder=tmp_path, fresh=True)
    assert calls == ["copy/a", "expert/b"] * 2


def test_an_interrupted_calibration_goes_on_where_it_was(tmp_path: Path) -> None:
    calls: list[str] = []
    first = counted("a", calls)
    with pytest.raises(KeyboardInterrupt):
        run_tasks([first, counted("b", calls, KeyboardInterrupt())], bench(), folder=tmp_path)
    assert count_kept([first, counted("b", calls)], bench(), tmp_path) == 1

    found = run_tasks([first, counted("b", calls)], bench(), folder=tmp_path)
    assert calls == ["a", "b", "b"]
    assert [outcome.reused for outcome in found.outcomes] == [True, False]


def test_a_task_that_fails_stops_no_other_and_is_tried_again(tmp_path: Path) -> None:
    calls: list[str] = []
    error = CalibrationError("no room")
    own = bench()
    found = run_tasks([counted("a", calls, error), counted("b", calls)], own, folder=tmp_path)
    assert found.outcomes[0] == Outcome("a", None, "no room", False)
    assert [series.name for series in found.series] == ["b"]
    assert own.device.freed == 2  # type: ignore[attr-defined]

    found = run_tasks([counted("a", calls), counted("b", calls)], bench(), folder=tmp_path)
    assert calls == ["a", "b", "a"]
    assert [series.name for series in found.series] == ["a", "b"]


def test_a_task_must_measure_what_it_says(tmp_path: Path) -> None:
    found = run_tasks([Task("a", 1.0, lambda _: series("b"))], bench(), folder=tmp_path)
    assert found.outcomes[0].error == "task a measured b"
    assert not list(tmp_path.iterdir())


def test_power_is_kept_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """60 J in 2 s, read before and after the task that measures, and not for one that is kept."""
    readings = iter(
        [Reading(1.0, {"package-0": Counter(10.0)}), Reading(3.0, {"package-0": Counter(70.0)})]
    )
    monkeypatch.setattr("moesim.calibrate.calibration.reading", lambda _: next(readings))
    for _ in range(2):
        found = run_tasks([counted("a", [])], bench(), folder=tmp_path)
        kept = found.outcomes[0].kept
        assert kept is not None
        assert kept.watts == {"package-0": 30.0}


def test_what_was_kept_without_power_is_still_used(tmp_path: Path) -> None:
    task = counted("a", [])
    run_tasks([task], bench(), folder=tmp_path)
    (file,) = tmp_path.iterdir()
    kept = json.loads(file.read_text())["kept"]
    del kept["watts"]
    text = json.dumps(kept)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    file.write_text(f'{{"sha256": "{sha256}", "kept": {text}}}')
    found = run_tasks([task], bench(), folder=tmp_path)
    assert found.outcomes[0].reused


def test_errors_are_one_line() -> None:
    assert explained(CalibrationError("a\n b")) == "a b"
    assert explained(RuntimeError("no\nkernel")) == "RuntimeError: no kernel"


def test_progress_tells_the_seconds_left_at_the_pace_so_far(tmp_path: Path) -> None:
    """Three tasks of 20 s, a tenth of which, 6 s, is believed anyway.

    The first takes 60 s: (60 + 6) / (20 + 6) times the 40 s left. The second takes 6 s.
    """
    told: list[tuple[int, int, float, str]] = []
    tasks = [counted(name, [])._replace(seconds=20.0) for name in "abc"]
    clock = ticking(0, 60, 60, 60, 66, 66, 66, 67, 67)
    run_tasks(
        tasks, bench(), folder=tmp_path, clock=clock, progress=lambda *words: told.append(words)
    )
    assert [words[::3] for words in told] == [(0, "a"), (1, "b"), (2, "c"), (3, "")]
    assert {words[1] for words in told} == {3}
    left = [words[2] for words in told]
    assert left == pytest.approx([60.0, 40 * 66 / 26, 20 * 72 / 46, 0.0])

    told.clear()
    run_tasks(tasks, bench(), folder=tmp_path, progress=lambda *words: told.append(words))
    assert [words[2] for words in told] == [0.0] * 4


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"series": 1}', "\0" * 20, '{"sha256": "", "kept": {}}']
)
def test_what_is_kept_and_broken_is_measured_again(tmp_path: Path, text: str) -> None:
    calls: list[str] = []
    task = counted("a", calls)
    run_tasks([task], bench(), folder=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_text(text)
    run_tasks([task], bench(), folder=tmp_path)
    assert calls == ["a", "a"]
    assert json.loads(file.read_text())["kept"]["series"]["name"] == "a"


def test_what_is_kept_and_was_changed_is_measured_again(tmp_path: Path) -> None:
    calls: list[str] = []
    task = counted("a", calls)
    run_tasks([task], bench(), folder=tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_text()
    changed = whole.replace('"ns":1.0', '"ns":0.0')
    assert changed != whole
    file.write_text(changed)
    assert run_tasks([task], bench(), folder=tmp_path).series == (series("a"),)
    assert calls == ["a", "a"]
    assert '"ns":1.0' in file.read_text()


def test_what_is_kept_is_asked_for_by_everything_that_decides_it() -> None:
    facts = Facts(cpu="abacus", cores=1, threads=2, memory_bytes=1 << 30, load=0.0, mhz=0.0)
    task = counted("a", [])
    own = bench()
    others = [
        (counted("b", []), own, facts),
        (task, bench(name="slide rule"), facts),
        (task, bench(memory_bytes=1), facts),
        (task, own._replace(limits=Limits(least=9)), facts),
        (task, own._replace(quick=True), facts),
        (task, own, msgspec.structs.replace(facts, cpu="slide rule")),
        (task, own, msgspec.structs.replace(facts, threads=4)),
    ]
    found = {digest(*other) for other in others}
    assert len(found) == len(others)
    assert digest(task, own, facts) not in found
    assert digest(task, own, msgspec.structs.replace(facts, load=9.0)) == digest(task, own, facts)


def test_code_decides_what_is_kept_where_it_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host program and the policies decide their own times, and no copy's."""
    facts, names = machine_facts(), ("host/decision/lru", "copy/a")
    before = [digest(counted(name, []), bench(), facts) for name in names]
    monkeypatch.setattr("moesim.calibrate.calibration.walked_digest", lambda: "changed")
    walked = [digest(counted(name, []), bench(), facts) for name in names]
    assert [a == b for a, b in zip(before, walked, strict=True)] == [False, True]
    monkeypatch.setattr("moesim.calibrate.calibration.code_digest", lambda: "changed")
    after = [digest(counted(name, []), bench(), facts) for name in names]
    assert all(a != b for a, b in zip(walked, after, strict=True))


def test_the_host_program_and_every_policy_are_in_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of copies of their files; a byte more in any of them changes it."""
    import moesim
    import moesim.policies

    policies = tmp_path / "policies"
    (policies / "parts").mkdir(parents=True)
    files = [
        *(tmp_path / name for name in WALKED),
        policies / "lru.py",
        policies / "parts" / "a.py",
    ]
    for file in files:
        file.write_text("pass\n")
    monkeypatch.setattr(moesim, "__path__", [str(tmp_path)])
    monkeypatch.setattr(moesim.policies, "__path__", [str(policies)])
    found = {walked_digest.__wrapped__()}
    for file in files:
        file.write_text("pass  # more\n")
        found.add(walked_digest.__wrapped__())
    assert len(found) == len(files) + 1


def test_a_busy_machine_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quiet = Facts(cpu="abacus", cores=4, threads=4, memory_bytes=1, load=0.0, mhz=0.0)
    for load in (9.0, 0.0):
        facts = msgspec.structs.replace(quiet, load=load)
        monkeypatch.setattr("moesim.calibrate.calibration.machine_facts", lambda own=facts: own)
        (outcome,) = run_tasks([counted("a", [])], bench(), folder=tmp_path).outcomes
        assert outcome.kept is not None
        assert outcome.kept.busy


def test_versions_decide_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = machine_facts()
    before = digest(counted("a", []), bench(), facts)
    monkeypatch.setattr("moesim.calibrate.calibration.versions", lambda: {"torch": "99"})
    assert digest(counted("a", []), bench(), facts) != before


@pytest.mark.parametrize("kind", ["cpu", "emulated:memory=256MiB"])
def test_every_task_is_there_once_and_on_a_lane_that_is_there(kind: str) -> None:
    device = open_device(kind)
    own = Bench(device, Limits(), True)
    models = [load_model(name) for name in ("qwen3-30b-a3b", "deepseek-v3", "qwen3-30b-a3b")]
    found = tasks_of(own, models)
    device.close()
    names = [task.name for task in found]
    assert len(names) == len(set(names))
    assert all(task.seconds > 0 for task in found)
    assert {"expert/cpu/2048x768/16", "expert/cpu/7168x2048/16", "disk/read"} <= set(names)
    kinds = {name.split("/")[0] for name in names}
    # Lanes are measured together at work on the first model's experts, whatever else there is.
    shapes = {name.split("/")[1] for name in names if name.startswith("interference/")}
    assert shapes == ({"2048x768"} if kind != "cpu" else set())
    assert ("copy" in kinds) == ("interference" in kinds) == (kind != "cpu")
    assert any("/gpu/" in name for name in names) == (kind != "cpu")


def test_the_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path))
    assert state_folder() == tmp_path / "calibration"


def test_a_machine_is_busy_by_its_load_per_thread() -> None:
    facts = Facts(cpu="abacus", cores=4, threads=4, memory_bytes=1, load=1.0, mhz=0.0)
    assert not facts.busy
    assert msgspec.structs.replace(facts, load=1.1).busy
    assert not msgspec.structs.replace(facts, load=-1.0).busy
