"""Prompts of random text and noise for any checkpoint of the families: no tokenizer and no image is needed."""

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
        name: decides its noise, and the random draws of methods.
        text: text tokens before the first image, between images, and after the last one.
        grids: rows and columns of visual tokens of each image, where a model takes any; others have their own.
    """

    name: str
    text: tuple[int, int, int]
    grids: tuple[tuple[int, int], ...]


_SQUARE, _WIDE, _SMALL = (6, 6), (4, 7), (3, 3)
# Rows of one shape, and rows of which no two are: several images, no image, other lengths.
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
    """A left-padded batch of prompts as a processor would give it, on the model's device."""
    parts = ModelParts.of(model)
    ids, images = [], []
    for row in rows:
        generator = _generator(row.name, "prompt")
        grids = [parts.family.only_grid(parts.config) or grid for grid in row.grids]
        own = [_image(parts, grid, generator) for grid in grids]
        tokens = [parts.tokens_per_image or sum(parts.family.image_sizes(parts.config, image)) for image in own]
        ids.append(_text(parts, row, tokens, generator))
        images += own
    longest = max(map(len, ids))
    text = parts.config.get_text_config()
    padding = text.pad_token_id if isinstance(text.pad_token_id, int) else 0
    stacked = torch.stack([pad(row, (longest - len(row), 0), value=padding) for row in ids])
    present = torch.stack([pad(torch.ones_like(row), (longest - len(row), 0)) for row in ids])
    weight = parts.decoder.norm.weight
    inputs = {"input_ids": stacked, "attention_mask": present}
    inputs |= parts.family.extra_inputs(parts.config, stacked)
    if images:
        inputs |= {name: torch.cat([image[name] for image in images]) for name in images[0]}
        inputs["pixel_values"] = inputs["pixel_values"].to(weight.dtype)
    return {name: tensor.to(weight.device) for name, tensor in inputs.items()}


def answer(model: Any, row: PromptRow, steps: int) -> Int[Tensor, " S"]:
    """Text tokens that the row is made to answer, whatever the model would: then all runs can be compared."""
    return _draw(ModelParts.of(model), steps, _generator(row.name, "answer"))


def _generator(*what: str) -> torch.Generator:
    digest = hashlib.blake2b("|".join(what).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


def _draw(parts: ModelParts, count: int, generator: torch.Generator) -> Int[Tensor, " N"]:
    # Ids of specials lie at either end of a vocabulary.
    vocabulary = parts.config.get_text_config().vocab_size
    drawn = torch.randint(vocabulary // 8, vocabulary // 2, (count,), generator=generator)
    drawn[drawn == parts.config.image_token_id] += 1
    return drawn


def _text(parts: ModelParts, row: PromptRow, images: list[int], generator: torch.Generator) -> Int[Tensor, " L"]:
    """The row's ids: text around the images' tokens, which stand between their markers where the family has such."""
    before, between, after = (_draw(parts, count, generator) for count in row.text)
    starts, ends = (torch.tensor(ids, dtype=torch.long) for ids in parts.family.markers(parts.config))
    pieces = [before]
    for number, tokens in enumerate(images):
        pieces += [between] if number else []
        pieces += [starts, torch.full((tokens,), parts.config.image_token_id), ends]
    return torch.cat([*pieces, after])


def _image(parts: ModelParts, grid: Grid, generator: torch.Generator) -> dict[str, Tensor]:
    """The inputs of one image of noise."""
    return parts.family.image_inputs(parts.config, grid, lambda shape: torch.randn(shape, generator=generator))
