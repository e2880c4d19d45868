"""`moesim models` and `moesim hardware`: what they print, and how they refuse."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moesim.cli import main, moesim


def run(*args: str) -> Result:
    result = CliRunner().invoke(moesim, args, catch_exceptions=False)
    assert result.exit_code == 0
    return result


@pytest.fixture(autouse=True)
def _not_calibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def test_models_are_listed() -> None:
    text = run("models").stdout
    line = next(line for line in text.splitlines() if line.startswith("qwen3-30b-a3b"))

    assert " ".join(line.split()) == "qwen3-30b-a3b 48 128 8 9.4 2.65 58.0 16.3 30.5 3.4"
    assert all(len(line) <= 80 for line in text.splitlines())


def test_models_are_listed_as_json() -> None:
    rows = {row["name"]: row for row in json.loads(run("models", "--json").stdout)}

    assert len(rows) == 13
    assert rows["mixtral-8x7b"]["expert_bytes"]["16"] == 352_321_536
    assert rows["mixtral-8x7b"]["all_expert_bytes"]["16"] == 256 * 352_321_536


def test_a_model_is_shown() -> None:
    text = run("models", "show", "Mixtral-8x7B-Instruct-v0.1").stdout

    assert "8 per layer, top-2 per token" in text
    assert "352.32 MB at 16 bit" in text
    shown = json.loads(run("models", "show", "deepseek-v3", "--json").stdout)
    assert shown["spec"]["attention"]["kv_lora_rank"] == 512


def test_hardware_is_listed() -> None:
    text = run("hardware").stdout
    names = [line.split()[0] for line in text.splitlines() if "RTX 3090" in line]

    assert names == ["dali-3090", "fate-3090", "klotski-env1", "rtx3090-pcie4-ddr4"]
    rows = json.loads(run("hardware", "--json").stdout)
    assert {row["provenance"]["gpu"] for row in rows} == {"datasheet"}


def test_hardware_is_shown_with_its_provenance() -> None:
    text = " ".join(run("hardware", "show", "huang-4090").stdout.split())

    assert "Threadripper 7960X" in text
    assert "One expert of qwen3-30b-a3b" in text
    assert "28.02 ms for the two Mixtral-8x7B experts" in text


def test_the_default_hardware_is_announced_on_stderr() -> None:
    result = run("hardware", "show", "--json")

    assert json.loads(result.stdout)["name"] == "rtx3090-pcie4-ddr4"
    assert "preset rtx3090-pcie4-ddr4" in result.stderr


def test_the_crossover_by_hand() -> None:
    """Qwen3 at 16 bits, 25 GB/s: a copy of 387,488 ns; the CPU takes 20,000 + n x 13,481.7 ns."""
    shown = json.loads(run("hardware", "show", "rtx3090-pcie4-ddr4", "--json").stdout)
    row = shown["times"]["experts"][0]

    assert row["copy_ns"] == 387_488
    assert row["crossover_tokens"] == 28
    assert 27 * 13_481.7 + 20_000 < 387_488 < 28 * 13_481.7 + 20_000


def test_a_setting_changes_the_times() -> None:
    args = ("hardware", "show", "rtx3090-pcie4-ddr4", "--set", "link.h2d.bytes_per_s=55e9")
    shown = json.loads(run(*args, "--model", "mixtral-8x7b", "--json").stdout)

    assert shown["times"]["experts"][0]["copy_ns"] == pytest.approx(6.4e6, rel=0.01)
    assert shown["provenance"]["link"] == "scaled"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["models", "show", "gpt-2"], "no model named 'gpt-2'; there are: "),
        (["models", "show", "nothing.json"], "cannot read nothing.json: No such file"),
        (["hardware", "show", "abacus"], "no hardware named 'abacus'; there are: "),
        (["hardware", "show", "nothing.yaml"], "cannot read nothing.yaml: No such file"),
        (["hardware", "show", "a6000-pcie4", "--model", "x"], "no model named 'x'; there are: "),
        (["hardware", "show", "--set", "gpu"], "--set gpu: write key=value"),
        (["hardware", "show", "--set", "gpu.x=1"], "no key gpu.x; gpu has: name, "),
        (["hardware", "show", "--set", "gpu.launch_ns=-1"], "gpu.launch_ns: Expected `int` >= 0"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    args: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moesim", *args])
    with pytest.raises(SystemExit) as caught:
        main()
    out, err = capsys.readouterr()

    assert caught.value.code == 2
    assert out == ""
    assert message in err
    assert err.startswith("moesim: ")
    assert err.count("\n") == 1
