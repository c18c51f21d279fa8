"""The notebook: each cell runs, in order, on a network that is done at once."""

import io
import json
import runpy
import sys
from pathlib import Path
from types import ModuleType

import matplotlib.pyplot as plt
import pytest
from PIL import Image

import sra2_jax as sra

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"
TINY = ("model.width=16", "model.depth=2", "sampling.steps=2")


@pytest.mark.filterwarnings("ignore:.*non-interactive")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_runs_from_top_to_bottom(tmp_path, monkeypatch):
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    for theirs, ours in (
        ("STEPS = 600", "STEPS = 3"),
        ("2.5, 4.0]", "]"),
        ('images="mnist"', 'images="digits"'),  # a third as many
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    display = ModuleType("IPython.display")
    pages = []
    display.HTML = pages.append
    monkeypatch.setitem(sys.modules, "IPython", None)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    load, shown = sra.load, []

    def show():
        file = io.BytesIO()
        plt.savefig(file)
        shown.append(Image.open(file).size)
        plt.close()

    monkeypatch.setattr(sra, "load", lambda *words: load(*words, *TINY), raising=False)
    monkeypatch.setattr(plt, "show", show)
    monkeypatch.chdir(tmp_path)
    Path("cells.py").write_text(code)
    runpy.run_path("cells.py")
    assert len(shown) == 6
    assert len(pages) == 1
    assert pages[0].count("data:image/png") == 2


def test_shows_its_outputs():
    """It is committed as it was run: pictures, no error."""
    outputs = [
        output
        for cell in json.loads(NOTEBOOK.read_text())["cells"]
        for output in cell.get("outputs", ())
    ]
    pictures = [x for x in outputs if "image/png" in x.get("data", {})]
    assert len(pictures) == 6
    assert not [x for x in outputs if x["output_type"] == "error"]
