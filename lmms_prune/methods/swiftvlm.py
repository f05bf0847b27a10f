"""SwiftVLM: tokens that a stage does not keep continue in a few merged tokens, and the next stage may restore them.

Worked example, two stages on an image of six tokens v0 to v5 with two-dimensional states.

    state      v0 (1,0)   v1 (0,2)   v2 (3,3)   v3 (0,4)   v4 (-2,0)   v5 (2,-6)
    attention  v0 6       v1 1       v2 5       v3 2       v4 3        v5 1          (of 24)

Stage 1 with keep 3. 5 % of six tokens is less than one, so one of the three slots is for a merged token: the best two,
v0 and v2, are kept, and v1, v3, v4, v5 are merged into their mean (0,0). It takes the raster index of their (lower)
median token: 3. Kept: v0 v2 v3. All six states are stored.

The layers up to stage 2 turn the three tokens into (1,1), (4,3) and (10,20). So the merged token has moved by (10,20),
and the stored tokens are moved by as much: v1 (10,22), v3 (10,24), v4 (8,20), v5 (12,14); v0 and v2 are what they are.

Stage 2 with keep 2, where the last prompt token attends by the second entry: v3 24, v1 22, v4 20, v5 14, v2 3, v0 1.
v3 is restored as the best token. The other five are merged into their mean (7,12), at their median token 2.
Kept: v2 v3.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.shared.tensors import BLOCK, gather, joined
from lmms_prune.methods.view import TokenView
from lmms_prune.models.tensors import to_device


@dataclass(frozen=True)
class _Bypass:
    """State that a stage stores for the next one: tables over the original tokens of each image, by raster index.

    Args:
        states: hidden states of all candidates at the input of the stage's layer.
        carrier: the raster index under which a candidate continues: its own if it was kept, that of its group's merged
            token if it was merged, -1 if it was dropped.
        merged: whether the token that continues under this raster index is a merged one.
        then: the states with which kept and merged tokens entered the layer; arbitrary for others.
        added: what the decoder will still add to each candidate between its layers, each its own.
    """

    states: Float[Tensor, "B S D"]
    carrier: Int[Tensor, "B S"]
    merged: Bool[Tensor, "B S"]
    then: Float[Tensor, "B S D"]
    added: Float[Tensor, "B S A"]


_Candidates = tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Float[Tensor, "B S"], Float[Tensor, "B S A"]]
"""States of all candidates, whether each is present, its score, and what will be added to it."""


class SwiftVLM(Method):
    """Keeps the tokens that the last prompt token attends to, merges the rest, and lets later stages rank all tokens anew.

    The first stage ranks by the last prompt token's attention in the layer before. The best tokens are kept. The others
    are stored and grouped by cosine similarity, and each group continues as its mean. At the next swiftvlm stage each
    stored token is its old state plus the change of its group's mean since. These and the tokens kept so far are
    ranked by the last prompt token's attention in that layer itself, as if all of them were present. Published at layers
    3, 10 and 14 (presets ``swiftvlm-192`` and ``swiftvlm-128``); a single stage acts as the first one.

    Paper: https://arxiv.org/abs/2602.03134.
    Differs from the paper:
        The paper leaves open, and here was chosen:
        - head means rank
        - every stage merges, the last one too, and its keep counts the merged tokens: 5 % of the image's tokens, at least
          one and at most half of the keep
        - groups are formed by merging groups of even rank into groups of odd rank, most similar pairs first, until as few
          remain as there are merged tokens
        - a merged token has the position of its group's median token (the lower of two)
        - merged tokens are never ranked
        - a keep-all stage restores nothing
        - tokens whose group's merged token another method dropped are dropped too
        - restored tokens are ranked at original positions.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2602.03134"

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        """The first `budget` entries; `rewrite` decides which tokens, restored ones too, fill them."""
        entry = torch.arange(view.valid.shape[1], device=view.valid.device)
        return view.valid & (entry < to_device(budget, entry.device)[:, None])

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        # The caller ignores the result for an image that keeps all its tokens.
        count, keeps_all = keep.sum(dim=1), (keep == view.valid).all(dim=1)
        earlier = view.remembered(_Bypass)
        candidates = _first_candidates(view) if earlier is None else _restored(view, earlier)
        states, exists, score, added = candidates
        # One merged token for each 20 tokens of the image (rounded), within 1 and half of the keep; none for a single slot.
        shares = to_device([(size + 10) // 20 for size in view.sizes], count.device)
        groups = torch.minimum(shares, count // 2).maximum((count > 1).long()).masked_fill_(keeps_all, 0)
        best = highest(score, exists, torch.where(keeps_all, exists.sum(dim=1), count - groups))
        most = max((max(view.sizes) + 10) // 20, 1)
        group = _grouped(states, exists > best, groups.clamp(min=1), most, _passes(view))
        mean, is_median, carrier = _merged(_joint(states, added), group, most)
        merging = (groups > 0)[:, None]
        is_median, carrier = is_median & merging, torch.where(merging, carrier, -1)
        continues = best | is_median
        # Rounded to the sequence's dtype, so that the later difference holds only what the layers have added.
        carried = torch.where(is_median[..., None], mean, _joint(states, added)).to(view.hidden.dtype)
        then = carried[..., : states.shape[2]].to(states.dtype)
        raster = torch.arange(exists.shape[1], device=exists.device).expand_as(exists)
        bypass = _Bypass(states, torch.where(best, raster, carrier), is_median, then, added)
        view.remember(bypass if earlier is None else _unless(keeps_all, bypass, earlier))
        # The tokens that continue fill the kept entries in raster order.
        in_order = continues.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
        index = in_order.gather(1, (keep.cumsum(dim=1) - 1).clamp(min=0))
        hidden = torch.where(keep[..., None], gather(carried, index), view.with_additions(view.hidden))
        return hidden, torch.where(keep, index, view.index)


def _unless(keeps_all: Bool[Tensor, " B"], new: _Bypass, old: _Bypass) -> _Bypass:
    """`new`, but `old` for images that keep all their tokens."""

    def chosen(new_table: Tensor, old_table: Tensor) -> Tensor:
        use_old = keeps_all.view(-1, *[1] * (new_table.dim() - 1))
        return torch.where(use_old, old_table.to(new_table.device), new_table)

    # At a later layer less is still to be added: the last of what was to be added before.
    coming = old.added[..., old.added.shape[2] - new.added.shape[2] :]
    old, names = replace(old, added=coming), ("states", "carrier", "merged", "then", "added")
    return _Bypass(*(chosen(getattr(new, name), getattr(old, name)) for name in names))


def _table(view: TokenView, values: Float[Tensor, "B V *D"]) -> Float[Tensor, "B S *D"]:
    """Values of the tokens present, by raster index; 0 for others."""
    size = max(view.sizes)
    # Padding writes to a spare last column.
    index = torch.where(view.valid, view.index, size)
    rows = torch.arange(len(index), device=index.device)[:, None]
    table = torch.zeros(len(index), size + 1, *values.shape[2:], dtype=values.dtype, device=values.device)
    return table.index_put((rows, index), values)[:, :size]


def _joint(states: Float[Tensor, "B S D"], added: Float[Tensor, "B S A"]) -> Float[Tensor, "B S E"]:
    """States and what is merged with them, side by side."""
    return torch.cat([states, added], dim=2) if added.shape[2] else states


def _first_candidates(view: TokenView) -> _Candidates:
    """The candidates at the first stage: the tokens present."""
    fine = torch.promote_types(view.hidden.dtype, torch.float32)
    score = view.ranking(view.attention(view.last)[:, :, 0].mean(dim=1))
    # All in one table.
    marks = torch.stack([score, torch.ones_like(score)], dim=2)
    table = _table(view, torch.cat([view.hidden.to(fine), marks.to(fine)], dim=2))
    return table[..., :-2], table[..., -1] > 0, table[..., -2], _own_additions(view)


def _own_additions(view: TokenView) -> Float[Tensor, "B S A"]:
    """What will still be added to the tokens present, by raster index."""
    if not view.additions.shape[2]:
        return view.additions.new_empty(len(view.sizes), max(view.sizes), 0)
    return _table(view, view.additions.to(torch.promote_types(view.hidden.dtype, torch.float32)))


def _restored(view: TokenView, earlier: _Bypass) -> _Candidates:
    """The candidates at a later stage: kept tokens as they are, stored ones moved along."""
    fine, device = torch.promote_types(view.hidden.dtype, torch.float32), view.valid.device
    states, then = earlier.states.to(device), earlier.then.to(device)
    carrier, merged = earlier.carrier.to(device), earlier.merged.to(device)
    now = _table(view, view.hidden.to(fine))
    present = _table(view, torch.ones(view.index.shape, device=device)) > 0
    # A stored token can be restored only while the token that carries it is present. The clamp reads index 0 for
    # dropped tokens (-1), which `exists` then leaves out.
    carrier_index = carrier.clamp(min=0)
    exists = (carrier >= 0) & present.gather(1, carrier_index)
    raster = torch.arange(exists.shape[1], device=device)
    moved = states + gather(now, carrier_index) - gather(then, carrier_index)
    # Another method may have put a token at a raster index at which no token of ours continued: it is a candidate with
    # the state that it has.
    is_carrier = torch.zeros_like(carrier).scatter_add_(1, carrier_index, (carrier >= 0).long()) > 0
    unchanged = present & (~is_carrier | ((carrier == raster) & ~merged))
    states, exists = torch.where(unchanged[..., None], now, moved), exists | unchanged
    added = _own_additions(view)
    if added.shape[2]:
        # The change of the mean holds what was added to it so far; what is still to come is each token's own.
        coming = earlier.added[..., earlier.added.shape[2] - added.shape[2] :].to(device)
        added = torch.where(unchanged[..., None], added, coming)
    score = view.attention_to(states, raster.expand_as(carrier), exists).mean(dim=1)
    return states, exists, view.ranking(score, exists), added


def _grouped(
    states: Float[Tensor, "B S D"],
    rest: Bool[Tensor, "B S"],
    groups: Int[Tensor, " B"],
    most: int,
    passes: int | None = None,
) -> Int[Tensor, "B S"]:
    """The group of each token of `rest`, -1 for others: pairs of similar groups are joined until `groups` remain.

    Groups are numbered in the order of their tokens. In a pass every group with an even number finds the odd-numbered
    one whose mean has the largest cosine, and the pairs with the largest cosines are joined, no more than are needed.

    Args:
        states: of all candidates.
        rest: the tokens to group.
        groups: how many groups remain in each image.
        most: the largest of `groups`, known on the host.
        passes: how many are needed at most; by default as many as one group of all tokens takes.
    """
    size = rest.shape[1]
    # At first every token of `rest` is a group of its own; they come first, in raster order.
    order = rest.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    sums, every = gather(states, order) * rest.gather(1, order)[..., None], torch.arange(size, device=rest.device)
    group_of, largest = every.expand(rest.shape), size
    # A pass at most halves the groups of an image. The number of passes follows from sizes that the host knows, so that
    # nothing is read back from the device; images that are done pass through unchanged.
    passes = max(0, size - 1).bit_length() if passes is None else passes
    first, powers = rest.sum(1, keepdim=True), 2 ** torch.arange(passes + 1)
    halved = (first + to_device(powers - 1, rest.device)) // to_device(powers, rest.device)
    # An image without a token to group has one absent group, so that numbers start at 0.
    alive = torch.maximum(halved, torch.minimum(first, groups[:, None])).clamp(min=1)
    # For all passes at once: which groups are absent, and which ranks join.
    absent_of = every >= alive[:, :-1].T[..., None]
    joining = every < (alive[:, :-1] - alive[:, 1:]).T[..., None]
    for number in range(passes):
        absent = absent_of[number, :, :size]
        target = _targets(sums, every[:size], absent, joining[number])
        # The groups that remain (booleans: equal, and not absent) are renumbered without gaps.
        remains = (target == every[:size]) > absent
        new_number = remains.cumsum(dim=1).gather(1, target).sub_(1)
        group_of = new_number.gather(1, group_of)
        largest = (largest + 1) // 2
        size = min(size, max(most, largest))
        if number < passes - 1:
            sums = _joined(sums, new_number, every[:size])
    group = torch.empty_like(order).scatter_(1, order, group_of)
    return torch.where(rest, group, -1)


def _passes(view: TokenView) -> int | None:
    """How many passes `_grouped` needs at most, from the counts that the stage requests, where the host knows them."""
    if view.requested is None:
        return None
    needed = 0
    for size, present, count in zip(view.sizes, view.counts, view.requested, strict=True):
        if count >= present:
            continue
        groups = max(1, min((size + 10) // 20, count // 2))
        # As many candidates as the image has had, of which the best stay single.
        alive, passes = size - max(0, count - groups), 0
        while alive > groups:
            alive, passes = alive - min(alive // 2, alive - groups), passes + 1
        needed = max(needed, passes)
    return needed


def _targets(
    sums: Float[Tensor, "B m D"], number: Int[Tensor, " m"], absent: Bool[Tensor, "B m"], joining: Bool[Tensor, "B n"]
) -> Int[Tensor, "B m"]:
    """The group that each group becomes a part of: the most similar odd-numbered one, for even-numbered ones whose rank joins."""
    # The direction of a sum is that of the mean.
    unit = normalize(sums, dim=-1)
    # In blocks of rows, so that the matrix of all pairs never exists at once.
    others, halves = unit[:, 1::2].transpose(1, 2), unit[:, ::2].split(BLOCK, dim=1)
    nearest = [(half @ others).masked_fill_(absent[:, None, 1::2], -torch.inf).max(dim=2) for half in halves]
    cosine, partner = (joined([part[i] for part in nearest]) for i in (0, 1))
    order = cosine.masked_fill(absent[:, ::2], -torch.inf).argsort(dim=1, descending=True, stable=True)
    # No more join than there are even-numbered groups, and these have the first ranks.
    joins = torch.empty_like(order, dtype=torch.bool).scatter_(1, order, joining[:, : order.shape[1]])
    target = number.repeat(len(absent), 1)
    target[:, ::2] = torch.where(joins, number[1::2][partner], number[::2])
    return target


def _joined(
    values: Float[Tensor, "B m D"], new_number: Int[Tensor, "B m"], numbers: Int[Tensor, " n"]
) -> Float[Tensor, "B n D"]:
    """Sums of the values that get the same new number, by matrix products: unlike scattering, these are deterministic."""
    pieces = numbers.split(BLOCK)
    return joined([(new_number[:, None] == piece[:, None]).to(values.dtype) @ values for piece in pieces])


def _merged(
    states: Float[Tensor, "B S D"], group: Int[Tensor, "B S"], most: int
) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Int[Tensor, "B S"]]:
    """For each grouped token its group's mean, whether it is the group's median, and the median's raster index (or -1)."""
    member = group[..., None] == torch.arange(most, device=group.device)
    number = member.cumsum(dim=1)
    size = number[:, -1]
    mean = member.to(states.dtype).transpose(1, 2) @ states / size.clamp(min=1)[..., None]
    # In raster order; the lower of two medians represents the group.
    medians = member & (number == ((size + 1) // 2)[:, None])
    median, group_index = medians.to(torch.uint8).argmax(dim=1), group.clamp(min=0)
    raster = torch.where(group >= 0, median.gather(1, group_index), -1)
    return gather(mean, group_index), medians.any(dim=2), raster
