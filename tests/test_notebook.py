"""docs/example.ipynb: what it stores is what running it prints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs nbformat, nbclient and ipykernel: pip install '.[dev]'")

ROOT = Path(__file__).parents[1]
STORED = ROOT / "docs" / "example.ipynb"
RUN = """
import json, sys
from pathlib import Path
import nbformat
sys.path.insert(0, "docs")
from notebook import NOTEBOOK, executed, texts
stored, now = nbformat.read(NOTEBOOK, as_version=4), executed(Path(sys.argv[1]))
print(json.dumps([list(texts(stored)), list(texts(now))]))
"""


@pytest.mark.slow
def test_the_notebook_prints_what_it_stores(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, str(tmp_path.resolve())]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    stored, now = json.loads(done.stdout.splitlines()[-1])
    assert len(stored) > 20
    assert now == stored, "make it anew: python docs/notebook.py"


def test_the_notebook_is_small_and_holds_no_path_of_a_machine() -> None:
    text = STORED.read_text(encoding="utf-8")
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text) < 400_000
    assert str(ROOT) not in text
    assert "/tmp" not in text
    assert not [
        output for cell in notebook.cells for output in cell.get("outputs", ()) if output.output_type == "error"
    ]
