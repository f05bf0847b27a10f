"""How long prompts will be, before they are made: so that prompts of one batch are about alike, and little is padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

from datasets import Image as ImageFeature
from PIL import Image

from lmms_prune.models import Family

CHARACTERS = 4  # of a text token, about


def visual_lengths(
    family: Family, config: Any, bounds: tuple[int, int], dataset: Any, numbers: Sequence[int]
) -> Mapping[int, float]:
    """About how many visual tokens some documents have, from their images' headers alone.

    Nothing where all images have as many; an image that is not in the document's own row, or that cannot be read, has
    none here (if it cannot be read at all, its sample will say so).

    Args:
        family, config: of the model.
        bounds: the fewest and the most pixels to which images are resized.
        dataset: one split of a task.
        numbers: documents.
    """
    features = getattr(dataset, "features", None) or {}
    names = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    if family.tokens_per_image(config) is not None or not names:
        return {}
    raw = dataset.select_columns(names).with_format("arrow")
    side = family.pixel_side(config)
    made = {}
    for number in set(numbers):
        [row] = raw[[number]].to_pylist()
        areas = [_area(image) for image in row.values() if image is not None]
        made[number] = sum(min(max(area, bounds[0]), bounds[1]) / side**2 for area in areas if area)
    return made


def _area(stored: Mapping[str, Any]) -> int:
    """Pixels of an image as datasets keep it: its bytes, or a path."""
    try:
        with Image.open(BytesIO(stored["bytes"]) if stored["bytes"] else stored["path"]) as image:
            return image.width * image.height
    except (OSError, Image.DecompressionBombError):
        return 0
