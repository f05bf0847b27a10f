"""The stored proposals of `calibrate` that the demo shows."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lmms_prune.demo.models import MODELS, DemoError, sizes
from lmms_prune.demo.proposals import PROPOSALS, proposals
from lmms_prune.demo.run import FULL, PAPER_DEPTH, DemoRow
from lmms_prune.schedule import PromptSizes

each_model = pytest.mark.parametrize("folder", [model.folder for model in MODELS])


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """docs/proposals.py."""
    path = Path(__file__).parents[2] / "docs" / "proposals.py"
    spec = importlib.util.spec_from_file_location("proposals_script", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def calibration(script: ModuleType, folder: str) -> dict[str, Any]:
    return json.loads((script.FINDING / folder / "calibrate.json").read_text(encoding="utf-8"))


def test_the_stored_file_is_what_the_command_makes_of_the_finding(script: ModuleType) -> None:
    assert json.loads(PROPOSALS.read_text(encoding="utf-8")) == script.proposals()


@each_model
def test_a_proposal_fits_its_model_and_meets_its_budget(folder: str) -> None:
    proposal, layers, tokens = proposals()[folder], sizes().layers, sizes().tokens_per_image
    proposal.schedule.check(layers, [tokens])
    share = float(proposal.schedule.avg_visual_tokens(layers, [tokens])) / tokens
    assert float(proposal.budget) - 0.01 < share <= float(proposal.budget)
    assert 8 < proposal.horizon <= layers  # the paper's depth, scaled
    # Few tokens or none are kept from the horizon on, or from the layer where information vanishes.
    assert proposal.schedule.stages[-1].layer in (
        proposal.horizon,
        json.loads(PROPOSALS.read_text())[folder]["vanishes"],
    )
    paper = next(row for row in FULL if isinstance(row, DemoRow) and row.role == PAPER_DEPTH)
    assert str(paper.budget) == proposal.budget
    assert str(paper.schedule.solve(paper.budget, PromptSizes(layers, tokens))) != str(proposal.schedule)


@each_model
def test_a_proposal_lost_least_and_less_than_at_the_papers_depth(folder: str, script: ModuleType) -> None:
    """On the documents that verify: its interval ends below where that of the same method's hybrid at layer 8 begins."""
    record = calibration(script, folder)
    assert record["schedule"] == min(record["tried"], key=lambda text: record["tried"][text]["value"])
    [paper] = [loss for text, loss in record["compared"].items() if text.startswith("divprune") and "random@8" in text]
    assert record["verified"]["high"] < paper["low"]


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"tiny-llava": {}}', '{"tiny-llava": {"schedule": "drat@2:0.5"}}']
)
def test_a_missing_or_damaged_file_is_named(content: str | None, tmp_path: Path) -> None:
    path = tmp_path / "proposals.json"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(DemoError, match=r"(?s)the demo lacks .*proposals.json .*install lmms-prune again"):
        proposals(path)
