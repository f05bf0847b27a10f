"""VisPruner: keep the tokens that the vision encoder attends to, and of the rest the least duplicated ones."""

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
# Largest number of pairs, all images together, whose cosines are stored (1 GiB); beyond it they are computed anew, in
# pieces, in every pass, which is slow.
_MOST = 2**27


@dataclass(frozen=True)
class VisPruner(Method):
    """Keeps the tokens that the class token attends to most, and a diverse part of the others.

    ⌊N·important⌋ tokens are kept by their attention. The others, listed by falling attention, are reduced to the rest of
    N. Every pass splits the list into its even and its odd entries, and removes the eight even entries (or as many as are
    still to remove) with the highest cosine to any odd entry. The next list is the remaining even entries, most
    duplicated first, then the odd ones. The tokens before the projector are compared.

    Args:
        important: share of N that is kept by attention alone; 1 is FasterVLM.

    Paper: https://arxiv.org/abs/2412.01818 (its second version).
    Differs from the reference:
        - in float64, as rounding in one pass changes all later ones (float32 on Apple GPUs)
        - a list of odd length (in the reference an error, or made even for Qwen2.5-VL) has one even entry more
        - a pass never removes more than the even entries
        - ties go to the earlier entry of the list
        - Qwen2.5-VL: the attention that a token receives in the last block, and the merger's output.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"
    important: float = 0.5

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.selected}), features=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        saliency = view.ranking(view.of_image(view.encoder.saliency()))
        by_attention = [floor(Fraction(str(self.important)) * n) for n in budget.tolist()]
        important = highest(saliency, view.valid, torch.tensor(by_attention))
        listed = [count - n for count, n in zip(view.counts, by_attention, strict=True)]
        diverse = [total - n for total, n in zip(budget.tolist(), by_attention, strict=True)]
        others = view.valid & ~important
        order = saliency.masked_fill(~others, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order[:, : max(listed, default=0)]
        unit = directions(view.of_image(view.encoder.features()))
        order = _reduced(unit, order, _passes(listed, diverse) if any(diverse) else [])
        entry = torch.arange(order.shape[1], device=order.device)
        is_kept = entry < torch.tensor(diverse, device=order.device)[:, None]
        return important | torch.zeros_like(important).scatter(1, order, is_kept)


def _passes(lengths: list[int], goals: list[int]) -> list[list[tuple[int, int]]]:
    """For each pass and image, the length of the list and the number of entries to remove; known on the host."""
    passes = []
    lengths = list(lengths)
    while any(length > goal for length, goal in zip(lengths, goals, strict=True)):
        removed = [min(_REMOVED, length - goal, (length + 1) // 2) for length, goal in zip(lengths, goals, strict=True)]
        passes.append(list(zip(lengths, removed, strict=True)))
        lengths = [length - n for length, n in zip(lengths, removed, strict=True)]
    return passes


def _reduced(
    unit: Float[Tensor, "B V C"], order: Int[Tensor, "B R"], passes: list[list[tuple[int, int]]]
) -> Int[Tensor, "B S"]:
    """The lists after all passes; entries beyond a list's length are arbitrary, and no token is in it twice.

    In an image from which nothing is to be removed any more, a pass only reorders the list.
    """
    if not passes:
        return order
    pairs = settled(unit @ unit.transpose(1, 2)) if len(unit) * unit.shape[1] ** 2 <= _MOST else None
    for step, lengths in zip(torch.tensor(passes, device=order.device), passes, strict=True):
        length, removed = step[:, :1], step[:, 1:]
        order = order[:, : max(now for now, _ in lengths)]
        entry = torch.arange(order.shape[1], device=order.device).expand_as(order)
        cosine = _highest_cosines(unit, pairs, order, length)
        ranked = cosine.masked_fill(entry[:, ::2] >= length, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(ranked).scatter_(1, ranked, entry[:, : ranked.shape[1]])
        # Sort keys: even entries by rank, then odd entries in order; removed entries and padding come last.
        sort_key = order.shape[1] + entry
        sort_key[:, ::2] = torch.where(rank < removed, 3 * order.shape[1], rank)
        sort_key = torch.where(entry < length, sort_key, 3 * order.shape[1])
        order = order.gather(1, sort_key.argsort(dim=1, stable=True))
    return order


def _highest_cosines(
    unit: Float[Tensor, "B V C"], pairs: Tensor | None, order: Int[Tensor, "B R"], length: Int[Tensor, "B 1"]
) -> Float[Tensor, "B A"]:
    """For each even entry of the list, its highest cosine to an odd entry."""
    rows = torch.arange(len(order), device=order.device)[:, None]
    even, odd = order[:, ::2], order[:, 1::2]
    exists = 2 * torch.arange(odd.shape[1], device=order.device) + 1 < length
    if not odd.shape[1]:
        return unit.new_zeros(even.shape)
    blocks = []
    for start in range(0, even.shape[1], BLOCK):
        block = even[:, start : start + BLOCK]
        if pairs is not None:
            cosine = pairs[rows[..., None], block[..., None], odd[:, None]]
        else:
            cosine = settled(unit[rows, block] @ unit[rows, odd].transpose(1, 2))
        blocks.append(cosine.masked_fill(~exists[:, None], -torch.inf).amax(2))
    return torch.cat(blocks, dim=1)
