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

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize, pad

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
            token if it was merged, S if it was dropped.
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
        view.carry = _Plan.of(view, budget.tolist())
        entry = torch.arange(view.valid.shape[1], device=view.valid.device)
        # Never more than are present, and padding comes last.
        return entry < to_device(budget, entry.device)[:, None]

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        # The caller ignores the result for an image that keeps all its tokens.
        plan, earlier = view.carried(_Plan), view.remembered(_Bypass)
        candidates = _first_candidates(view) if earlier is None else _restored(view, earlier)
        states, exists, score, added = candidates
        single, groups = to_device([plan.single, plan.groups], exists.device)
        best = highest(score, exists, single)
        rest = exists > best
        if not all(plan.merges):
            rest = rest & to_device(plan.merges, rest.device)[:, None]
        most = max((max(view.sizes) + 10) // 20, 1)
        group = _grouped(states, rest, groups, most, plan.passes)
        joint, raster = _joint(states, added), torch.arange(exists.shape[1], device=exists.device)
        mean, is_median, carrier = _merged(joint, group, raster, most)
        # Rounded to the sequence's dtype, so that the later difference holds only what the layers have added.
        carried = torch.where(is_median[..., None], mean, joint).to(view.hidden.dtype)
        then = carried[..., : states.shape[2]].to(states.dtype)
        bypass = _Bypass(states, torch.where(best, raster, carrier), is_median, then, added)
        if earlier is not None and any(plan.keeps_all):
            bypass = _unless(to_device(plan.keeps_all, exists.device), bypass, earlier)
        view.remember(bypass)
        # The tokens that continue fill the first entries, which are the kept ones, in raster order.
        continues = (best | is_median).view(torch.uint8)
        index = continues.argsort(dim=1, descending=True, stable=True)[:, : keep.shape[1]]
        return gather(carried, index), index


@dataclass(frozen=True)
class _Plan:
    """What a stage does with each image, known on the host.

    Args:
        single: how many tokens continue as they are.
        groups: how many merged tokens continue, at least 1 (where there are none: of no token).
        merges: whether any merged token continues.
        keeps_all: whether the image keeps all its tokens, so that the result for it is ignored.
        passes: passes that grouping needs at most.
    """

    single: list[int]
    groups: list[int]
    merges: list[bool]
    keeps_all: list[bool]
    passes: int

    @classmethod
    def of(cls, view: TokenView, budget: Sequence[int]) -> _Plan:
        """The plan for a view of which `budget` tokens are kept in each image."""
        keeps_all = [count >= present for count, present in zip(budget, view.counts, strict=True)]
        # One merged token for each 20 tokens of the image (rounded), within 1 and half of the keep; none for a single slot.
        groups = [
            0 if complete or count < 2 else max(1, min((size + 10) // 20, count // 2))
            for size, count, complete in zip(view.sizes, budget, keeps_all, strict=True)
        ]
        # An image that keeps all its tokens keeps every candidate.
        single = [
            size if complete else count - number
            for size, count, number, complete in zip(view.sizes, budget, groups, keeps_all, strict=True)
        ]
        # As many candidates as the image has had tokens, of which the best continue as they are.
        passes = [
            _passes(size - count, number)
            for size, count, number in zip(view.sizes, single, groups, strict=True)
            if number
        ]
        merges = [number > 0 for number in groups]
        return cls(single, [max(1, number) for number in groups], merges, keeps_all, max(passes, default=0))


def _passes(tokens: int, groups: int) -> int:
    """How many passes join `tokens` into `groups`."""
    passes = 0
    while tokens > groups:
        tokens, passes = tokens - min(tokens // 2, tokens - groups), passes + 1
    return passes


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
    """Values of the tokens present, by raster index; 0 for others, and behind the last."""
    size = max(view.sizes)
    # Padding writes to a spare last column.
    index = view.index.masked_fill(~view.valid, size + 1)
    table = torch.zeros(len(index), size + 2, *values.shape[2:], dtype=values.dtype, device=values.device)
    return table.scatter_(1, index.view(*index.shape, *[1] * (values.dim() - 2)).expand_as(values), values)[:, :-1]


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
    table = table[:, :-1]
    return table[..., :-2], table[..., -1] > 0, table[..., -2], _own_additions(view)


def _own_additions(view: TokenView) -> Float[Tensor, "B S A"]:
    """What will still be added to the tokens present, by raster index."""
    if not view.additions.shape[2]:
        return view.additions.new_empty(len(view.sizes), max(view.sizes), 0)
    return _table(view, view.additions.to(torch.promote_types(view.hidden.dtype, torch.float32)))[:, :-1]


def _restored(view: TokenView, earlier: _Bypass) -> _Candidates:
    """The candidates at a later stage: kept tokens as they are, stored ones moved along."""
    fine, device = torch.promote_types(view.hidden.dtype, torch.float32), view.valid.device
    states, then = earlier.states.to(device), earlier.then.to(device)
    carrier, merged = earlier.carrier.to(device), earlier.merged.to(device)
    marked = torch.cat([view.hidden.to(fine), torch.ones_like(view.hidden[..., :1], dtype=fine)], dim=2)
    table = _table(view, marked)
    # A stored token can be restored only while the token that carries it is present; behind the last index none is.
    present = table[..., -1] > 0
    exists, present, now = present.gather(1, carrier), present[:, :-1], table[:, :-1, :-1]
    carrier_index = carrier.clamp(max=present.shape[1] - 1)
    moved = states + gather(now, carrier_index) - gather(then, carrier_index)
    # What stands at a raster index at which no merged token continued is a candidate with the state that it has: a kept
    # token, or one that another method has put there.
    unchanged = present > merged
    states, exists = torch.where(unchanged[..., None], now, moved), exists | unchanged
    added = _own_additions(view)
    if added.shape[2]:
        # The change of the mean holds what was added to it so far; what is still to come is each token's own.
        coming = earlier.added[..., earlier.added.shape[2] - added.shape[2] :].to(device)
        added = torch.where(unchanged[..., None], added, coming)
    score = view.attention_to(states, None, exists).mean(dim=1)
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
    order = rest.view(torch.uint8).argsort(dim=1, descending=True, stable=True)
    sums, every = gather(states, order) * rest.gather(1, order)[..., None], torch.arange(size, device=rest.device)
    group_of, largest = every.expand(rest.shape), size
    # A pass at most halves the groups of an image. The number of passes follows from sizes that the host knows, so that
    # nothing is read back from the device; images that are done pass through unchanged.
    passes = max(0, size - 1).bit_length() if passes is None else passes
    first = rest.sum(1, keepdim=True)
    below, powers = to_device([[2**number - less for number in range(passes + 1)] for less in (1, 0)], rest.device)
    # An image without a token to group has one absent group, so that numbers start at 0.
    alive = torch.maximum((first + below) // powers, torch.minimum(first, groups[:, None])).clamp(min=1).T[..., None]
    # For all passes at once: which groups are absent, and which ranks of even-numbered groups do not join (the first
    # ones do; no more than there are).
    before, after = alive[:-1], alive[1:]
    absent, stays = every >= before, (every < (before + 1) // 2) > (every < before - after)
    # Groups that are there; behind a -1, so that their running sum counts from 0.
    present = pad((every < before).view(torch.int8), (1, 0), value=-1)
    for number in range(passes):
        best, partner = _partners(sums, absent[number, :, :size])
        # The groups that remain are renumbered without gaps: odd-numbered ones and those of even number that do not join.
        remains = present[number, :, : size + 1]
        even_remains = remains[:, 1::2].view(torch.bool)
        even_remains.scatter_(1, best, stays[number, :, : best.shape[1]])
        new_number = remains.cumsum(dim=1)[:, 1:]
        evens, odds = new_number[:, ::2], new_number[:, 1::2]
        torch.where(even_remains, evens, odds.gather(1, partner), out=evens)
        group_of = new_number.gather(1, group_of)
        largest = (largest + 1) // 2
        size = min(size, max(most, largest))
        if number < passes - 1:
            sums = _joined(sums, new_number, every[:size])
    # Tokens that are not grouped come after the others.
    group_of = group_of.masked_fill(every >= first, -1)
    return torch.empty_like(order).scatter_(1, order, group_of)


def _partners(
    sums: Float[Tensor, "B m D"], absent: Bool[Tensor, "B m"]
) -> tuple[Int[Tensor, "B e"], Int[Tensor, "B e"]]:
    """The even-numbered groups (their number halved), and the most similar odd-numbered one of each (likewise).

    Returns:
        all even-numbered groups, those of the largest cosines first and absent ones last; the partner of each in order.
    """
    # The direction of a sum is that of the mean.
    unit = normalize(sums, dim=-1)
    # In blocks of rows, so that the matrix of all pairs never exists at once.
    others, halves = unit[:, 1::2].transpose(1, 2), unit[:, ::2].split(BLOCK, dim=1)
    nearest = [(half @ others).masked_fill_(absent[:, None, 1::2], -torch.inf).max(dim=2) for half in halves]
    cosine, partner = (joined([part[i] for part in nearest]) for i in (0, 1))
    return cosine.masked_fill(absent[:, ::2], -torch.inf).argsort(dim=1, descending=True, stable=True), partner


def _joined(
    values: Float[Tensor, "B m D"], new_number: Int[Tensor, "B m"], numbers: Int[Tensor, " n"]
) -> Float[Tensor, "B n D"]:
    """Sums of the values that get the same new number, by matrix products: unlike scattering, these are deterministic."""
    pieces = numbers.split(BLOCK)
    return joined([(new_number[:, None] == piece[:, None]).to(values.dtype) @ values for piece in pieces])


def _merged(
    states: Float[Tensor, "B S D"], group: Int[Tensor, "B S"], raster: Int[Tensor, " S"], most: int
) -> tuple[Float[Tensor, "B S D"], Bool[Tensor, "B S"], Int[Tensor, "B S"]]:
    """For each grouped token its group's mean, whether it is the group's median, and the median's raster index (or S)."""
    member = group[..., None] == raster[:most]
    number = member.cumsum(dim=1)
    size = number[:, -1]
    # Groups of no token are not read.
    mean = member.to(states.dtype).transpose(1, 2) @ states / size[..., None]
    # In raster order the lower of two medians represents the group: those before it are less than half of its members.
    median, group_index = (2 * number < size[:, None]).sum(dim=1), group.clamp(min=0)
    carrier = median.gather(1, group_index).masked_fill_(group < 0, len(raster))
    return gather(mean, group_index), carrier == raster, carrier
