"""Greedy searches in plain torch: the references of the kernels, used on CPUs and where no kernel can be built.

Dimension letters: B images, V visual tokens, D features, P pivots.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmms_prune.methods.shared.greedy import products as store
from lmms_prune.methods.shared.greedy.plain_merging import plain_merge, plain_nearest, plain_pairs
from lmms_prune.methods.shared.greedy.plain_passes import plain_thinned
from lmms_prune.methods.shared.tensors import BLOCK, gather, settled

MOST_BYTES = 2**30
"""How many bytes the products of all pairs may take at once, of the images that are searched together."""

# A token's marginal gain is at least this share of its own entry; anything smaller is rounding.
LEAST = 1e-6
COVERED = 2**26
"""The coverage of padding: more than any cosine gives."""


def multiplies_all(tokens: int, most: int) -> bool:
    """On a CPU one product of matrices is faster than many by a vector, unless these are few."""
    return tokens <= store.MOST_STORED and 8 * most > tokens


def _plain_greedy(
    rule: str, vectors: Tensor, first: Tensor, valid: Tensor, limit: Tensor, most: int, stored: Tensor | None
) -> Tensor:
    if not most:
        return torch.zeros_like(valid)
    if rule == "determinant":
        return _marked(_plain_determinant(vectors, first, valid, most), valid, limit)
    if stored is None and (
        multiplies_all(valid.shape[1], most) or (first.is_cuda and valid.shape[1] <= store.MOST_STORED)
    ):
        stored = store.products(vectors, first.dtype)
    picks, largest = [], first.new_full((), 1)
    # `score` is -inf for tokens that are picked or no candidates, and stays so whatever is subtracted from it.
    never = first.new_full((), -torch.inf)
    score = torch.where(valid, first, never)
    later = torch.where(valid, first.new_full((), torch.inf if rule == "farthest" else 0), never)
    for _ in range(most):
        pick = score.argmax(dim=1, keepdim=True)
        picks.append(pick)
        near = _near(vectors, stored, pick).to(first.dtype)
        later = torch.minimum(later, largest - near) if rule == "farthest" else later - near
        score = later = later.scatter_(1, pick, -torch.inf)
    return _marked(torch.cat(picks, dim=1), valid, limit)


def _near(vectors: Tensor, stored: Tensor | None, pick: Tensor) -> Tensor:
    """The cosines of each image's pick to all its tokens."""
    if stored is not None:
        return stored.gather(1, pick[..., None].expand(-1, -1, stored.shape[2])).squeeze(1)
    chosen = vectors.gather(1, pick[..., None].expand(-1, -1, vectors.shape[2]))
    return settled(vectors @ chosen.transpose(1, 2)).squeeze(-1)


def _plain_determinant(vectors: Tensor, gain: Tensor, valid: Tensor, most: int) -> Tensor:
    rows, picks = torch.arange(len(vectors), device=vectors.device), []
    least, count = LEAST * gain, torch.zeros_like(valid[:, 0], dtype=torch.long)
    never = gain.new_full((), -torch.inf)
    blocked = torch.where(valid, gain.new_zeros(()), never)
    # The component of each picked token that is orthogonal to the earlier picks, at length 1; the rows of the published
    # code are products with these.
    basis = vectors.new_zeros(len(vectors), most, vectors.shape[-1])
    for step in range(most):
        # Compared in float32: gains that are equal in exact arithmetic differ in float64's last digits.
        pick = (gain + blocked).float().argmax(dim=1)
        picks.append(pick)
        chosen, known = vectors[rows, pick, :, None], basis[:, :step]
        # Gram-Schmidt: what the new pick adds to the space of the earlier ones is taken off the gain of all tokens.
        rest = chosen - known.transpose(1, 2) @ (known @ chosen)
        own = gain[rows, pick]
        direction = rest / own[:, None, None].clamp(min=torch.finfo(gain.dtype).tiny).sqrt()
        # A pick with the least gain lies in that space: it changes no other gain. Others are as many as there are features.
        is_new = (own > least[rows, pick]) & (count < vectors.shape[-1])
        direction, count = torch.where(is_new[:, None, None], direction, 0), count + is_new
        basis[:, step] = direction.squeeze(-1)
        gain = torch.maximum(gain - (vectors @ direction).squeeze(-1).square(), least)
        blocked.scatter_(1, pick[:, None], -torch.inf)
    return torch.stack(picks, dim=1)


