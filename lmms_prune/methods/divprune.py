"""DivPrune: keep the most diverse tokens (greedy max-min)."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method
from lmms_prune.view import TokenView

# Rows of the distance matrix that exist at once while the first token is sought.
_BLOCK = 1024


class DivPrune(Method):
    """Keeps the tokens that a greedy max-min search over cosine distances picks.

    Starts with the token whose nearest neighbour is farthest, then adds, one by one, the token that is farthest from
    all kept so far. Works on the layer's input: at layer 0 the projector's (or merger's) output, deeper the hidden states.

    Paper: https://arxiv.org/abs/2503.02175.
    Differs from the reference: distances in float32, where the reference's half precision can return a token twice;
    kept tokens are never candidates again; a zero vector has distance 1 to all; ties go to the lower index.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        unit = view.hidden.to(torch.promote_types(view.hidden.dtype, torch.float32))
        unit = torch.nn.functional.normalize(unit, dim=-1)
        valid, rows = view.valid, torch.arange(len(unit), device=unit.device)
        limit = budget.to(unit.device)
        keep = torch.zeros_like(valid)
        farness = _nearest(unit, valid)
        nearest_kept = torch.full_like(farness, torch.inf)
        for step in range(int(budget.max()) if len(budget) else 0):
            pick = farness.masked_fill(keep | ~valid, -torch.inf).argmax(dim=1)
            keep = keep.index_put((rows, pick), keep[rows, pick] | (step < limit))
            distance = 1 - (unit @ unit[rows, pick, :, None]).squeeze(-1)
            farness = nearest_kept = torch.minimum(nearest_kept, distance)
        return keep


def _nearest(unit: Float[Tensor, "B V D"], valid: Bool[Tensor, "B V"]) -> Float[Tensor, "B V"]:
    """Cosine distance of each token to its nearest neighbour, in blocks: no V×V matrix for large images."""
    nearest, neighbour = [], []
    columns = torch.arange(unit.shape[1], device=unit.device)
    for start in range(0, unit.shape[1], _BLOCK):
        distance = 1 - unit[:, start : start + _BLOCK] @ unit.transpose(1, 2)
        itself = columns[start : start + _BLOCK, None] == columns
        found = distance.masked_fill(itself | ~valid[:, None], torch.inf).min(dim=2)
        nearest.append(found.values)
        neighbour.append(found.indices)
    distance, other = torch.cat(nearest, dim=1), torch.cat(neighbour, dim=1)
    # Two tokens that are each other's nearest are equally far, but their two products may round differently, and
    # differently in another batch; the tie must be exact for the lower index to win it.
    mutual = other.gather(1, other) == columns
    return torch.where(mutual, torch.minimum(distance, distance.gather(1, other)), distance)
