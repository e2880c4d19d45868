"""The five top-level folders are subpackages of moesim, and every build ships them whole."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = {"calibrate", "policies", "real", "sim", "traces"}
OPTIONAL = {"distributed", "joblib", "matplotlib", "torch", "transformers"}

checkout = pytest.mark.skipif(
    not (ROOT / "src/moesim").is_dir(), reason="needs the checkout, runs against a wheel"
)


def python(*args: str, cwd: Path) -> str:
    """Run another interpreter, away from the checkout, and return what it prints."""
    return subprocess.run(
        [sys.executable, *args], cwd=cwd, check=True, stdout=subprocess.PIPE, text=True
    ).stdout


@checkout
def test_every_folder_is_linked_and_listed() -> None:
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    hatch = tool["hatch"]["build"]
    links = {p.name: p.readlink() for p in (ROOT / "src/moesim").iterdir() if p.is_symlink()}

    assert links == {name: Path("../..", name) for name in FOLDERS}
    assert set(hatch["only-include"]) == FOLDERS | {"src/moesim"}
    assert set(hatch["exclude"]) == {f"/src/moesim/{name}" for name in FOLDERS}
    assert hatch["targets"]["wheel"]["sources"] == {
        "src/moesim": "moesim",
        **{name: f"moesim/{name}" for name in FOLDERS},
    }
    assert set(tool["coverage"]["run"]["source_dirs"]) == FOLDERS | {"src/moesim"}
    assert set(tool["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]) == FOLDERS


@checkout
def test_a_wheel_built_from_the_sdist_misses_no_file(tmp_path: Path) -> None:
    """hatchling leaves out a folder, or a file that .gitignore names, without a word."""
    roots = {"moesim": ROOT / "src/moesim", **{f"moesim/{name}": ROOT / name for name in FOLDERS}}
    expected = {
        f"{package}/{path.relative_to(root).as_posix()}"
        for package, root in roots.items()
        for path in root.rglob("*")  # enters no links
        if path.is_file() and "__pycache__" not in path.parts
    }

    python("-m", "build", "--no-isolation", "--outdir", str(tmp_path), str(ROOT), cwd=tmp_path)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        shipped = {name for name in wheel.namelist() if ".dist-info/" not in name}

    assert shipped == expected


def test_the_folders_are_no_packages_of_their_own(tmp_path: Path) -> None:
    """Nothing but moesim may become importable: `traces` is somebody else's name on PyPI."""
    code = "import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if u.find_spec(n)))"

    assert python("-c", code, *FOLDERS, cwd=tmp_path).split() == []


def test_importing_moesim_imports_no_optional_package(tmp_path: Path) -> None:
    code = """
import importlib, pkgutil, sys
import moesim
for module in pkgutil.walk_packages(moesim.__path__, "moesim."):
    importlib.import_module(module.name)
print(*sys.modules)
"""
    loaded = set(python("-c", code, cwd=tmp_path).split())

    assert {f"moesim.{name}" for name in FOLDERS} <= loaded
    assert loaded & OPTIONAL == set()


def test_no_test_is_skipped_for_want_of_a_package() -> None:
    """What the tests need is in the group `test`; without it they fail."""
    here = Path(__file__)
    for path in here.parent.rglob("test_*.py"):
        text = path.read_text()
        assert path == here or not re.search(r"importorskip|except ImportError", text), path
