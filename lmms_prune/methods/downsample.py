"""Downsample: the control that shows the model a smaller image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

from lmms_prune.methods.base import Method, grid_within
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals, resized
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device


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
        - Qwen: positions span the original grid, where a model that is given the small image counts them from 0 to
          the small grid's size.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2512.07580"

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(pixels=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        grids = [grid_within(*grid, most) for grid, most in zip(view.grids, budget.tolist(), strict=True)]
        view.carry = _SmallGrids(grids)
        cells = [rows * columns if most else 0 for (rows, columns), most in zip(grids, budget.tolist(), strict=True)]
        entry = torch.arange(view.valid.shape[1], device=view.valid.device)
        return entry < to_device(cells, entry.device)[:, None]

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        grids = view.carried(_SmallGrids).shapes
        device, images, owner = view.valid.device, view.encoder.images(), view.encoder.owner
        small, middles = [], []
        for image, ((rows, columns), (r, c)) in enumerate(zip(view.grids, grids, strict=True)):
            original = images[owner[image]]
            small.append(resized(original, r, c, original.shape[1] // rows))
            middles.append(_middles(rows, columns, r, c))
        encoded = [tokens.to(device) for tokens in view.encoder.encode(small)]
        width = view.valid.shape[1]
        index = to_device(torch.stack([pad(x, (0, width - len(x)), value=-1) for x in middles]), device)
        states = pad_sequence(encoded, batch_first=True)
        return pad(states, (0, 0, 0, width - states.shape[1])), torch.where(index < 0, view.index, index)


def _middles(rows: int, columns: int, r: int, c: int) -> Int[Tensor, " n"]:
    """The middle of each cell of an r × c grid, in the original grid."""
    row = (2 * torch.arange(r) + 1) * rows // (2 * r)
    column = (2 * torch.arange(c) + 1) * columns // (2 * c)
    return (row[:, None] * columns + column).flatten()
