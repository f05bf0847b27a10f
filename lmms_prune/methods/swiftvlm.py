"""SwiftVLM: what a stage does not keep goes on in a few merged tokens, and the next stage may take it back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.shared.tensors import BLOCK, gather
from lmms_prune.methods.view import TokenView

# Rows of a similarity matrix that exist at once.


@dataclass(frozen=True)
class _Bypass:
    """What a stage leaves for the next one: tables over the original tokens of each image, by raster index.

    Args:
        states: hidden states of all candidates at the input of the stage's layer.
        carrier: the token that carries a candidate on: itself if it was kept, the merged token of its group (by the
            raster index at which that stands), or -1 if it is gone.
        merged: whether the token that goes on under this raster index is a merged one.
        then: the states that went on, for each raster index that went on.
    """

    states: Float[Tensor, "B S D"]
    carrier: Int[Tensor, "B S"]
    merged: Bool[Tensor, "B S"]
    then: Float[Tensor, "B S D"]


class SwiftVLM(Method):
    """Keeps what the last prompt token attends to; the rest goes on merged, and later stages rank all tokens anew.

    The first stage ranks by the last prompt token's attention in the layer before. Best tokens go on; the others are
    grouped by cosine similarity, each group goes on as its mean, and they are stored. At the next swiftvlm stage each
    stored token is its old state plus what its group's mean has changed since; these and the tokens kept so far are
    ranked by the last prompt token's attention in that layer itself, as if they all stood there. Published at layers 3,
    10 and 14 (presets ``swiftvlm-192`` and ``swiftvlm-128``); a single stage is the first one.

    Paper: https://arxiv.org/abs/2602.03134.
    Differs from the paper: it leaves open, and here was chosen: head means rank; every stage merges, the last one too,
    and its keep counts the merged tokens: 5 % of the image's tokens, at least one and at most half of the keep; groups come
    from merging even with odd places, most similar pairs first, until so few are left; a merged token stands at its
    group's median token (the lower of two); merged tokens are never ranked. A stage that keeps all that is there restores nothing, and
    tokens whose group's merged token another method dropped are gone. Restored tokens are ranked at original positions.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2602.03134"

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        """The first places: which tokens stand in them, restored ones too, is for `rewrite` to say."""
        place = torch.arange(view.valid.shape[1], device=view.valid.device)
        return view.valid & (place < budget.to(place.device)[:, None])

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V D"], Int[Tensor, "B V"]]:
        # An image that keeps all its tokens is left alone by the caller.
        count, is_full = keep.sum(dim=1), (keep == view.valid).all(dim=1)
        earlier = _earlier(view)
        states, exists, score = _first(view) if earlier is None else _restored(view, earlier)
        sizes = torch.tensor(view.sizes, device=count.device)
        groups = torch.minimum((sizes + 10) // 20, count // 2).maximum((count > 1).long())
        groups = torch.where(is_full, 0, groups)
        best = highest(score, exists, torch.where(is_full, exists.sum(dim=1), count - groups))
        most = max((max(view.sizes) + 10) // 20, 1)
        group = _folded(states, exists & ~best, groups.clamp(min=1), most)
        mean, middle, carrier = _merged(states, group, most)
        merging = (groups > 0)[:, None]
        middle, carrier = middle & merging, torch.where(merging, carrier, -1)
        goes_on = best | middle
        # As it will stand in the sequence, rounding included, so that only what the layers add is caught up.
        then = torch.where(middle[..., None], mean, states).to(view.hidden.dtype).to(states.dtype)
        raster = torch.arange(exists.shape[1], device=exists.device).expand_as(exists)
        bypass = _Bypass(states, torch.where(best, raster, carrier), middle, then)
        view.memory[f"swiftvlm {view.layer}"] = bypass if earlier is None else _unless(is_full, bypass, earlier)
        in_order = (~goes_on).to(torch.uint8).argsort(dim=1, stable=True)
        index = in_order.gather(1, (keep.cumsum(dim=1) - 1).clamp(min=0))
        hidden = gather(then, index).to(view.hidden.dtype)
        return torch.where(keep[..., None], hidden, view.hidden), torch.where(keep, index, view.index)


def _earlier(view: TokenView) -> _Bypass | None:
    """What the nearest swiftvlm stage before this layer has left."""
    for layer in range(view.layer - 1, -1, -1):
        bypass = view.memory.get(f"swiftvlm {layer}")
        if isinstance(bypass, _Bypass):
            return bypass
    return None


def _unless(is_full: Bool[Tensor, " B"], new: _Bypass, old: _Bypass) -> _Bypass:
    """`new`, but `old` for images that were left alone."""

    def one(a: Tensor, b: Tensor) -> Tensor:
        return torch.where(is_full.view(-1, *[1] * (a.dim() - 1)), b.to(a.device), a)

    return _Bypass(*(one(getattr(new, x), getattr(old, x)) for x in ("states", "carrier", "merged", "then")))


def _table(view: TokenView, values: Float[Tensor, "B V *D"]) -> Float[Tensor, "B S *D"]:
    """Values of the tokens that stand in the sequence, by raster index, 0 for others."""
    size = max(view.sizes)
    index = torch.where(view.valid, view.index, size)
    rows = torch.arange(len(index), device=index.device)[:, None]
    table = torch.zeros(len(index), size + 1, *values.shape[2:], dtype=values.dtype, device=values.device)
    return table.index_put((rows, index), values)[:, :size]


def _first(view: TokenView) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Float[Tensor, "B S"]]:
    """States, presence and scores of all candidates at the first stage: the tokens that are there."""
    fine = torch.promote_types(view.hidden.dtype, torch.float32)
    score = view.ranking(view.attention(view.last)[:, :, 0].mean(dim=1))
    there = _table(view, torch.ones_like(score)) > 0
    return _table(view, view.hidden.to(fine)), there, _table(view, score)


def _restored(
    view: TokenView, earlier: _Bypass
) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Float[Tensor, "B S"]]:
    """States, presence and scores of all candidates at a later stage: kept tokens as they are, stored ones caught up."""
    fine, device = torch.promote_types(view.hidden.dtype, torch.float32), view.valid.device
    states, then = earlier.states.to(device), earlier.then.to(device)
    carrier, merged = earlier.carrier.to(device), earlier.merged.to(device)
    now = _table(view, view.hidden.to(fine))
    there = _table(view, torch.ones(view.index.shape, device=device)) > 0
    carried = carrier.clamp(min=0)
    exists = (carrier >= 0) & there.gather(1, carried)
    raster = torch.arange(exists.shape[1], device=device)
    caught_up = states + gather(now, carried) - gather(then, carried)
    # Another method may have put tokens of its own where nothing of ours stood: they are candidates as they are.
    known = torch.zeros_like(carrier).scatter_add_(1, carried, (carrier >= 0).long()) > 0
    own = there & (~known | ((carrier == raster) & ~merged))
    states, exists = torch.where(own[..., None], now, caught_up), exists | own
    score = view.attention_to(states, raster.expand_as(carrier), exists).mean(dim=1)
    return states, exists, view.ranking(score, exists)


