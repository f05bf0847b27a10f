"""A merging pass in plain torch: the reference of the kernels, used on CPUs and where no kernel can be built.

Dimension letters: B images, n tokens before a pass, m after it, e and o those of even and of odd rank, D features, K features
of the metric.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmms_prune.methods.shared.tensors import BLOCK, add_up, directions, gather, joined, settled
from lmms_prune.models.tensors import to_device


def plain_nearest(metric: Float[Tensor, "B n K"], length: Int[Tensor, " B"] | None) -> tuple[Tensor, Tensor]:
    """For each even token the highest cosine (B, e) to an odd one among the first `length`, and which of them has it."""
    unit = directions(metric)
    even, odd = unit[:, ::2], unit[:, 1::2].transpose(1, 2)
    # In blocks of rows, so that the matrix of all pairs never exists at once.
    cosines = (settled(even[:, start : start + BLOCK] @ odd) for start in range(0, even.shape[1], BLOCK))
    if length is not None:
        number = torch.arange(1, metric.shape[1], 2, device=metric.device)
        is_padding = (number >= length[:, None])[:, None]
        cosines = (near.masked_fill_(is_padding, -torch.inf) for near in cosines)
    nearest = [near.max(dim=-1) for near in cosines]
    return joined([part.values for part in nearest]), joined([part.indices for part in nearest])


def plain_pairs(
    score: Float[Tensor, "B e"],
    partner: Int[Tensor, "B e"],
    tokens: int,
    counts: Sequence[int],
    remove: Sequence[int],
    evens_first: bool,
    protected: int,
) -> tuple[Int[Tensor, "B n"], Int[Tensor, "B m"]]:
    """For each token the number of the one into which it is merged, and the numbers of the remaining tokens in their order."""
    number = torch.arange(tokens, device=score.device)
    is_ragged = len({*zip(counts, remove, strict=True)}) > 1
    # Numbers that all rows share need not be copied to the device.
    length, count = to_device([counts, remove], score.device)[..., None] if is_ragged else (counts[0], remove[0])
    is_padding = number >= length if min(counts) < tokens else None
    excluded = number < protected if is_padding is None else (number < protected) | is_padding
    ranked = score.masked_fill(excluded[..., ::2], -torch.inf).argsort(dim=1, descending=True, stable=True)
    is_first = (number[: score.shape[1]] < count).expand_as(ranked)
    merges = torch.empty_like(ranked, dtype=torch.bool).scatter_(1, ranked, is_first)
    into = number.repeat(len(score), 1)
    torch.where(merges, 2 * partner + 1, into[:, ::2], out=into[:, ::2])
    # The order after the published step has even tokens before odd ones.
    rank = (number % 2 if evens_first else torch.zeros_like(number)).masked_fill(into != number, 2)
    rank = rank if is_padding is None else rank.masked_fill_(is_padding, 3)
    order = rank.argsort(dim=1, stable=True)
    return into, order[:, : max(n - r for n, r in zip(counts, remove, strict=True))]


def plain_merge(
    x: Float[Tensor, "B n D"],
    weight: Float[Tensor, "B n"],
    slot: Int[Tensor, "B n"],
    into: Int[Tensor, "B n"],
    order: Int[Tensor, "B m"],
) -> tuple[Float[Tensor, "B m D"], Float[Tensor, "B m"], Int[Tensor, "B m"]]:
    """The mean, weighted by `weight` and in its type, of what is merged into each remaining token; its weight, and its slot."""
    total = add_up(weight, into, into.shape[1])
    share = weight / total.gather(1, into)
    mean = add_up(x.to(weight.dtype) * share[..., None], into, into.shape[1])
    return gather(mean, order).to(x.dtype), gather(total, order), gather(slot, order)
