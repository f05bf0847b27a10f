"""VisPruner: what the vision encoder attends to, and of the rest what is least duplicated."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.shared.tensors import BLOCK, directions, settled
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape

_REMOVED = 8
# Up to so many pairs, all images together, are compared once (1 GiB); more, in pieces and at every pass, which is slow.
_MOST = 2**27


@dataclass(frozen=True)
class VisPruner(Method):
    """Keeps the tokens that the class token attends to most, and a diverse part of the others.

    ⌊N·important⌋ tokens are kept by their attention. The others, by falling attention, are thinned out to what is left
    of N: in every pass the list is dealt out in turn to two hands, and of the first hand the eight (or as many as are
    left to remove) with the highest cosine to anything in the second go; the next list is what the first hand still
    holds, most duplicated first, then the second hand. Compared are the tokens before the projector.

    Args:
        important: share of N that is kept by attention alone; 1 is FasterVLM.

    Paper: https://arxiv.org/abs/2412.01818 (its second version).
    Differs from the reference: in float64, as rounding in one pass changes all later ones (float32 on Apple GPUs); an
    odd list (there an error, or made even for Qwen2.5-VL) gives the first hand one more; no more go than the first hand
    holds; ties go to the earlier in the list. Qwen2.5-VL: the attention a token receives in the last block, and the
    merger's output.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"
    important: float = 0.5

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.selected}), features=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        saliency = view.ranking(view.of_image(view.encoder.saliency()))
        best = [floor(Fraction(str(self.important)) * n) for n in budget.tolist()]
        important = highest(saliency, view.valid, torch.tensor(best))
        left = [count - n for count, n in zip(view.counts, best, strict=True)]
        diverse = [asked - n for asked, n in zip(budget.tolist(), best, strict=True)]
        others = view.valid & ~important
        order = saliency.masked_fill(~others, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order[:, : max(left, default=0)]
        unit = directions(view.of_image(view.encoder.features()))
        order = _thinned(unit, order, _passes(left, diverse) if any(diverse) else [])
        place = torch.arange(order.shape[1], device=order.device)
        stays = place < torch.tensor(diverse, device=order.device)[:, None]
        return important | torch.zeros_like(important).scatter(1, order, stays)


def _passes(left: list[int], wanted: list[int]) -> list[list[tuple[int, int]]]:
    """For each pass, and each image, the length of the list and how many go; known before anything is compared."""
    passes = []
    left = list(left)
    while any(now > goal for now, goal in zip(left, wanted, strict=True)):
        gone = [min(_REMOVED, now - goal, (now + 1) // 2) for now, goal in zip(left, wanted, strict=True)]
        passes.append(list(zip(left, gone, strict=True)))
        left = [now - n for now, n in zip(left, gone, strict=True)]
    return passes


def _thinned(
    unit: Float[Tensor, "B V C"], order: Int[Tensor, "B R"], passes: list[list[tuple[int, int]]]
) -> Int[Tensor, "B S"]:
    """The lists after all passes; entries beyond a list's length are arbitrary, and no token stands in it twice.

    Where nothing is left to remove, a pass only reorders the list.
    """
    if not passes:
        return order
    pairs = settled(unit @ unit.transpose(1, 2)) if len(unit) * unit.shape[1] ** 2 <= _MOST else None
    for step, lengths in zip(torch.tensor(passes, device=order.device), passes, strict=True):
        length, gone = step[:, :1], step[:, 1:]
        order = order[:, : max(now for now, _ in lengths)]
        place = torch.arange(order.shape[1], device=order.device).expand_as(order)
        alike = _most_alike(unit, pairs, order, length)
        first = alike.masked_fill(place[:, ::2] >= length, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(first).scatter_(1, first, place[:, : first.shape[1]])
        turn = order.shape[1] + place
        turn[:, ::2] = torch.where(rank < gone, 3 * order.shape[1], rank)
        turn = torch.where(place < length, turn, 3 * order.shape[1])
        order = order.gather(1, turn.argsort(dim=1, stable=True))
    return order


def _most_alike(
    unit: Float[Tensor, "B V C"], pairs: Tensor | None, order: Int[Tensor, "B R"], length: Int[Tensor, "B 1"]
) -> Float[Tensor, "B A"]:
    """For each token at an even place of the list, its highest cosine to one at an odd place."""
    rows = torch.arange(len(order), device=order.device)[:, None]
    even, odd = order[:, ::2], order[:, 1::2]
    exists = 2 * torch.arange(odd.shape[1], device=order.device) + 1 < length
    if not odd.shape[1]:
        return unit.new_zeros(even.shape)
    found = []
    for start in range(0, even.shape[1], BLOCK):
        some = even[:, start : start + BLOCK]
        if pairs is not None:
            cosine = pairs[rows[..., None], some[..., None], odd[:, None]]
        else:
            cosine = settled(unit[rows, some] @ unit[rows, odd].transpose(1, 2))
        found.append(cosine.masked_fill(~exists[:, None], -torch.inf).amax(2))
    return torch.cat(found, dim=1)
