"""DivPrune: keep the most diverse tokens (greedy max-min)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method
from lmms_prune.methods.shared.kernels import farthest
from lmms_prune.methods.shared.tensors import BLOCK, directions, settled
from lmms_prune.methods.view import TokenView

# Tokens of the largest image whose similarities are all stored (64 MiB). Larger images are computed in blocks of rows.
_MOST_STORED = 4096


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
        rows, limit = torch.arange(len(unit), device=unit.device), budget.to(unit.device)
        # Stored in the coarser type: on the grid, float32 distinguishes everything that the published code does.
        coarse = torch.promote_types(view.hidden.dtype, torch.float32)
        blocks = (
            settled(unit[:, start : start + BLOCK] @ unit.transpose(1, 2)).to(coarse)
            for start in range(0, unit.shape[1], BLOCK)
        )
        if unit.shape[1] <= _MOST_STORED:
            similarity = torch.cat(list(blocks), dim=1)
            return farthest(similarity, _nearest([similarity], valid), valid, budget)
        # The same search without the stored matrix: the row of each pick is computed anew.
        farness = _nearest(blocks, valid)
        keep = torch.zeros_like(valid)
        nearest_kept = torch.full_like(farness, torch.inf)
        for step in range(int(budget.max()) if len(budget) else 0):
            pick = farness.masked_fill(keep | ~valid, -torch.inf).argmax(dim=1)
            keep = keep.index_put((rows, pick), keep[rows, pick] | (step < limit))
            near = settled(unit @ unit[rows, pick, :, None]).squeeze(-1).to(coarse)
            farness = nearest_kept = torch.minimum(nearest_kept, 1 - near)
        return keep


def _nearest(blocks: Iterable[Float[Tensor, "B n V"]], valid: Bool[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Cosine distance of each token to its nearest neighbour, from blocks of rows of the similarities."""
    nearest: list[Tensor] = []
    columns = torch.arange(valid.shape[1], device=valid.device)
    start = 0
    for near in blocks:
        itself = columns[start : start + near.shape[1], None] == columns
        nearest.append((1 - near).masked_fill(itself | ~valid[:, None], torch.inf).amin(dim=2))
        start += near.shape[1]
    return torch.cat(nearest, dim=1)
