"""The YAMLs in model_configs/ are what they say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lmms_prune.families import FAMILIES
from lmms_prune.harness.arguments import ModelArguments
from lmms_prune.harness.models import LlavaPruned, PrunedModel, Qwen25VLPruned
from lmms_prune.methods import METHODS
from lmms_prune.presets import PRESETS

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "model_configs").glob("*.yaml"))
WRAPPERS: dict[str, type[PrunedModel]] = {"llava_pruned": LlavaPruned, "qwen2_5_vl_pruned": Qwen25VLPruned}
DEPTH = {"llava_pruned": 32, "qwen2_5_vl_pruned": 28}


def test_every_family_has_its_wrapper() -> None:
    assert {wrapper.family.model_name: wrapper for wrapper in WRAPPERS.values()} == WRAPPERS
    assert set(WRAPPERS) == {family.model_name for family in FAMILIES.values()}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_can_be_run_on_its_model(path: Path) -> None:
    config: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    wrapper = WRAPPERS[config["model"]]
    defaults = {"pretrained": wrapper.family.default, **wrapper.defaults}
    arguments = ModelArguments.read(config["model_args"], {"batch_size": 1}, defaults, wrapper.refused)
    arguments.schedule.check(DEPTH[config["model"]], [576])
    row = path.stem.split("_", 1)[1]
    assert str(arguments.schedule) == PRESETS[row]
    assert config["output_path"].endswith(path.stem)
    assert config["log_samples"] is True


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
