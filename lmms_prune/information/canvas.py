"""Images as the model sees them, and drawings over their visual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lmms_prune.harness.pruned import PrunedModel
from lmms_prune.models.mosaic import Mosaic
from lmms_prune.models.parts import ModelParts

SIDE = 28  # pixels of a visual token in a drawing


def grids_of(wrapper: PrunedModel, inputs: dict[str, Any]) -> list[tuple[int, int]]:
    """Rows and columns of the visual tokens of each image of one prompt; of an image in tiles, of its base and its canvas."""
    return [grid for grids in grids_by_image(wrapper, inputs) for grid in grids]


def grids_by_image(wrapper: PrunedModel, inputs: dict[str, Any]) -> list[tuple[tuple[int, int], ...]]:
    """The same grids, those of each image together."""
    parts = ModelParts.of(wrapper.model)
    visual = (inputs["input_ids"][0] == parts.config.image_token_id).tolist()
    return parts.rectangles(inputs, [size for _, size in parts.spans(visual, inputs)])


def seen_images(wrapper: PrunedModel, inputs: dict[str, Any], grids: Sequence[tuple[int, int]]) -> list[Image.Image]:
    """Each image as the model sees it, reconstructed from the model's input pixels, with SIDE pixels per visual token.

    Args:
        wrapper: the model.
        inputs: the processor's output for a prompt.
        grids: rows and columns of each image's visual tokens.
    """
    processor = wrapper.processor.image_processor
    mean, deviation = (torch.tensor(v)[:, None, None] for v in (processor.image_mean, processor.image_std))
    images = []
    mosaics = ModelParts.of(wrapper.model).mosaics(inputs)
    pictures = (
        _in_tiles(inputs["pixel_values"], mosaics) if mosaics else _pictures(wrapper, inputs["pixel_values"], grids)
    )
    for pixels, (rows, columns) in zip(pictures, grids, strict=True):
        unscaled = (pixels.float().cpu() * deviation + mean).clamp(0, 1)
        array = (unscaled.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        images.append(Image.fromarray(array).resize((columns * SIDE, rows * SIDE)))
    return images


def _in_tiles(pixels: Tensor, mosaics: Sequence[Mosaic]) -> list[Tensor]:
    """The normalised pixels of each image's base, and of the part of its tiles whose patches are visual tokens."""
    pictures = []
    for tiles, mosaic in zip(pixels, mosaics, strict=True):
        base, canvas = tiles[0], tiles[1 : mosaic.encoded].unflatten(0, mosaic.tiles)
        # tile row, tile column, colour, pixel row, pixel column
        picture = canvas.permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
        patch = base.shape[-1] // mosaic.side
        rows, columns = (slice(patch * kept.start, patch * kept.stop) for kept in (mosaic.rows, mosaic.columns))
        pictures += [base, picture[:, rows, columns]][: len(mosaic.rectangles)]
    return pictures


def split_by_grid(mask: Tensor, grids: Sequence[tuple[int, int]]) -> list[np.ndarray]:
    """The mask over all tokens of a prompt's images as one array (rows, columns) for each of their grids."""
    parts = mask.cpu().split([rows * columns for rows, columns in grids])
    return [part.numpy().reshape(grid) for part, grid in zip(parts, grids, strict=True)]


def _pictures(wrapper: PrunedModel, pixels: Tensor, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """The normalised pixels (3, height, width) of each image; Qwen stores them patch by patch, token by token."""
    if pixels.ndim == 4:
        return list(pixels)
    vision = wrapper.model.config.vision_config
    side, merge = vision.patch_size, vision.spatial_merge_size
    pictures = []
    for (rows, columns), patches in zip(grids, pixels.split([merge**2 * r * c for r, c in grids]), strict=True):
        # token row, token column, patch row, patch column, colour, frame (all are equal: take the first), pixel row,
        # pixel column
        cells = patches.reshape(rows, columns, merge, merge, -1, vision.temporal_patch_size, side, side)[
            :, :, :, :, :, 0
        ]
        pictures.append(cells.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, rows * merge * side, columns * merge * side))
    return pictures


def dimmed(image: Image.Image, kept: np.ndarray) -> Image.Image:
    """An image in which the dropped visual tokens are almost white; `kept` is a boolean array (rows, columns)."""
    colours = np.asarray(image, dtype=float)
    mask = np.kron(kept.astype(float), np.ones((image.height // kept.shape[0], image.width // kept.shape[1])))[
        ..., None
    ]
    return Image.fromarray((colours * mask + (255 - 0.15 * (255 - colours)) * (1 - mask)).astype(np.uint8))
