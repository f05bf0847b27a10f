"""The functions of the task that ``calibrate --data`` writes for a user's own samples: image, question, answers and score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from lmms_prune.harness.tasks import equal_after_normalisation
from lmms_prune.record.files import read_image


def image(doc: Mapping[str, Any]) -> list[Image.Image]:
    """Return the sample's image."""
    return [read_image(Path(doc["image"])).convert("RGB")]


def question(doc: Mapping[str, Any]) -> str:
    """Return the question, as the user wrote it."""
    return str(doc["question"])


def answers(doc: Mapping[str, Any]) -> list[str]:
    """Return the right answers."""
    return [str(answer) for answer in doc["answers"]]


def scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Return whether the given answer is one of the right ones, after VQA's own normalisation."""
    equal = [equal_after_normalisation({"answer": answer}, results)["exact_match"] for answer in answers(doc)]
    return {"exact_match": max(equal, default=0.0)}
