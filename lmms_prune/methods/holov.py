"""HoloV: every part of the image keeps its share, by attention and inner variety."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape

_CROPS = 16
# Entries of the similarity matrices that exist at once: 256 MiB in float32.
_ENTRIES = 2**26
_TINY = 1e-6


@dataclass(frozen=True)
class HoloV(Method):
    """Shares N out among stretches of the image and keeps of each the tokens attended to most.

    The raster sequence is cut into P crops of equal size (the first ones one longer). A token's score is its attention
    from the encoder's class token, times 1000, plus 0.09 times the variance of its cosines to the tokens of its crop, scaled
    to the attention's mean; a crop's weight is its tokens' mean score, by which N is shared out, rounding down; what is
    left goes, one each, to the largest weights. Inside a crop attention alone decides. At deeper layers crops are still
    those of the original image, of the tokens present.

    Args:
        order: "raster", or "reference": crops in order, the tokens of each by falling attention.
        crops: P; 0 is as published: 16 on LLaVA, on Qwen2.5-VL ⌊16n/9N⌋ and at least one.

    Paper: https://arxiv.org/abs/2510.02912.
    Differs from the reference: what a full crop cannot take goes, one each, to the crops with the next-largest weights,
    round by round (there it becomes zero vectors); raster order by default; any N (there 64); ties go to the lower
    index. As there, the zero of a token's cosine to itself counts in its variance, and a crop of one token has its plain
    attention as weight. Qwen2.5-VL: the attention a token receives in the last block.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2510.02912"
    order: Literal["raster", "reference"] = "raster"
    crops: int = 0

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.selected}))

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        saliency = view.ranking(view.of_image(view.encoder.saliency()))
        attention = saliency.to(torch.promote_types(saliency.dtype, torch.float32))
        crops = _lay_out(view, self._numbers(view, budget))
        weight = _weights(crops, crops.put(attention), crops.put(_unit(view.hidden)))
        share = (weight * budget.to(weight.device)[:, None]).floor().long()
        # A token's turn in its crop, by attention.
        order = crops.put(attention.masked_fill(~view.valid, -torch.inf), -torch.inf)
        rank = _rank(order).flatten(1).gather(1, crops.place.clamp(max=crops.cells - 1))
        view.memory[self._key(view)] = crops.number * crops.width + rank
        own = share.gather(1, crops.number)
        keep = view.valid & (rank < own)
        # The first token that a crop has left comes before the second of any, the largest weight first.
        turn = (rank - own) * crops.count + _rank(weight).gather(1, crops.number)
        return keep | highest(-turn.to(attention.dtype), view.valid & ~keep, budget.to(keep.device) - keep.sum(1))

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V D"], Int[Tensor, "B V"]]:
        if self.order == "raster":
            return view.hidden, view.index
        turn = view.memory[self._key(view)]
        assert isinstance(turn, Tensor)
        order = turn.masked_fill(~keep, torch.iinfo(turn.dtype).max).argsort(dim=1, stable=True)
        order = order.gather(1, (keep.cumsum(1) - 1).clamp(min=0))
        return view.hidden.gather(1, order[..., None].expand_as(view.hidden)), view.index.gather(1, order)

    @staticmethod
    def _key(view: TokenView) -> str:
        return f"holov at layer {view.layer}"

    def _numbers(self, view: TokenView, budget: Int[Tensor, " B"]) -> list[int]:
        """P of each image."""
        if self.crops:
            return [self.crops] * len(view.sizes)
        if view.encoder.shape.class_tokens:
            return [_CROPS] * len(view.sizes)
        return [max(1, 16 * size // (9 * max(1, n))) for size, n in zip(view.sizes, budget.tolist(), strict=True)]


@dataclass(frozen=True)
class _Crops:
    """The crops of a batch side by side: `count` of them, `width` cells each, some of them empty.

    Args:
        number: the crop of each token.
        place: the cell of each token; the one after the last where padding.
    """

    number: Int[Tensor, "B V"]
    place: Int[Tensor, "B V"]
    count: int
    width: int

    @property
    def cells(self) -> int:
        return self.count * self.width

    def put(self, x: Tensor, empty: float = 0.0) -> Tensor:
        """Tokens (B, V, …) in their cells (B, P, g, …)."""
        cells = x.new_full((len(x), self.cells + 1, *x.shape[2:]), empty)
        place = self.place.view(*self.place.shape, *[1] * (x.dim() - 2)).expand_as(x)
        return cells.scatter(1, place, x)[:, :-1].unflatten(1, (self.count, self.width))

    def members(self) -> Bool[Tensor, "B P g"]:
        """Which cells hold a token."""
        return self.put(torch.ones_like(self.place)).bool()


def _lay_out(view: TokenView, numbers: Sequence[int]) -> _Crops:
    device = view.valid.device
    size, number = torch.tensor([list(view.sizes), list(numbers)], device=device)[..., None]
    index = torch.where(view.valid, view.index, 0)
    short, more = size // number, size % number
    # The first `more` crops have one token more; where there are more crops than tokens, no others have any.
    border = more * (short + 1)
    behind = (index - border) // short.clamp(min=1)
    crop = torch.where(index < border, index // (short + 1), more + behind)
    offset = torch.where(index < border, index % (short + 1), (index - border) % short.clamp(min=1))
    count = max((min(p, n) for p, n in zip(numbers, view.sizes, strict=True)), default=1)
    width = max((-(-n // p) for p, n in zip(numbers, view.sizes, strict=True)), default=1)
    return _Crops(crop, torch.where(view.valid, crop * width + offset, count * width), count, width)


def _unit(x: Float[Tensor, "B V D"]) -> Float[Tensor, "B V D"]:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x / (x.norm(dim=-1, keepdim=True) + _TINY)


def _weights(crops: _Crops, attention: Float[Tensor, "B P g"], unit: Float[Tensor, "B P g D"]) -> Float[Tensor, "B P"]:
    """The share of each crop of what is kept, before rounding."""
    is_member = crops.members()
    size = is_member.sum(2)
    many = size.clamp(min=1)
    variance = _variance(unit, is_member).sum(2) / many
    mean = attention.sum(2) / many
    scaled = 1000 * mean
    scaled = scaled + 0.09 * variance * scaled / (variance + _TINY)
    score = torch.where(size > 1, scaled, mean)
    return score / (score.sum(1, keepdim=True) + _TINY)


def _variance(unit: Float[Tensor, "B P g D"], is_member: Bool[Tensor, "B P g"]) -> Float[Tensor, "B P g"]:
    """For each token the variance of its cosines to its crop, its own zero among them."""
    others = (is_member.sum(2, keepdim=True) - 1).clamp(min=1)
    cell = torch.arange(unit.shape[2], device=unit.device)
    rows = max(1, _ENTRIES // max(1, is_member.numel()))
    found = []
    for start in range(0, unit.shape[2], rows):
        piece = cell[start : start + rows]
        cosine = (unit[:, :, piece] @ unit.transpose(2, 3)).masked_fill(piece[:, None] == cell, 0)
        mean = cosine.sum(3, keepdim=True) / others[..., None]
        squares = ((cosine - mean) ** 2).masked_fill(~is_member[:, :, None], 0)
        found.append(squares.sum(3) / others)
    return torch.cat(found, dim=2).masked_fill(~is_member, 0)


def _rank(x: Tensor) -> Int[Tensor, "..."]:
    """The place of each entry when the last dimension is sorted, largest first, ties to the lower index."""
    order = x.argsort(dim=-1, descending=True, stable=True)
    place = torch.arange(x.shape[-1], device=x.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, place)
