"""How long prompts are guessed to be before they are made."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from datasets import Dataset, Features, Image, Value
from tiny import Family, noise

from lmms_prune.harness.lengths import visual_lengths
from lmms_prune.models.parts import ModelParts

BOUNDS = (56 * 56, 280 * 280)


def stored(width: int, height: int) -> dict:
    buffer = io.BytesIO()
    noise(1, width, height).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    noise(2, 280, 140).save(tmp_path / "picture.png")
    rows = {
        "question": ["a", "b", "c", "d", "e", "f"],
        "image": [
            stored(140, 84),
            {"bytes": None, "path": str(tmp_path / "picture.png")},
            stored(28, 28),
            stored(560, 560),
            {"bytes": b"no image", "path": None},
            stored(140, 84),
        ],
        "second": [None, None, None, None, None, stored(56, 84)],
        "number": [1, 2, 3, 4, 5, 6],
    }
    features = Features({"question": Value("string"), "image": Image(), "second": Image(), "number": Value("int64")})
    return Dataset.from_dict(rows, features=features)


def test_headers_tell_the_visual_tokens(loaded: Callable[..., Family], dataset: Dataset) -> None:
    """Within the bounds of the resizing, in bytes or in a file, all images of a row; what is broken counts nothing."""
    parts = ModelParts.of(loaded("qwen").model)
    found = visual_lengths(parts.family, parts.config, BOUNDS, dataset, [0, 1, 2, 3, 4, 5, 0])
    assert found == pytest.approx({0: 15, 1: 50, 2: 4, 3: 100, 4: 0, 5: 15 + 6})


def test_they_are_those_of_the_processor(loaded: Callable[..., Family], dataset: Dataset) -> None:
    family = loaded("qwen")
    parts = ModelParts.of(family.model)
    inputs = family.inputs(["?"], [[noise(1, 140, 84)]])
    sizes = parts.image_sizes(inputs)
    assert visual_lengths(parts.family, parts.config, BOUNDS, dataset, [0]) == {0: sizes[0]}


def test_nothing_is_read_where_all_have_as_many(loaded: Callable[..., Family], dataset: Dataset) -> None:
    parts = ModelParts.of(loaded("llava").model)
    assert visual_lengths(parts.family, parts.config, BOUNDS, dataset, [0, 1]) == {}
    parts = ModelParts.of(loaded("qwen").model)
    assert visual_lengths(parts.family, parts.config, BOUNDS, dataset.select_columns(["question"]), [0]) == {}
    assert visual_lengths(parts.family, parts.config, BOUNDS, [{"image": None}], [0]) == {}
