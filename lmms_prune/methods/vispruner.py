"""VisPruner: keep the tokens that the vision encoder attends to, and of the rest the least duplicated ones."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import floor
from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.shared.greedy.searches import thinned
from lmms_prune.methods.shared.tensors import directions, gather
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape

_REMOVED = 8


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
        - Qwen: the attention that a token receives in the last block, and the merger's output.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"
    important: float = 0.5

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.selected}), features=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        saliency = view.ranking(view.of_image(view.encoder.saliency()))
        totals = budget.tolist()
        by_attention = [floor(Fraction(str(self.important)) * n) for n in totals]
        important = highest(saliency, view.valid, torch.tensor(by_attention))
        listed = [count - n for count, n in zip(view.counts, by_attention, strict=True)]
        diverse = [total - n for total, n in zip(totals, by_attention, strict=True)]
        others = view.valid & ~important
        order = saliency.masked_fill(~others, -torch.inf).argsort(dim=1, descending=True, stable=True)
        order = order[:, : max(listed, default=0)]
        if any(diverse):
            unit = gather(directions(view.of_image(view.encoder.features())), order)
            is_kept = thinned(unit, listed, diverse, _REMOVED)
        else:
            is_kept = torch.zeros_like(order, dtype=torch.bool)
        return important | torch.zeros_like(important).scatter(1, order, is_kept)
