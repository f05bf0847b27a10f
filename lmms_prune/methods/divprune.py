"""DivPrune: keep the most diverse tokens (greedy max-min)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method
from lmms_prune.methods.shared.greedy.products import MOST_STORED, products
from lmms_prune.methods.shared.greedy.searches import greedy
from lmms_prune.methods.shared.tensors import BLOCK, directions, joined, settled
from lmms_prune.methods.view import TokenView
from lmms_prune.models.tensors import to_device


class DivPrune(Method):
    """Keeps the tokens that a greedy max-min search over cosine distances picks.

    Starts with the token whose nearest neighbour is farthest, then adds, one by one, the token that is farthest from
    all kept so far. Works on the layer's input: at layer 0 the projector's (or merger's) output, deeper the hidden states.

    Paper: https://arxiv.org/abs/2503.02175.
    Differs from the reference:
        - distances in float64, where the reference's half precision can return a token twice
        - kept tokens are never candidates again
        - a zero vector has distance 1 to all
        - ties go to the lower index, those of equal tokens too.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        unit, valid = directions(view.hidden), view.valid
        # Compared in the coarser type: on the grid, float32 distinguishes everything that the published code does.
        coarse = torch.promote_types(view.hidden.dtype, torch.float32)
        if unit.shape[1] <= MOST_STORED:
            similarity = products(unit, coarse)
            first = _nearest([similarity], valid)
        else:
            similarity = None
            first = _nearest(
                (
                    settled(unit[:, start : start + BLOCK] @ unit.transpose(1, 2)).to(coarse)
                    for start in range(0, unit.shape[1], BLOCK)
                ),
                valid,
            )
        limit, most = to_device(budget, unit.device), max(budget.tolist(), default=0)
        return greedy("farthest", unit, first, valid, limit, most, similarity)


def _nearest(blocks: Iterable[Float[Tensor, "B n V"]], valid: Bool[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Cosine distance of each token to its nearest neighbour, from blocks of rows of the similarities."""
    nearest: list[Tensor] = []
    columns = torch.arange(valid.shape[1], device=valid.device)
    start = 0
    for near in blocks:
        itself = columns[start : start + near.shape[1], None] == columns
        nearest.append((1 - near).masked_fill(itself | ~valid[:, None], torch.inf).amin(dim=2))
        start += near.shape[1]
    return joined(nearest)
