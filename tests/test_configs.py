"""What is written down twice is the same in both places."""

from __future__ import annotations

from pathlib import Path

from lmms_prune.harness.models import MODELS
from lmms_prune.methods import METHODS
from lmms_prune.models import FAMILIES

ROOT = Path(__file__).parents[1]


def test_every_family_has_its_wrapper() -> None:
    assert {name: kind.family for name, kind in MODELS.items()} == {
        family.model_name: family for family in FAMILIES.values()
    }


def test_the_readme_has_a_row_for_every_method() -> None:
    """Name, class, layers, paper and file as the table of methods says them."""
    rows = {}
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("| `") and len(cells) == 8:
            rows[cells[0].strip("`")] = cells
    assert set(rows) == set(METHODS)
    for name, (_, _, kind, layers, keeps, paper, file, checked) in rows.items():
        spec = METHODS[name]
        assert kind == spec.kind + (", rewrites" if spec.rewrites and spec.kind != "merging" else "")
        deepest = "any" if spec.highest_layer is None else str(spec.highest_layer)
        assert layers == (f"≥ {spec.lowest_layer}" if spec.lowest_layer else deepest)
        assert ("or its own" in keeps) == (spec.keep == "optional")
        assert paper == f"[{spec.paper.rsplit('/', 1)[1]}]({spec.paper})"
        assert file == f"[{name}.py](lmms_prune/methods/{name}.py)"
        assert (ROOT / f"lmms_prune/methods/{name}.py").is_file()
        assert checked