def _folded(
    states: Float[Tensor, "B S D"], rest: Bool[Tensor, "B S"], groups: Int[Tensor, " B"], most: int
) -> Int[Tensor, "B S"]:
    """The group of each token of `rest`, -1 for others: pairs of similar groups are joined until `groups` are left.

    In a pass the groups at even places (in the order of their tokens) each look for the odd place whose mean has the
    largest cosine, and those with the largest ones join it, no more than are needed.
    """
    rows, size = torch.arange(len(rest), device=rest.device)[:, None], rest.shape[1]
    order = (~rest).to(torch.uint8).argsort(dim=1, stable=True)
    total, amount = gather(states, order), rest.gather(1, order).to(states.dtype)
    total, alive = total * amount[..., None], rest.sum(dim=1)
    place = torch.arange(size, device=rest.device).expand_as(rest)
    belongs, largest = place, size
    # Every pass halves what is left of an image, until it has what it should.
    while largest > 1:
        fewer = torch.minimum(alive // 2, alive - groups).clamp(min=0)
        joins, partner = _pairs(total, amount, alive, fewer)
        target = torch.where(joins, partner, place[:, :size])
        stays = ~joins & (place[:, :size] < alive[:, None])
        moved = (stays.cumsum(dim=1) - 1).gather(1, target).clamp(min=0)
        belongs = moved[rows, belongs.clamp(max=size - 1)]
        largest = (largest + 1) // 2
        alive, size = alive - fewer, min(size, max(most, largest))
        total, amount = _joined(total, moved, size), _joined(amount[..., None], moved, size)[..., 0]
    group = torch.empty_like(order).scatter_(1, order, belongs)
    return torch.where(rest, group, -1)


def _pairs(
    total: Float[Tensor, "B m D"], amount: Float[Tensor, "B m"], alive: Int[Tensor, " B"], fewer: Int[Tensor, " B"]
) -> tuple[Bool[Tensor, "B m"], Int[Tensor, "B m"]]:
    """Which groups at even places join another, `fewer` in all, and the odd place of each one's most similar group."""
    unit = normalize(total, dim=-1)
    place = torch.arange(total.shape[1], device=total.device)
    odd = unit[:, 1::2].transpose(1, 2)
    is_odd = (place[1::2] < alive[:, None])[:, None]
    found = [(unit[:, piece] @ odd).masked_fill(~is_odd, -torch.inf).max(dim=2) for piece in place[::2].split(BLOCK)]
    likeness = torch.full_like(amount, -torch.inf)
    likeness[:, ::2] = torch.cat([x.values for x in found], dim=1)
    partner = torch.zeros_like(place).expand(amount.shape).clone()
    partner[:, ::2] = 2 * torch.cat([x.indices for x in found], dim=1) + 1
    is_even = (place % 2 == 0) & (place < alive[:, None])
    return highest(likeness, is_even, fewer), partner


def _joined(values: Float[Tensor, "B m D"], moved: Int[Tensor, "B m"], size: int) -> Float[Tensor, "B n D"]:
    """Sums of the values that move to the same place, by products, whose result does not change from run to run."""
    places = torch.arange(size, device=values.device)
    return torch.cat([(moved[:, None] == piece[:, None]).to(values.dtype) @ values for piece in places.split(BLOCK)], 1)


def _merged(
    states: Float[Tensor, "B S D"], group: Int[Tensor, "B S"], most: int
) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Int[Tensor, "B S"]]:
    """For each grouped token its group's mean, whether it is the group's median, and the median's raster index (or -1)."""
    member = one_hot(group + 1, most + 1)[..., 1:]
    size = member.sum(dim=1)
    mean = member.to(states.dtype).transpose(1, 2) @ states / size.clamp(min=1)[..., None]
    own = group.clamp(min=0)
    rank = member.cumsum(dim=1).gather(2, own[..., None])[..., 0] - 1
    middle = (group >= 0) & (rank == (size.gather(1, own) - 1) // 2)
    raster = torch.arange(group.shape[1], device=group.device)
    at = (member * (middle * raster)[..., None]).sum(dim=1)
    return gather(mean, own), middle, torch.where(group >= 0, at.gather(1, own), -1)
