"""What a model sees of an image, and drawings over its visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.models.parts import ModelParts
from lmms_prune.record.information import InformationError

SIDE = 28  # pixels of a visual token in a drawing


def grids_of(wrapper: PrunedModel, inputs: dict[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of the visual tokens of each image of one prompt."""
    parts = ModelParts.of(wrapper.model)
    visual = (inputs["input_ids"][0] == parts.config.image_token_id).tolist()
    return parts.grids(inputs, [size for _, size in parts.spans(visual, inputs)])


def seen_images(
    wrapper: PrunedModel, messages: Any, inputs: dict[str, Any], grids: Sequence[tuple[int, int]]
) -> list[Image.Image]:
    """Each image as the model sees it: cropped or padded (LLaVA), resized (Qwen2.5-VL), SIDE pixels a visual token.

    Args:
        wrapper: the model.
        messages: the prompt as the harness builds it.
        inputs: what the processor made of it.
        grids: rows and columns of each image's visual tokens.
    """
    sizes = [(columns * SIDE, rows * SIDE) for rows, columns in grids]
    pixels = inputs["pixel_values"]
    if pixels.ndim == 4:
        # What the crop or the padding left; a processor's normalisation is undone.
        processor = wrapper.processor.image_processor
        mean, deviation = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
        plain = (pixels.float().cpu() * deviation + mean).clamp(0, 1)
        arrays = [(image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8) for image in plain]
        return [Image.fromarray(array).resize(size) for array, size in zip(arrays, sizes, strict=True)]
    images = wrapper.images_of(messages)
    if len(images) != len(sizes):
        raise InformationError(f"the prompt shows {len(images)} images, but its tokens are those of {len(sizes)}.")
    return [image.convert("RGB").resize(size) for image, size in zip(images, sizes, strict=True)]


def dimmed(image: Image.Image, kept: np.ndarray) -> Image.Image:
    """An image with the visual tokens that are not `kept` (rows, columns; true or false) almost white."""
    colours = np.asarray(image, dtype=float)
    mask = np.kron(kept.astype(float), np.ones((image.height // kept.shape[0], image.width // kept.shape[1])))[
        ..., None
    ]
    return Image.fromarray((colours * mask + (255 - 0.15 * (255 - colours)) * (1 - mask)).astype(np.uint8))
