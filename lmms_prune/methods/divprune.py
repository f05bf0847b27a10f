"""DivPrune: keep the most diverse tokens (greedy max-min)."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.kernels import farthest
from lmms_prune.methods.base import Method
from lmms_prune.view import TokenView

# The largest image whose similarities are all kept: 64 MiB. Of larger ones only blocks of so many rows exist at once.
_WHOLE = 4096
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
        unit = torch.nn.functional.normalize(
            view.hidden.to(torch.promote_types(view.hidden.dtype, torch.float32)), dim=-1
        )
        valid, rows = view.valid, torch.arange(len(unit), device=unit.device)
        limit = budget.to(unit.device)
        similarity = unit @ unit.transpose(1, 2) if unit.shape[1] <= _WHOLE else None
        farness = _nearest(unit, valid, similarity)
        if similarity is not None:
            return farthest(similarity, farness, valid, budget)
        keep = torch.zeros_like(valid)
        nearest_kept = torch.full_like(farness, torch.inf)
        for step in range(int(budget.max()) if len(budget) else 0):
            pick = farness.masked_fill(keep | ~valid, -torch.inf).argmax(dim=1)
            keep = keep.index_put((rows, pick), keep[rows, pick] | (step < limit))
            near = (unit @ unit[rows, pick, :, None]).squeeze(-1)
            farness = nearest_kept = torch.minimum(nearest_kept, 1 - near)
        return keep


def _nearest(
    unit: Float[Tensor, "B V D"], valid: Bool[Tensor, "B V"], similarity: Float[Tensor, "B V V"] | None
) -> Float[Tensor, "B V"]:
    """Cosine distance of each token to its nearest neighbour, in blocks where no matrix of all is given."""
    nearest, neighbour = [], []
    columns = torch.arange(unit.shape[1], device=unit.device)
    for start in range(0, unit.shape[1], _BLOCK):
        piece = slice(start, start + _BLOCK)
        near = unit[:, piece] @ unit.transpose(1, 2) if similarity is None else similarity[:, piece]
        itself = columns[piece, None] == columns
        found = (1 - near).masked_fill(itself | ~valid[:, None], torch.inf).min(dim=2)
        nearest.append(found.values)
        neighbour.append(found.indices)
    distance, other = torch.cat(nearest, dim=1), torch.cat(neighbour, dim=1)
    # Two tokens that are each other's nearest are equally far, but their two products may round differently, and
    # differently in another batch; the tie must be exact for the lower index to win it.
    mutual = other.gather(1, other) == columns
    return torch.where(mutual, torch.minimum(distance, distance.gather(1, other)), distance)
