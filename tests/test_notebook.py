"""The notebook runs from top to bottom, on a tiny model."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

import tiny

ROOT = Path(__file__).parents[1]


def test_the_notebook_runs_and_shows_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_MODEL", str(tiny.write_model_folder(tmp_path / "model")))
    notebook = nbformat.read(ROOT / "notebooks" / "sample.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.pop("outputs", None) if cell.cell_type != "code" else cell.update(outputs=[])
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(ROOT / "notebooks")}}).execute()
    shown = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(shown) == 8
