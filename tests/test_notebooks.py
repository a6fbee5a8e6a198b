"""The notebooks of the docs: kept without outputs, installed by their first cell, and run."""

import json
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs/notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@every_notebook
def test_a_notebook_is_kept_without_outputs_and_installs_what_it_needs(path):
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert "find_spec" in (first := "".join(code[0]["source"]))
    assert '%pip install -q "normlab[' in first


@pytest.mark.slow
@every_notebook
def test_a_notebook_runs(path):
    nbformat = pytest.importorskip("nbformat")
    client = pytest.importorskip("nbclient").NotebookClient
    book = nbformat.read(path, as_version=4)
    client(book, timeout=300, kernel_name="python3").execute()
    assert any(cell.get("outputs") for cell in book.cells)
