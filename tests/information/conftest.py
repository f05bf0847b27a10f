"""The demo's trained model as lmms-eval loads it, and documents made by hand."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from built import Mirror

from lmms_prune.demo import content, questions
from lmms_prune.demo.pictures import draw
from lmms_prune.demo.run import MODELS, weights
from lmms_prune.harness.documents import Document
from lmms_prune.harness.models import unpruned
from lmms_prune.harness.pruned import PrunedModel


@pytest.fixture(scope="session")
def data(mirror: Mirror) -> Path:
    """The folder of the local benchmarks with eight rows each."""
    return mirror(rows=8)


@pytest.fixture(scope="session")
def wrappers() -> dict[str, PrunedModel]:
    """The demo's two models by lmms-eval's names."""
    return {
        model.family.model_name: unpruned(
            model.family.model_name, f"pretrained={weights(model)},device=cpu,dtype=float32,{model.arguments}"
        )
        for model in MODELS
    }


@pytest.fixture(scope="session")
def document() -> Callable[[int], Document]:
    """The n-th question about a drawn scene, as a task would have it."""

    def made(number: int, answers: Any = None) -> Document:
        rng = random.Random(f"document {number}")
        scene = content.scene(rng, "test")
        asked = questions.about(rng, scene, "test")
        image = draw(rng, scene).image
        text = f"{asked.question}\nAnswer the question using a single word or phrase."
        parts = [{"type": "image", "url": image}, {"type": "text", "text": text}]
        target = asked.answer if answers is None else answers
        fields = {"question": asked.question, "image": image}
        return Document("drawn", "test", number, fields, target, [{"role": "user", "content": parts}])

    return made
