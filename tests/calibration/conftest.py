"""Tiny checkpoints of both families with four decoder layers, prompts for them, and a file of samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from built import UNLIKE, Checkpoint
from masked import QUESTIONS, Searched, picture
from tiny import load


@pytest.fixture(scope="session")
def shallow(checkpoint: Checkpoint) -> dict[str, Path]:
    return {family: checkpoint(family, layers=4, seed=3) for family in (*UNLIKE, "qwen3_vl")}


@pytest.fixture(scope="session")
def all_searched(shallow: dict[str, Path], full: bool) -> dict[str, Searched]:
    """Each family, and one that adds between its layers, with five prompts, or four without --full."""
    questions = QUESTIONS if full else QUESTIONS[:4]
    families = {}
    for name, folder in shallow.items():
        sdpa, eager = (load(name, folder, torch.float64, kernel) for kernel in ("sdpa", "eager"))
        prompts = [sdpa.inputs([question], [[picture(i)]]) for i, question in enumerate(questions)]
        families[name] = Searched(name, sdpa, eager, prompts)
    return families


@pytest.fixture(params=UNLIKE)
def searched(request: pytest.FixtureRequest, all_searched: dict[str, Searched]) -> Searched:
    return all_searched[request.param]


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of three samples, the last in LLaVA's form, in the folder of its images."""
    folder = tmp_path_factory.mktemp("samples")
    entries: list[dict[str, Any]] = []
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
        entries.append({"image": f"{i}.png", "question": QUESTIONS[i]})
    turn = {"from": "human", "value": f"<image>\n{QUESTIONS[2]}"}
    entries[2] = {"id": "x", "image": "2.png", "conversations": [turn, {"from": "gpt", "value": "no"}]}
    file = folder / "samples.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries), "utf-8")
    return file
