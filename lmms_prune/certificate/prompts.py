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

from lmms_prune.models.families import ModelParts


@dataclass(frozen=True)
class Row:
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
BATCHES: dict[str, tuple[Row, ...]] = {
    "1": (Row("a", (9, 0, 12), (_SQUARE,)),),
    "3": (Row("a", (9, 0, 12), (_SQUARE,)), Row("b", (9, 0, 12), (_SQUARE,)), Row("c", (9, 0, 12), (_SQUARE,))),
    "ragged": (Row("a", (9, 0, 12), (_SQUARE,)), Row("two", (4, 3, 17), (_WIDE, _SMALL)), Row("none", (5, 0, 6), ())),
}


def batch(model: Any, rows: Sequence[Row]) -> dict[str, Tensor]:
    """A left-padded batch of prompts as a processor would give it, on the model's device."""
    parts = ModelParts.of(model)
    ids, pixels, sizes = [], [], []
    for row in rows:
        generator = _generator(row.name, "prompt")
        made = [_image(parts, grid, generator) for grid in row.grids]
        pixels += [noise for noise, _, _ in made]
        sizes += [thw for _, _, thw in made if thw is not None]
        ids.append(_text(parts, row, [tokens for _, tokens, _ in made], generator))
    longest = max(map(len, ids))
    text = parts.config.get_text_config()
    padding = text.pad_token_id if isinstance(text.pad_token_id, int) else 0
    stacked = torch.stack([pad(row, (longest - len(row), 0), value=padding) for row in ids])
    present = torch.stack([pad(torch.ones_like(row), (longest - len(row), 0)) for row in ids])
    weight = parts.decoder.norm.weight
    inputs = {"input_ids": stacked, "attention_mask": present}
    if parts.family.mrope:
        inputs["mm_token_type_ids"] = (stacked == parts.config.image_token_id).int()
    if pixels:
        inputs["pixel_values"] = torch.cat(pixels).to(weight.dtype)
    if sizes:
        inputs["image_grid_thw"] = torch.tensor(sizes)
    return {name: tensor.to(weight.device) for name, tensor in inputs.items()}


def answer(model: Any, row: Row, steps: int) -> Int[Tensor, " S"]:
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


def _text(parts: ModelParts, row: Row, images: list[int], generator: torch.Generator) -> Int[Tensor, " L"]:
    """The row's ids: text around the images' tokens, which stand between their markers where the family has such."""
    before, between, after = (_draw(parts, count, generator) for count in row.text)
    marks = [getattr(parts.config, name, None) for name in ("vision_start_token_id", "vision_end_token_id")]
    starts, ends = (torch.tensor([] if mark is None else [mark], dtype=torch.long) for mark in marks)
    pieces = [before]
    for number, tokens in enumerate(images):
        pieces += [between] if number else []
        pieces += [starts, torch.full((tokens,), parts.config.image_token_id), ends]
    return torch.cat([*pieces, after])


def _image(
    parts: ModelParts, grid: tuple[int, int], generator: torch.Generator
) -> tuple[Tensor, int, tuple[int, int, int] | None]:
    """The pixels of one image of noise, its number of visual tokens, and its size where the model must be told."""
    vision, fixed = parts.config.vision_config, parts.family.tokens_per_image(parts.config)
    if fixed:
        return torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator), fixed, None
    merge = vision.spatial_merge_size
    rows, columns = merge * grid[0], merge * grid[1]
    wide = 3 * vision.temporal_patch_size * vision.patch_size**2
    return torch.randn(rows * columns, wide, generator=generator), grid[0] * grid[1], (1, rows, columns)
