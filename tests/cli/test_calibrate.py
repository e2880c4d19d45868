"""`moesim calibrate` on a device that is none: what it prints, keeps, writes and refuses."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from measured import fake_bench, machine, made, tasks
from moesim.calibrate import experts
from moesim.calibrate.series import Bench, Series, Task
from moesim.cli.calibrate import DEFAULT_BASE, PRECISIONS
from moesim.errors import CalibrationError
from moesim.profile import DEFAULT_PRESET, load_profile, user_profile_path

Cli = Callable[..., CompletedProcess[str]]
Offer = Callable[[list[Task]], None]


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Offer:
    """Return a function that says what there is to measure, on a device that is none."""
    monkeypatch.setenv("MOESIM_CACHE_DIR", str(tmp_path / "cache"))
    benches: list[Bench] = []

    def opened(device: str | None, *, quick: bool) -> Bench:
        benches.append(fake_bench(device or "emulated", quick))
        return benches[-1]

    def say(found: list[Task]) -> None:
        monkeypatch.setattr("moesim.calibrate.tasks.tasks_of", lambda *_: found)

    monkeypatch.setattr("moesim.calibrate.tasks.open_bench", opened)
    say(tasks(machine()))
    return say


@pytest.mark.usefixtures("offer")
def test_the_profile_is_written_where_replay_looks_for_it(cli: Cli, small: Path) -> None:
    done = cli("calibrate", "--quick")
    assert done.returncode == 0
    path = user_profile_path()
    text = " ".join(done.stdout.split())
    assert f"Wrote {path}; `moesim replay` on this machine now uses it" in text
    assert "EMULATED device" in text
    assert "Measured quickly" in text
    assert load_profile(None)[0].name.startswith("emulated-")

    replayed = cli("replay", small, "--policy", "lru", "--cache-ratio", "0.5", "--json")
    assert replayed.returncode == 0
    result = json.loads(replayed.stdout)
    assert result["tokens_per_s"] > 0
    assert result["provenance"]["measured"] > 0.5
    assert str(path) in " ".join(result["notices"]) + replayed.stderr


@pytest.mark.usefixtures("offer")
def test_the_numbers_are_printed_with_units_and_errors(cli: Cli) -> None:
    lines = [" ".join(line.split()) for line in cli("calibrate").stdout.splitlines()]
    assert "each kernel 10 µs" in lines
    assert any(line.startswith("to the device 2 GB/s 1.0 % 0.0 % 7") for line in lines)
    assert "gpu + cpu 0.800, 0.800 2.0 %" in lines
    assert "chunks 1 MiB 1.0 % 5" in lines
    assert all(len(line) <= 80 for line in lines if not line.startswith("Wrote"))


def test_what_was_measured_is_not_measured_again(cli: Cli, offer: Offer) -> None:
    assert "kept from" not in cli("calibrate").stdout
    again = cli("calibrate")
    count = len(machine())
    assert f"0 series measured in 0 s, {count} kept from" in again.stdout
    assert f"{count} series measured" in cli("calibrate", "--fresh").stdout
    offer(tasks(machine()[:-1]))
    assert f"{count - 1} kept" in cli("calibrate").stdout


def failing(name: str, error: BaseException) -> Task:
    def run(_: Bench) -> Series:
        raise error

    return Task(name, 1.0, run)


def test_an_interruption_is_one_line_that_says_how_it_goes_on(cli: Cli, offer: Offer) -> None:
    whole = tasks(machine())
    offer([*whole[:3], failing(whole[3].name, KeyboardInterrupt()), *whole[4:]])
    done = cli("calibrate")
    assert done.returncode == 130
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert last == (
        f"moesim: interrupted; 3 of {len(whole)} series are kept,"
        " and the same command goes on from there"
    )
    assert not user_profile_path().exists()

    offer(whole)
    assert f"{len(whole) - 3} series measured in 0 s, 3 kept from" in cli("calibrate").stdout


def test_a_task_that_fails_is_named_and_the_rest_is_written(cli: Cli, offer: Offer) -> None:
    whole = [task for task in tasks(machine()) if task.name != "disk/read"]
    offer([failing("disk/read", CalibrationError("disk: no room")), *whole])
    done = cli("calibrate")
    assert done.returncode == 0
    assert "failed: disk/read: disk: no room" in done.stdout
    assert "not measured: disk, from rtx3090-pcie4-ddr4 (datasheet)" in done.stdout
    assert load_profile(None)[0].provenance.disk.source == "datasheet"


def test_the_output_and_the_base_may_be_others(
    cli: Cli, offer: Offer, tmp_path: Path, small: Path
) -> None:
    offer([task for task in tasks(machine()) if "cpu/" in task.name or "disk" in task.name])
    path = tmp_path / "own.yaml"
    done = cli("calibrate", "--device", "cpu", "--base", "huang-4090", "-o", path)
    assert done.returncode == 0
    assert f"`moesim replay --hardware {path}` uses it" in " ".join(done.stdout.split())
    assert not user_profile_path().exists()
    assert "with-huang-4090" in load_profile(str(path))[0].name
    assert cli("replay", small, "--hardware", path, "--policy", "lru").returncode == 0


@pytest.mark.usefixtures("offer")
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "gpt-2"], "no model named 'gpt-2'; there are: "),
        (["--base", "abacus"], "no hardware named 'abacus'; there are: "),
        (["--precision", "int3"], "'int3' is not one of 'bf16', 'fp16', 'fp32', 'int8', 'int4'"),
        (["-o", "no/such/folder.yaml"], "there is no folder "),
        (["-o", "profile.json"], "a profile's name ends in .yaml or .yml"),
        (["-o", "."], "is no regular file"),
        (["--base", ""], "no hardware named ''; there are: "),
    ],
    ids=str,
)
def test_bad_input_is_one_line_and_exit_code_2(cli: Cli, words: list[str], message: str) -> None:
    done = cli("calibrate", *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert message in done.stderr
    assert done.stderr.startswith("moesim: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("offer")
@pytest.mark.parametrize(
    ("variable", "setting"),
    [("MOESIM_CACHE_DIR", "MOESIM_CACHE_DIR"), ("XDG_CONFIG_HOME", "--output")],
)
def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    cli: Cli, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str, setting: str
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(variable, str(tmp_path / "file" / "folder"))
    done = cli("calibrate")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert (
        f"nothing can be written there (Not a directory); {setting} says where else" in done.stderr
    )


def test_device_and_precisions_are_what_was_asked_for(
    cli: Cli, offer: Offer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def opened(device: str | None, *, quick: bool) -> Bench:
        asked.append((device, quick))
        return fake_bench(quick=quick)

    def of(bench: Bench, models: object, precisions: Sequence[str]) -> list[Task]:
        asked.append(precisions)
        return tasks(machine())

    monkeypatch.setattr("moesim.calibrate.tasks.open_bench", opened)
    monkeypatch.setattr("moesim.calibrate.tasks.tasks_of", of)
    assert cli("calibrate").returncode == 0
    words = ["--device", "emulated:memory=1GiB", "--precision", "int4", "--precision", "fp32"]
    assert cli("calibrate", "--quick", *words).returncode == 0
    assert asked == [(None, False), ("bf16",), ("emulated:memory=1GiB", True), ("int4", "fp32")]


def test_precisions_and_the_base_are_those_that_there_are() -> None:
    """The command names them itself, so that its help imports nothing heavy."""
    assert tuple(experts.PRECISIONS) == PRECISIONS
    assert DEFAULT_BASE == DEFAULT_PRESET


def test_experts_without_a_table_are_said(cli: Cli, offer: Offer) -> None:
    none = Series(
        name="expert/gpu/512x256/4",
        unit="tokens",
        points=(),
        facts={"unsupported": "no such thing"},
    )
    single = made("expert/gpu/512x256/32", "tokens", lambda n: 1e6 * n, [1, 256])
    offer(tasks([*machine(), none, single]))
    text = " ".join(cli("calibrate").stdout.split())
    assert "note: expert/gpu/512x256/4: no kernel for it: no such thing" in text
    assert "note: expert/gpu/512x256/32: 1 ms at n = 1, 256 ms at n = 256; profiles have no" in text


def test_an_option_of_a_device_that_is_not_legal_is_one_line(cli: Cli) -> None:
    done = cli("calibrate", "--device", "emulated:memory=lots")
    assert done.returncode == 2
    assert "moesim: device emulated: memory='lots' is not legal; a size from " in done.stderr
    assert done.stderr.count("\n") == 1


def test_nothing_measured_is_one_line_too(cli: Cli, offer: Offer) -> None:
    offer([failing("disk/read", CalibrationError("disk: no room"))])
    done = cli("calibrate")
    assert done.returncode == 2
    assert "nothing was measured; disk/read: disk: no room" in done.stderr
    assert not user_profile_path().exists()


def test_cuda_without_a_gpu_is_refused(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = cli("calibrate", "--device", "cuda")
    assert done.returncode == 2
    assert "device cuda: PyTorch" in done.stderr
    assert "there are: cpu, emulated" in done.stderr


@pytest.mark.usefixtures("offer")
@pytest.mark.parametrize("name", ["curves.png", "curves.svg"])
def test_the_curves_are_drawn(cli: Cli, tmp_path: Path, name: str) -> None:
    assert cli("calibrate").returncode == 0
    path = tmp_path / name
    done = cli("hardware", "show", "--plot", path)
    assert done.returncode == 0
    assert str(path) in done.stderr
    start = path.read_bytes()[:5]
    assert start == (b"\x89PNG\r" if path.suffix == ".png" else b"<?xml")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_two_machines_are_compared(cli: Cli) -> None:
    words = ("hardware", "compare", "rtx3090-pcie4-ddr4", "rtx5090-pcie5-ddr5")
    lines = [" ".join(line.split()) for line in cli(*words).stdout.splitlines()]
    assert "h2d, GB/s 25 55 2.200" in lines
    rows = {row["key"]: row for row in json.loads(cli(*words, "--json").stdout)["numbers"]}
    assert rows["link.h2d.bytes_per_s"]["ratio"] == 2.2
    assert rows["expert.copy_ns"]["first"] == 387_488

    same = json.loads(cli("hardware", "compare", "fate-3090", "fate-3090", "--json").stdout)
    assert {row["ratio"] for row in same["numbers"]} <= {1.0, None}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "--plot", "curves.txt"], "a picture's name ends in .png, .svg, .pdf"),
        (["show", "--plot", "no/such/folder.png"], "there is no folder "),
        (["compare", "fate-3090", "abacus"], "no hardware named 'abacus'; there are: "),
        (["compare", "fate-3090"], "Missing argument 'SECOND'"),
    ],
    ids=str,
)
def test_hardware_refuses_in_one_line(
    cli: Cli, words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("hardware", *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_without_matplotlib_one_line_says_what_to_install(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    done = cli("hardware", "show", "--plot", tmp_path / "curves.png")
    assert done.returncode == 2
    assert done.stderr == (
        "moesim: plots need matplotlib: pip install 'moesim[plots]'; --json has the numbers\n"
    )
