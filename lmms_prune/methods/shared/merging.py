"""Merging of tokens into similar ones, as ToMe and FOLDER share it.

Dimension letters: B images, V tokens of a view, n of them left, m fewer, D features, K of them compared, b some images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods.shared.tensors import BLOCK, add_up, directions, gather, settled
from lmms_prune.methods.view import TokenView
from lmms_prune.models.clip_encoder import ClipEncoder


@dataclass(frozen=True)
class Merged:
    """What a stage leaves: states, raster indices and numbers of tokens of the places that are kept."""

    hidden: Float[Tensor, "B V D"]
    index: Int[Tensor, "B V"]
    size: Float[Tensor, "B V"]
    keep: Bool[Tensor, "B V"]


@dataclass(frozen=True)
class Bag:
    """Tokens on their way to fewer ones, rows padded on the right.

    Args:
        states: what is merged.
        metric: what is compared; None compares the states.
        size: how many tokens each stands for.
        slot: where each stands in the view.
        counts: tokens of each row, known on the host.
    """

    states: Float[Tensor, "B n D"]
    metric: Float[Tensor, "B n K"] | None
    size: Float[Tensor, "B n"]
    slot: Int[Tensor, "B n"]
    counts: tuple[int, ...]

    @property
    def valid(self) -> Bool[Tensor, "B n"]:
        """Which entries are tokens."""
        counts = torch.tensor(self.counts, device=self.slot.device)
        return torch.arange(self.slot.shape[1], device=self.slot.device) < counts[:, None]

    def merge(self, remove: Sequence[int]) -> Bag:
        """One pass, which leaves the tokens in their order."""
        into = partners(self.states if self.metric is None else self.metric, self.valid, remove)
        counts = tuple(n - r for n, r in zip(self.counts, remove, strict=True))
        stays = self.valid & (into == torch.arange(into.shape[1], device=into.device))
        order = (~stays).long().argsort(dim=1, stable=True)[:, : max(counts)]
        metric = None if self.metric is None else gather(averaged(self.metric, into, self.size), order)
        states = gather(averaged(self.states, into, self.size), order)
        return Bag(states, metric, gather(summed(self.size, into), order), gather(self.slot, order), counts)

    def in_place(self, view: TokenView) -> Merged:
        """The tokens at their slots of the view."""
        # Padding is written to a spare last slot.
        slot = torch.where(self.valid, self.slot, view.valid.shape[1])
        keep = torch.zeros_like(pad(view.valid, (0, 1))).scatter(1, slot, True)
        hidden = pad(view.hidden, (0, 0, 0, 1))
        hidden = hidden.scatter(1, slot[..., None].expand_as(self.states), self.states.to(hidden.dtype))
        size = torch.ones_like(keep, dtype=self.size.dtype).scatter(1, slot, self.size)
        return Merged(hidden[:, :-1], view.index, size[:, :-1], keep[:, :-1])


def partners(
    metric: Float[Tensor, "B n K"],
    valid: Bool[Tensor, "B n"],
    remove: Sequence[int],
    penalty: Float[Tensor, "B n"] | None = None,
    protected: int = 0,
) -> Int[Tensor, "B n"]:
    """For each place the place into which its token goes: its own, or the most similar odd one's.

    Args:
        metric: what is compared, by cosine.
        valid: which places hold a token.
        remove: tokens that go, in each row; at most the unprotected even places of the row.
        penalty: taken off the similarity of even places when those that go are chosen.
        protected: tokens at the front that stay.
    """
    place = torch.arange(metric.shape[1], device=metric.device)
    into = place.expand_as(valid).clone()
    if not any(remove):
        return into
    unit = directions(metric)
    even, odd = unit[:, ::2], unit[:, 1::2].transpose(1, 2)
    found = [
        settled(even[:, start : start + BLOCK] @ odd).masked_fill(~valid[:, None, 1::2], -torch.inf).max(dim=-1)
        for start in range(0, even.shape[1], BLOCK)
    ]
    score, partner = (torch.cat([part[i] for part in found], dim=1) for i in (0, 1))
    if penalty is not None:
        score = score - penalty[:, ::2]
    score = score.masked_fill(~valid[:, ::2] | (place[::2] < protected), -torch.inf)
    order = score.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, (place // 2)[::2].expand_as(order))
    goes = rank < torch.tensor(remove, device=rank.device)[:, None]
    into[:, ::2] = torch.where(goes, 2 * partner + 1, into[:, ::2])
    return into


def summed(x: Float[Tensor, "B n *D"], into: Int[Tensor, "B n"]) -> Float[Tensor, "B n *D"]:
    """At each place the sum of what goes there."""
    return add_up(x, into, x.shape[1])


def averaged(
    x: Float[Tensor, "B n *D"], into: Int[Tensor, "B n"], weight: Float[Tensor, "B n"]
) -> Float[Tensor, "B n *D"]:
    """At each place the weighted mean of what goes there; zero where nothing does."""
    share = weight / summed(weight, into).gather(1, into)
    return summed(x * share.view(*share.shape, *(1,) * (x.dim() - 2)), into)


def evens_first(into: Int[Tensor, "B n"], count: int) -> Int[Tensor, "B m"]:
    """The `count` places that are left, even ones before odd ones: the order that the published step leaves."""
    place = torch.arange(into.shape[1], device=into.device)
    rank = torch.where(into == place, place % 2, 2)
    return rank.argsort(dim=1, stable=True)[:, :count]


def no_clip(option: str) -> str:
    """Why `option` cannot be had from a encoder that is not CLIP's."""
    return f"{option} merges inside CLIP's blocks, which this model does not have; leave the option out."


def inside_encoder(
    view: TokenView,
    budget: Int[Tensor, " B"],
    option: str,
    run: Callable[[ClipEncoder, Int[Tensor, " b"], int], tuple[Tensor, Tensor, Tensor]],
) -> Merged:
    """Tokens that were merged inside the encoder, in the image's first places.

    Args:
        view: at layer 0.
        budget: tokens to keep in each image.
        option: that asks for it, as written.
        run: gives states (b, n, D), sizes and raster indices of the n tokens that are left of the view's images b.
    """
    if view.layer:
        message = f"{option} encodes the image anew, so it can act at layer 0 only (is {view.layer}); leave it out."
        raise UnsupportedModelError(message)
    if not isinstance(view.encoder, ClipEncoder):
        raise UnsupportedModelError(no_clip(option))
    hidden, index, counts = view.hidden.clone(), view.index.clone(), budget.tolist()
    size = torch.ones_like(index, dtype=torch.float32)
    # Images of one batch differ in their budget only where a row has several of them.
    for count in sorted(set(counts) - {0, *view.sizes}):
        images = torch.tensor([image for image, n in enumerate(counts) if n == count], device=index.device)
        states, sizes, raster = run(view.encoder, images, count)
        hidden[images, :count] = states.to(hidden.device, hidden.dtype)
        size[images, :count] = sizes.to(size.device, size.dtype)
        index[images, :count] = raster.to(index.device)
    keep = view.valid & (torch.arange(index.shape[1], device=index.device) < budget.to(index.device)[:, None])
    return Merged(hidden, index, size, keep)
