"""HoloV: every part of the image keeps a share of the tokens, by its attention and the variety within it.

Worked example: N = 3 of six tokens v0 to v5 in crops=2 crops.

    crop 0   attention v0 .25  v1 .12  v2 .08    the three tokens are equal
    crop 1   attention v3 .20  v4 .07  v5 .05    the three tokens are orthogonal

Variety. A token's cosines within its crop are, with the zero of its cosine to itself, (0, 1, 1) in crop 0: their sum over
the 2 others is the mean 1, and the variance is ((0-1)² + 0 + 0)/2 = 0.5. In crop 1 all cosines are 0, and so is the
variance.

Weights. Mean score of crop 0: 150 + 0.09·150 = 163.5 (the variances, scaled to the mean of the attention times 1000,
have the same mean). Of crop 1: 106.7. So the weights are 0.605 and 0.395, and the shares of 3 tokens 1.815 and 1.185:
rounded down, one each. The token left over goes to the larger weight, crop 0.
Inside a crop attention decides: v0 and v1 of crop 0, v3 of crop 1. Kept: v0 v1 v3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.shared.tensors import gather
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device

_CROPS = 16
# Entries of the similarity matrices that exist at once: 256 MiB in float32.
_ENTRIES = 2**26
_TINY = 1e-6


@dataclass(frozen=True)
class _Order:
    """The tokens' sort keys in the reference's order: crops in order, the tokens of each by falling attention."""

    sort_key: Int[Tensor, "B V"]


@dataclass(frozen=True)
class HoloV(Method):
    """Distributes N among crops of the raster sequence and keeps the most attended tokens of each crop.

    The raster sequence is split into P crops of equal size (the first ones one longer). A token's score is its attention
    from the encoder's class token, times 1000, plus 0.09 times the variance of its cosines to the tokens of its crop,
    scaled to the attention's mean. A crop's weight is its tokens' mean score, by which N is distributed, rounding down;
    the remaining tokens go, one each, to the crops with the largest weights. Inside a crop attention alone decides. At
    deeper layers the crops are still those of the original image, restricted to the tokens present.

    Args:
        order: order of the kept tokens: "raster", or "reference": crops in order, the tokens of each by falling attention.
        crops: P; 0 is as published: 16 on LLaVA, on Qwen ⌊16n/9N⌋ and at least one.

    Paper: https://arxiv.org/abs/2510.02912.
    Differs from the reference:
        - tokens beyond a full crop go, one each, to the crops with the next-largest weights, round by round (in the
          reference they become zero vectors)
        - raster order by default
        - any N (in the reference 64)
        - ties go to the lower index
        - Qwen: the attention that a token receives in the last block.
        As in the reference, the zero of a token's cosine to itself counts in its variance, and a crop of one token has
        its plain attention as weight.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2510.02912"
    order: Literal["raster", "reference"] = "raster"
    crops: int = 0

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.selected}))

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        saliency = view.ranking(view.of_image(view.encoder.saliency()))
        attention = saliency.to(torch.promote_types(saliency.dtype, torch.float32))
        crops = _lay_out(view, self._crop_counts(view, budget))
        weight = _weights(crops, crops.put(attention), crops.put(_unit(view.hidden)))
        count = to_device(budget, weight.device)
        share = (weight * count[:, None]).floor().long()
        # A token's rank within its crop, by attention; empty cells come last.
        in_cells = crops.put(attention.masked_fill(~view.valid, -torch.inf), -torch.inf)
        rank = _rank(in_cells).flatten(1).gather(1, crops.cell.clamp(max=crops.cells - 1))
        view.carry = _Order(crops.number * crops.width + rank)
        crop_share = share.gather(1, crops.number)
        keep = view.valid & (rank < crop_share)
        # The rounded-off tokens, round by round: the best dropped token of every crop comes before the second best of
        # any, and within a round the crop with the largest weight comes first.
        priority = (rank - crop_share) * crops.count + _rank(weight).gather(1, crops.number)
        # Of booleans: valid and not kept yet.
        return keep | highest(-priority.to(attention.dtype), view.valid > keep, count - keep.sum(1))

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        if self.order == "raster":
            return view.hidden, view.index
        sort_key = view.carried(_Order).sort_key
        order = sort_key.masked_fill(~keep, torch.iinfo(sort_key.dtype).max).argsort(dim=1, stable=True)
        # The r-th token of this order goes to the r-th kept entry.
        order = order.gather(1, (keep.cumsum(1) - 1).clamp(min=0))
        return gather(view.with_additions(view.hidden), order), view.index.gather(1, order)

    def _crop_counts(self, view: TokenView, budget: Int[Tensor, " B"]) -> list[int]:
        """P, the number of crops, of each image."""
        if self.crops:
            return [self.crops] * len(view.sizes)
        if view.encoder.shape.class_tokens:
            return [_CROPS] * len(view.sizes)
        return [max(1, 16 * size // (9 * max(1, n))) for size, n in zip(view.sizes, budget.tolist(), strict=True)]


@dataclass(frozen=True)
class _Crops:
    """The crops of every image as a row of cells: `count` crops of `width` cells, some of them empty.

    Args:
        number: the crop of each token.
        cell: the cell of each token; the one after the last where padding.
        count: crops of the image that has most.
        width: tokens of the largest crop.
    """

    number: Int[Tensor, "B V"]
    cell: Int[Tensor, "B V"]
    count: int
    width: int

    @property
    def cells(self) -> int:
        return self.count * self.width

    def put(self, x: Tensor, empty: float = 0.0) -> Tensor:
        """Values of the tokens (B, V, …) in their cells (B, P, g, …), with `empty` in empty cells."""
        # Padding writes to a spare last cell.
        cells = x.new_full((len(x), self.cells + 1, *x.shape[2:]), empty)
        cell = self.cell.view(*self.cell.shape, *[1] * (x.dim() - 2)).expand_as(x)
        return cells.scatter(1, cell, x)[:, :-1].unflatten(1, (self.count, self.width))

    def members(self) -> Bool[Tensor, "B P g"]:
        """Which cells hold a token."""
        return self.put(torch.ones_like(self.cell)).bool()


def _lay_out(view: TokenView, crop_counts: Sequence[int]) -> _Crops:
    """Assign each token to its crop, by its raster index in the original image."""
    device = view.valid.device
    size, crop_count = to_device([list(view.sizes), list(crop_counts)], device)[..., None]
    index = torch.where(view.valid, view.index, 0)
    short, longer = size // crop_count, size % crop_count
    # The first `longer` crops have one token more; with more crops than tokens, all other crops are empty.
    border = longer * (short + 1)
    behind = (index - border) // short.clamp(min=1)
    crop = torch.where(index < border, index // (short + 1), longer + behind)
    offset = torch.where(index < border, index % (short + 1), (index - border) % short.clamp(min=1))
    # From sizes that the host knows, so that no shape has to be read back from the device.
    count = max((min(p, n) for p, n in zip(crop_counts, view.sizes, strict=True)), default=1)
    width = max((-(-n // p) for p, n in zip(crop_counts, view.sizes, strict=True)), default=1)
    return _Crops(crop, torch.where(view.valid, crop * width + offset, count * width), count, width)


def _unit(x: Float[Tensor, "B V D"]) -> Float[Tensor, "B V D"]:
    """Directions of the tokens, with the reference's 1e-6 in the norm."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / (x.norm(dim=-1, keepdim=True) + _TINY)


def _weights(crops: _Crops, attention: Float[Tensor, "B P g"], unit: Float[Tensor, "B P g D"]) -> Float[Tensor, "B P"]:
    """The fraction of the kept tokens that each crop gets, before rounding."""
    is_member = crops.members()
    size = is_member.sum(2)
    divisor = size.clamp(min=1)
    variance = _variance(unit, is_member).sum(2) / divisor
    mean = attention.sum(2) / divisor
    # A crop's mean of (attention + 0.09 · scaled variance): the variances are scaled so that their mean is the mean of
    # the attention, so only the means are needed.
    scaled = 1000 * mean
    scaled = scaled + 0.09 * variance * scaled / (variance + _TINY)
    # As in the reference, a crop of one token is not scaled by 1000.
    score = torch.where(size > 1, scaled, mean)
    return score / (score.sum(1, keepdim=True) + _TINY)


def _variance(unit: Float[Tensor, "B P g D"], is_member: Bool[Tensor, "B P g"]) -> Float[Tensor, "B P g"]:
    """For each token the variance of its cosines to its crop, with a zero for the cosine to itself."""
    others = (is_member.sum(2, keepdim=True) - 1).clamp(min=1)
    cell = torch.arange(unit.shape[2], device=unit.device)
    # In pieces of a crop's rows: with few crops the matrices of all pairs are large.
    rows = max(1, _ENTRIES // max(1, is_member.numel()))
    variances = []
    for start in range(0, unit.shape[2], rows):
        piece = cell[start : start + rows]
        cosine = (unit[:, :, piece] @ unit.transpose(2, 3)).masked_fill(piece[:, None] == cell, 0)
        mean = cosine.sum(3, keepdim=True) / others[..., None]
        squares = ((cosine - mean) ** 2).masked_fill(~is_member[:, :, None], 0)
        variances.append(squares.sum(3) / others)
    return torch.cat(variances, dim=2).masked_fill(~is_member, 0)


def _rank(x: Tensor) -> Int[Tensor, "..."]:
    """The rank of each entry in the last dimension, largest first, ties to the lower index."""
    order = x.argsort(dim=-1, descending=True, stable=True)
    rank = torch.arange(x.shape[-1], device=x.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, rank)
