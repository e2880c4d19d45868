"""`--plot` of `moesim replay`: one more file, and nothing else changes."""

import json
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import pytest

Cli = Callable[..., CompletedProcess[str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty folder, the current one: matplotlib keeps files of its own elsewhere."""
    path = tmp_path / "pictures"
    path.mkdir()
    monkeypatch.chdir(path)
    return path


def test_a_picture_changes_no_result(cli: Cli, small: Path, folder: Path) -> None:
    path = folder / "run.svg"
    words = ("replay", small, "--policy", "lru", "--machine", "simpy", "--json")
    plain, drawn = cli(*words), cli(*words, "--plot", path)
    assert (plain.returncode, drawn.returncode) == (0, 0)
    results = [json.loads(done.stdout) for done in (plain, drawn)]
    for result in results:
        del result["run"]["wall_s"]
    assert results[0] == results[1]
    assert drawn.stderr == plain.stderr
    assert path.read_text(encoding="utf-8").rstrip().endswith("</svg>")
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--plot", "run.txt"), "run.txt: a picture's name ends in .png, .svg, .pdf"),
        (("--plot", "nowhere/run.png"), "there is no folder"),
        (("--plot", "a.png", "--csv", "a.png"), "must be different files"),
    ],
)
@pytest.mark.parametrize("command", ["replay", "real"])
def test_bad_pictures_end_in_one_line_before_anything_runs(
    cli: Cli, small: Path, folder: Path, command: str, words: tuple[str, ...], said: str
) -> None:  # fmt: skip
    done = cli(command, small, *words)
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert said in done.stderr
    assert not list(folder.iterdir())
