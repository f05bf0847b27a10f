"""DART: keep a few pivots and the tokens least similar to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lmms_prune.methods.base import Method
from lmms_prune.methods.shared.greedy.searches import in_turn
from lmms_prune.methods.shared.tensors import directions, gather, settled
from lmms_prune.methods.view import Tokens, TokenView
from lmms_prune.models.tensors import to_device

_PIVOTS = 4


@dataclass(frozen=True)
class DART(Method):
    """Keeps four visual pivots and, pivot by pivot, the tokens least similar to eight pivots.

    Pivots are the four visual and the four later text tokens whose keys in the layer before have the largest L1
    norm. Each pivot in turn takes its share of the remaining visual tokens with the smallest cosine to it, on the
    layer's input after the decoder's final norm. Needs a layer before it, so it acts at layer 1 or deeper.

    Args:
        native_count: keep the reference's 8⌊N/8⌋+4 tokens for N requested; False keeps N (the first pivots pick one more).
        order: in which the pivots pick. "stable": visual, then text, by falling norm; "reference": as the reference's
            iteration over a Python set of the eight absolute indices, which waits for the device. A pick is gone for the
            later pivots, so the order decides which tokens are kept: "stable" keeps others than the reference.

    Paper: https://arxiv.org/abs/2502.11494.
    Differs from the reference:
        - the default order does not depend on where the prompt begins, and needs no wait; only order=reference keeps the
          reference's tokens
        - norms in float32 and cosines in float64
        - ties go to the lower index, those of equal tokens too
        - counts round half to even before the quotas are formed, where the reference rounds the ratio down (dart@2:0.222
          of 576 tokens keeps 132, in the reference 124; a count, 127t, gives 124)
        - with fewer than four text tokens after the image, their quota is distributed among the other pivots
        - any batch size.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2502.11494"
    native_count: bool = True
    order: Literal["stable", "reference"] = "stable"

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        visual, visual_exists = self._pivots(view, view.visual)
        text, text_exists = self._pivots(view, view.text)
        # A budget below four keeps only the first pivots; all of them still serve as references.
        rank, count = torch.arange(visual.shape[1], device=visual.device), to_device(budget, visual.device)
        is_kept = visual_exists & (rank < count[:, None])
        keep = _mark(torch.zeros_like(view.valid), visual, is_kept)
        picks = count - is_kept.sum(1)

        # Pivots are chosen by their keys, but compared by the final norm of the layer's input.
        features = directions(view.normed(view.visual))
        pivots = torch.cat([gather(features, visual), gather(directions(view.normed(view.text)), text)], dim=1)
        exists = torch.cat([visual_exists, text_exists], dim=1)
        if self.order == "reference":
            slots = torch.cat([gather(view.visual.slots, visual), gather(view.text.slots, text)], dim=1)
            order = _set_order(slots - view.first_column[:, None], exists)
            pivots, exists = gather(pivots, order), exists.gather(1, order)
        similarity = settled(pivots @ features.transpose(1, 2))
        view.ranking(similarity.sum(1))

        free = _mark(view.valid, visual, visual_exists, value=False)
        # Equal quotas for the existing pivots; the first `extra` of them pick one more.
        pivot_rank = exists.cumsum(1) - 1
        pivot_count = exists.sum(1).clamp(min=1)
        share, extra = picks // pivot_count, picks % pivot_count
        quota = torch.where(exists, share[:, None] + (pivot_rank < extra[:, None]), 0)
        order = similarity.argsort(dim=2, stable=True)
        return keep | in_turn(order, free, quota)

    @staticmethod
    def _pivots(view: TokenView, tokens: Tokens) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """The (at most four) tokens with the largest key norm, by falling norm, and whether each exists."""
        keys = view.keys(tokens)
        norm = (
            keys.to(torch.promote_types(keys.dtype, torch.float32)).abs().sum(-1).masked_fill(~tokens.valid, -torch.inf)
        )
        order = norm.argsort(dim=1, descending=True, stable=True)[:, :_PIVOTS]
        return order, tokens.valid.gather(1, order)


def _mark(
    mask: Bool[Tensor, "B V"], index: Int[Tensor, "B P"], where: Bool[Tensor, "B P"], value: bool = True
) -> Bool[Tensor, "B V"]:
    """`mask` with `value` at those of the (distinct) `index` entries that `where` allows."""
    current = mask.gather(1, index)
    return mask.scatter(1, index, current | where if value else current & ~where)


def _set_order(columns: Int[Tensor, "B P"], exists: Bool[Tensor, "B P"]) -> Int[Tensor, "B P"]:
    """The order in which CPython iterates a set of the existing columns inserted in the given order."""
    orders = []
    # One copy, for which the host waits: -1 where there is no token.
    for row in torch.where(exists, columns, -1).tolist():
        pivots = {column: number for number, column in enumerate(row) if column >= 0}
        # From a list: a set made from a dict takes over its table size, which changes the order.
        order = [pivots[column] for column in set(list(pivots))]
        orders.append(order + [number for number in range(len(row)) if number not in order])
    return to_device(orders, columns.device)
