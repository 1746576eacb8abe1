"""Every notebook runs from top to bottom, is short, and needs few modules."""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT_DIR = Path(__file__).parents[1]
NOTEBOOK_FILES = sorted((ROOT_DIR / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
@pytest.mark.parametrize("notebook_file", NOTEBOOK_FILES, ids=lambda file: file.stem)
def test_notebook_runs_without_a_demo_checkpoint(notebook_file: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(notebook_file, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    printed = [
        output.get("text", "")
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output["output_type"] == "stream" and output["name"] == "stdout"
    ]
    assert any("paths: 3" in text for text in printed)
    pictures = [output for cell in notebook.cells for output in cell.get("outputs", []) if "data" in output]
    assert sum("image/png" in output["data"] for output in pictures) >= 3


@pytest.mark.parametrize("notebook_file", NOTEBOOK_FILES, ids=lambda file: file.stem)
def test_notebook_defines_nothing_stays_short_and_needs_three_modules(notebook_file: Path) -> None:
    notebook = nbformat.read(notebook_file, as_version=4)
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    assert len(code) <= 10
    lines = [line for source in code for line in source.splitlines() if not line.startswith("%")]
    tree = ast.parse("\n".join(lines))
    assert not any(isinstance(node, ast.FunctionDef | ast.ClassDef) for node in ast.walk(tree))
    modules = {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert len([name for name in modules if name.startswith("parallel_decoupling")]) <= 3
