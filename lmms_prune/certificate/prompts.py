"""Prompts of random text and noise images for any supported checkpoint. They need no tokenizer and no image files."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn.functional import pad

from lmms_prune.models.family import Grid
from lmms_prune.models.parts import ModelParts


@dataclass(frozen=True)
class PromptRow:
    """One prompt.

    Args:
        name: seeds the prompt's text and noise, and the random draws of methods.
        text: number of text tokens before the first image, between images, and after the last image.
        grids: rows and columns of visual tokens of each image; models with a fixed grid use their own instead.
    """

    name: str
    text: tuple[int, int, int]
    grids: tuple[tuple[int, int], ...]


_SQUARE, _WIDE, _SMALL = (6, 6), (4, 7), (3, 3)
# "1" and "3" have rows of one shape. In "ragged" all rows differ: several images, no image, other lengths.
BATCHES: dict[str, tuple[PromptRow, ...]] = {
    "1": (PromptRow("a", (9, 0, 12), (_SQUARE,)),),
    "3": (
        PromptRow("a", (9, 0, 12), (_SQUARE,)),
        PromptRow("b", (9, 0, 12), (_SQUARE,)),
        PromptRow("c", (9, 0, 12), (_SQUARE,)),
    ),
    "ragged": (
        PromptRow("a", (9, 0, 12), (_SQUARE,)),
        PromptRow("two", (4, 3, 17), (_WIDE, _SMALL)),
        PromptRow("none", (5, 0, 6), ()),
    ),
}


def batch(model: Any, rows: Sequence[PromptRow]) -> dict[str, Tensor]:
    """Return a left-padded batch of prompts on the model's device, with the inputs that a processor would return."""
    parts = ModelParts.of(model)
    row_ids, images = [], []
    for row in rows:
        generator = _generator(row.name, "prompt")
        grids = [parts.family.only_grid(parts.config) or grid for grid in row.grids]
        row_images = [_image(parts, grid, generator) for grid in grids]
        tokens = [parts.tokens_per_image or sum(parts.family.image_sizes(parts.config, image)) for image in row_images]
        row_ids.append(_text(parts, row, tokens, generator))
        images += row_images
    longest = max(map(len, row_ids))
    text = parts.config.get_text_config()
    padding = text.pad_token_id if isinstance(text.pad_token_id, int) else 0
    input_ids = torch.stack([pad(ids, (longest - len(ids), 0), value=padding) for ids in row_ids])
    attention_mask = torch.stack([pad(torch.ones_like(ids), (longest - len(ids), 0)) for ids in row_ids])
    weight = parts.decoder.norm.weight
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    inputs |= parts.family.extra_inputs(parts.config, input_ids)
    inputs |= parts.family.joined(images, weight.dtype)
    return {name: tensor.to(weight.device) for name, tensor in inputs.items()}


def answer(model: Any, row: PromptRow, steps: int) -> Int[Tensor, " S"]:
    """Return the text tokens that a row is forced to generate, so that all runs can be compared token by token."""
    return _draw(ModelParts.of(model), steps, _generator(row.name, "answer"))


def _generator(*seeds: str) -> torch.Generator:
    digest = hashlib.blake2b("|".join(seeds).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _draw(parts: ModelParts, count: int, generator: torch.Generator) -> Int[Tensor, " N"]:
    # Special tokens have ids at either end of a vocabulary, so draw from its middle.
    vocabulary = parts.config.get_text_config().vocab_size
    drawn = torch.randint(vocabulary // 8, vocabulary // 2, (count,), generator=generator)
    drawn[drawn == parts.config.image_token_id] += 1
    return drawn


def _text(parts: ModelParts, row: PromptRow, images: list[int], generator: torch.Generator) -> Int[Tensor, " L"]:
    """Return the row's ids: text around the image tokens, with the family's start and end markers if it has any."""
    before, between, after = (_draw(parts, count, generator) for count in row.text)
    starts, ends = (torch.tensor(ids, dtype=torch.long) for ids in parts.family.markers(parts.config))
    pieces = [before]
    for number, tokens in enumerate(images):
        pieces += [between] if number else []
        pieces += [starts, torch.full((tokens,), parts.config.image_token_id), ends]
    return torch.cat([*pieces, after])


def _image(parts: ModelParts, grid: Grid, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the model inputs for one noise image."""
    return parts.family.image_inputs(parts.config, grid, lambda shape: torch.randn(shape, generator=generator))
