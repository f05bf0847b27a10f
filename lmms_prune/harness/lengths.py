"""Cheap prompt-length estimates, used to batch prompts of similar length and reduce padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from datasets import Image as ImageFeature
from PIL import Image

from lmms_prune.models import Family

CHARACTERS = 4  # average characters per text token


def visual_lengths(
    family: Family, config: Any, bounds: tuple[int, int], dataset: Any, numbers: Sequence[int]
) -> Mapping[int, float]:
    """Estimate the visual tokens of documents, from their images' headers alone.

    Empty if all images have the same number of tokens. An image outside the document's own row, or an unreadable one,
    counts as 0 here; an unreadable image is reported when its sample is answered.

    Args:
        family, config: the model's family and configuration.
        bounds: smallest and largest number of pixels to which images are resized.
        dataset: one split of a task.
        numbers: the documents' numbers in the split.
    """
    features = getattr(dataset, "features", None) or {}
    names = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    if family.tokens_per_image(config) is not None or not names:
        return {}
    raw = dataset.select_columns(names).with_format("arrow")
    side = family.pixel_side(config)
    lengths = {}
    for number in set(numbers):
        [row] = raw[[number]].to_pylist()
        areas = [_area(image) for image in row.values() if image is not None]
        lengths[number] = sum(min(max(area, bounds[0]), bounds[1]) / side**2 for area in areas if area)
    return lengths


def _area(stored: Mapping[str, Any]) -> int:
    """Return the pixels of an image stored by `datasets` as bytes or path; 0 if unreadable."""
    try:
        with Image.open(BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
            return image.width * image.height
    except (OSError, Image.DecompressionBombError):
        return 0
