"""Downsample: the control that shows the model a smaller image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method, grid_within
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals, resized
from lmms_prune.models.shape import EncoderShape


@dataclass(frozen=True)
class _SmallGrids:
    """Rows and columns of each image's smaller grid."""

    shapes: list[tuple[int, int]]


class Downsample(Method):
    """Resizes the image itself, so that the vision encoder produces at most N tokens.

    The new size is the largest grid of the image's shape with at most N tokens (bicubic with antialiasing). LLaVA's
    encoder interpolates its position embeddings to the new grid. A token has the position of the middle of the part of
    the original grid that it covers. Before the decoder only. Keeps at most N.

    Paper: https://arxiv.org/abs/2512.07580 (the finding that simple baselines must be in every table).
    Differs from the paper:
        - a control of this project
        - the encoder runs on the full image too, because the prompt is laid out for it; a deployment would resize first
        - Qwen2.5-VL: positions span the original grid, where a model that is given the small image counts them from 0 to
          the small grid's size.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2512.07580"

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(pixels=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        grids = [grid_within(*grid, most) for grid, most in zip(view.grids, budget.tolist(), strict=True)]
        view.carry = _SmallGrids(grids)
        cells = torch.tensor([rows * columns for rows, columns in grids])
        entry = torch.arange(view.valid.shape[1], device=view.valid.device)
        return entry < torch.where(budget > 0, cells, 0).to(entry.device)[:, None]

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V D"], Int[Tensor, "B V"]]:
        grids = view.carried(_SmallGrids).shapes
        index, images = view.index.clone(), view.encoder.images()
        encoded = []
        for image, ((rows, columns), (r, c)) in enumerate(zip(view.grids, grids, strict=True)):
            original = images[view.encoder.owner[image]]
            [tokens] = view.encoder.encode([resized(original, r, c, original.shape[1] // rows)])
            encoded.append(torch.nn.functional.pad(tokens.to(index.device), (0, 0, 0, index.shape[1] - r * c)))
            # The middle of each cell of the small grid, in the original grid.
            row = (2 * torch.arange(r) + 1) * rows // (2 * r)
            column = (2 * torch.arange(c) + 1) * columns // (2 * c)
            index[image, : r * c] = (row[:, None] * columns + column).flatten().to(index.device)
        return torch.stack(encoded), index