def _marked(picks: Int[Tensor, "B S"], valid: Tensor, limit: Tensor) -> Tensor:
    """A mask of each image's first `limit` picks."""
    tokens = valid.shape[1]
    # Picks beyond the limit mark a spare last column.
    is_kept = torch.arange(picks.shape[1], device=picks.device) < limit[:, None]
    marks = valid.new_zeros(len(valid), tokens + 1)
    return marks.scatter_(1, torch.where(is_kept, picks, tokens), True)[:, :-1]


def _plain_in_turn(order: Tensor, free: Tensor, quota: Tensor) -> Tensor:
    remains = free
    for p in range(order.shape[1]):
        in_order = remains.gather(1, order[:, p])
        takes = in_order & (in_order.cumsum(1) <= quota[:, p, None])
        remains = remains.scatter(1, order[:, p], in_order ^ takes)
    return free ^ remains


def _plain_covering(
    unit: Tensor, stored: Tensor | None, weight: Tensor, valid: Tensor, limit: Tensor, most: int
) -> Tensor:
    keep, free = torch.zeros_like(valid), valid
    covered = torch.where(valid, 0, COVERED).to(torch.int32)
    gain = gains(unit, stored, covered)
    for step in range(most):
        score = (gain * weight).masked_fill(~free, -torch.inf)
        pick = score.argmax(dim=1, keepdim=True)
        picked = torch.zeros_like(valid).scatter(1, pick, True) & (step < limit)[:, None]
        keep, free = keep | picked, free & ~picked
        near = store.cosines(gather(unit, pick), unit) if stored is None else gather(stored, pick)
        before, covered = covered, torch.maximum(covered, near.squeeze(1))
        if stored is not None:
            gain = gains(unit, stored, covered)
        elif step + 1 < most:
            gain = gain - _lost(unit, before, covered)
    return keep


def gains(unit: Float[Tensor, "B V D"], stored: Tensor | None, covered: Int[Tensor, "B V"]) -> Int[Tensor, "B V"]:
    """What each token would add to the coverage of all."""
    if stored is not None:
        return (stored - covered[..., None]).clamp_(min=0).sum(1)
    total = torch.zeros_like(covered, dtype=torch.int64)
    for start in range(0, unit.shape[1], BLOCK):
        piece = slice(start, start + BLOCK)
        total += (store.cosines(unit[:, piece], unit) - covered[:, piece, None]).clamp_(min=0).sum(1)
    return total


def _lost(unit: Float[Tensor, "B V D"], before: Int[Tensor, "B V"], now: Int[Tensor, "B V"]) -> Int[Tensor, "B V"]:
    """How much gains fall where the coverage of some tokens rises, from the cosines of those tokens alone."""
    # On a GPU all blocks are looked at: to know which tokens they are, the host would have to wait.
    if unit.is_cuda:
        return gains(unit, None, before) - gains(unit, None, now)
    rows = []
    for row, changed in enumerate(before != now):
        own = slice(row, row + 1)
        risen = unit[own, changed]
        old, new = before[own, changed], now[own, changed]
        fallen = torch.zeros_like(before[own], dtype=torch.int64)
        for start in range(0, risen.shape[1], BLOCK):
            piece = slice(start, start + BLOCK)
            near = store.cosines(risen[:, piece], unit[own])
            fallen += ((near - old[:, piece, None]).clamp_(min=0) - (near - new[:, piece, None]).clamp_(min=0)).sum(1)
        rows.append(fallen)
    return torch.cat(rows)


SEARCHES: dict[str, Callable[..., Any]] = {
    "greedy": _plain_greedy,
    "in_turn": _plain_in_turn,
    "thinned": plain_thinned,
    "covering": _plain_covering,
    "nearest": plain_nearest,
    "pairs": plain_pairs,
    "merge": plain_merge,
}
