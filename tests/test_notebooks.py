"""Every notebook runs, in small, and its last table holds what it says; its pages show its code."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import pandas as pd
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
FOLDER, PAGES = ROOT / "notebooks", ROOT / "docs" / "notebooks"

TRACE = {
    "preset": "qwen3-30b", "layers": 2, "sequences": 2, "prompt": 4, "generate": 4, "distances": 1,
}  # fmt: skip


class Case(NamedTuple):
    """What takes the place of a notebook's parameters, and what its table `result` must be."""

    parameters: dict[str, Any]
    holds: Callable[[pd.DataFrame], None]


def fastest_first(table: pd.DataFrame) -> None:
    speeds = table["tokens_per_s"]
    assert set(table["policy"]) == {"lru", "static"}
    assert speeds.is_monotonic_decreasing
    assert ((table["low"] <= speeds) & (speeds <= table["high"])).all()
    assert table.set_index("policy")["speedup"]["static"] == 1


def nothing_beats_knowing(table: pd.DataFrame) -> None:
    assert (table["belady"] >= table["lru"]).all()
    assert table["belady"].is_monotonic_increasing


def causes_sum_to_the_step(table: pd.DataFrame) -> None:
    assert list(table.columns) == ["lru", "hybrimoe"]
    whole, causes = table.iloc[0], table.iloc[1:]
    assert causes.sum().to_dict() == pytest.approx(whole.to_dict())


def errors_are_those_of_the_times(table: pd.DataFrame) -> None:
    off = table["simulated, ms"] / table["measured, ms"] - 1
    assert table["off by"].to_dict() == pytest.approx(off.to_dict())
    assert table["simulated, ms"].is_monotonic_increasing, "the order is not the same"
    assert off.between(-0.11, -0.03).all()


def sharing_is_faster_than_the_cpu_alone(table: pd.DataFrame) -> None:
    speeds = table.set_index("policy")["tokens_per_s"]
    assert set(speeds.index) == {"cheaper.py", "static"}
    assert speeds["cheaper.py"] > speeds["static"]


def grouping_pays(table: pd.DataFrame) -> None:
    published = table["prompts included", "Table 3"]
    assert published.prod() == pytest.approx(22.414 / 5.721)
    assert len(table.columns) == 3
    assert (table.loc["+ multi-batch"] > 1).all()


CASES = {
    "anatomy_of_a_layer": Case(
        {
            "TRACE": TRACE, "LAYERS": 2, "HARDWARE": "rtx3090-pcie4-ddr4", "RATIO": 0.25,
            "POLICIES": ["lru", "hybrimoe"], "STEP": 2, "LAYER": 0, "DRAWN": 2, "MACHINE": "simpy",
        },
        causes_sum_to_the_step,
    ),
    "calibrating_and_validating": Case(
        {
            "MODEL": "qwen3-30b-a3b", "SERIES": "expert/cpu/", "BASE": "rtx3090-pcie4-ddr4",
            "EVIDENCE": "emulated-amd-epyc",
        },
        errors_are_those_of_the_times,
    ),
    "choosing_a_policy": Case(
        {
            "TRACE": TRACE, "LAYERS": 2, "HARDWARE": "rtx3090-pcie4-ddr4",
            "BUDGETS": ["0.3GiB", "1GiB"], "POLICIES": ["static", "lru"], "MODEL": "olmoe-1b-7b",
            "CONTEXT": 128, "MACHINE": "simpy",
        },
        fastest_first,
    ),
    "reading_a_trace": Case(
        {"TRACE": None, "LAGS": [1, 4], "SPANS": [1, 4], "RULES": ["lru", "belady"]},
        nothing_beats_knowing,
    ),
    "reproducing_an_ablation": Case(
        {
            "PROMPT": 4, "GENERATE": 3, "BATCH": 4, "GROUP": 3, "LAYERS": 2,
            "LINKS": {"10 GB/s": 10e9}, "MACHINE": "simpy",
        },
        grouping_pays,
    ),
    "writing_a_policy": Case(
        {
            "TRACE": TRACE, "LAYERS": 2, "HARDWARE": "rtx3090-pcie4-ddr4", "RATIO": 0.25,
            "OTHERS": ["static"], "MACHINE": "simpy",
        },
        sharing_is_faster_than_the_cpu_alone,
    ),
}  # fmt: skip


def read(name: str) -> Any:
    """Return a notebook as it is stored."""
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def parameters_of(notebook: Any) -> Any:
    """Return the one cell that is tagged so."""
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    return cell


@pytest.mark.parametrize("name", CASES)
def test_it_runs_and_its_table_holds_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(variable, str(tmp_path / variable.lower()))
    # The debugger, which nobody uses here, would warn that it cannot see into frozen modules.
    monkeypatch.setenv("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    given = CASES[name].parameters
    notebook = read(name)
    cell = parameters_of(notebook)
    named = {
        node.id
        for node in ast.walk(ast.parse(cell.source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    assert named == set(given)
    cell.source = "\n".join(f"{key} = {value!r}" for key, value in given.items())
    notebook.cells.append(nbformat.v4.new_code_cell('print(result.to_json(orient="split"))'))

    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=120, resources=resources).execute()

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert [o.text for o in outputs if o.get("name") == "stderr"] == []
    table = json.loads(outputs[-1].text)
    columns = [tuple(c) if isinstance(c, list) else c for c in table["columns"]]
    CASES[name].holds(pd.DataFrame(table["data"], table["index"], columns))


def test_every_notebook_is_run_listed_and_stored_without_outputs() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
    assert names == sorted(CASES)
    listed = (FOLDER / "README.md").read_text()
    for name in names:
        assert f"[{name}.ipynb]({name}.ipynb)" in listed
        assert f"(../docs/notebooks/{name}.md)" in listed
        notebook = read(name)
        assert notebook.metadata.kernelspec.name == "python3"
        for cell in notebook.cells:
            assert cell.get("outputs", []) == []
            assert cell.get("execution_count") is None


@pytest.mark.parametrize("name", CASES)
def test_its_page_shows_what_it_says_and_has_its_pictures(name: str) -> None:
    """`make notebooks` was run after the last change."""
    page = (PAGES / f"{name}.md").read_text()
    for cell in read(name).cells:
        assert cell.source.strip() in page
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page)
    assert pictures
    assert sorted(p.name for p in (PAGES / f"{name}_files").iterdir()) == sorted(
        Path(picture).name for picture in pictures
    )
