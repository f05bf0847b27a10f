"""Merging of tokens into similar ones, shared by ToMe and FOLDER.

Dimension letters: B images, V tokens of a view, n tokens before a pass, m after it, D features, K features of the
metric, b a subset of the images. The tokens of a row are ranked from 0; tokens of even rank are merged into tokens of odd rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods.shared.tensors import BLOCK, add_up, directions, gather, joined, settled
from lmms_prune.methods.view import TokenView
from lmms_prune.models.clip_encoder import ClipEncoder
from lmms_prune.models.tensors import to_device


@dataclass(frozen=True)
class Merged:
    """Result of a merging stage: for each kept entry its state, its raster index, and how many tokens it stands for."""

    hidden: Float[Tensor, "B V D"]
    index: Int[Tensor, "B V"]
    size: Float[Tensor, "B V"]
    keep: Bool[Tensor, "B V"]


@dataclass(frozen=True)
class Bag:
    """Tokens between two merging passes, rows padded on the right.

    Args:
        states: the states that are merged, and behind them what is merged with them.
        width: features of a state.
        metric: the states that are compared; None compares `states`.
        size: how many tokens each stands for.
        slot: the column of each in the view.
        counts: tokens of each row, known on the host.
    """

    states: Float[Tensor, "B n E"]
    width: int
    metric: Float[Tensor, "B n K"] | None
    size: Float[Tensor, "B n"]
    slot: Int[Tensor, "B n"]
    counts: tuple[int, ...]

    @cached_property
    def valid(self) -> Bool[Tensor, "B n"]:
        """Which entries are tokens."""
        counts = to_device(self.counts, self.slot.device)
        return torch.arange(self.slot.shape[1], device=self.slot.device) < counts[:, None]

    def merge(self, remove: Sequence[int]) -> Bag:
        """Run one pass, which removes `remove` tokens of each row and does not change the order of the others."""
        into = partners(self.states[..., : self.width] if self.metric is None else self.metric, self.valid, remove)
        counts = tuple(n - r for n, r in zip(self.counts, remove, strict=True))
        remains = self.valid & (into == torch.arange(into.shape[1], device=into.device))
        order = (~remains).long().argsort(dim=1, stable=True)[:, : max(counts)]
        share = shares(into, self.size)
        metric = None if self.metric is None else gather(averaged(self.metric, into, share), order)
        states = gather(averaged(self.states, into, share), order)
        return Bag(states, self.width, metric, gather(summed(self.size, into), order), gather(self.slot, order), counts)

    def in_view(self, view: TokenView) -> Merged:
        """The tokens written back to their columns of the view."""
        # Padding is written to a spare last slot.
        slot = torch.where(self.valid, self.slot, view.valid.shape[1])
        keep = torch.zeros_like(pad(view.valid, (0, 1))).scatter(1, slot, True)
        hidden = pad(view.with_additions(view.hidden), (0, 0, 0, 1))
        hidden = hidden.scatter(1, slot[..., None].expand_as(self.states), self.states.to(hidden.dtype))
        size = torch.ones_like(keep, dtype=self.size.dtype).scatter(1, slot, self.size)
        return Merged(hidden[:, :-1], view.index, size[:, :-1], keep[:, :-1])


def partners(
    metric: Float[Tensor, "B n K"],
    valid: Bool[Tensor, "B n"] | None,
    remove: Sequence[int],
    penalty: Float[Tensor, "B n"] | None = None,
    protected: int = 0,
) -> Int[Tensor, "B n"]:
    """For each token the number of the token into which it is merged: its own, or that of the most similar odd one.

    Args:
        metric: the states that are compared, by cosine.
        valid: which entries hold a token; None if all do.
        remove: tokens that are merged away in each row; at most the unprotected even tokens of the row.
        penalty: subtracted from the similarity of even tokens when those to be merged are chosen.
        protected: tokens at the front that are never merged away.
    """
    number = torch.arange(metric.shape[1], device=metric.device)
    into = number.repeat(len(metric), 1)
    if not any(remove):
        return into
    unit = directions(metric)
    even, odd = unit[:, ::2], unit[:, 1::2].transpose(1, 2)
    # In blocks of rows, so that the matrix of all pairs never exists at once.
    cosines = (settled(even[:, start : start + BLOCK] @ odd) for start in range(0, even.shape[1], BLOCK))
    is_padding = None if valid is None else ~valid
    nearest = [
        (near if is_padding is None else near.masked_fill_(is_padding[:, None, 1::2], -torch.inf)).max(dim=-1)
        for near in cosines
    ]
    score, partner = (joined([part[i] for part in nearest]) for i in (0, 1))
    # The penalty decides which tokens are merged, not into which.
    if penalty is not None:
        score = score - penalty[:, ::2]
    if is_padding is not None:
        score = score.masked_fill(is_padding[:, ::2], -torch.inf)
    if protected:
        score[:, : (protected + 1) // 2] = -torch.inf
    order = score.argsort(dim=1, descending=True, stable=True)
    # A number that all rows share need not be copied to the device.
    count = remove[0] if len(set(remove)) == 1 else to_device(remove, order.device)[:, None]
    is_first = (number[: order.shape[1]] < count).expand_as(order)
    merges, evens = torch.empty_like(order, dtype=torch.bool).scatter_(1, order, is_first), into[:, ::2]
    torch.where(merges, number[1::2][partner], evens, out=evens)
    return into


def summed(x: Float[Tensor, "B n *D"], into: Int[Tensor, "B n"]) -> Float[Tensor, "B n *D"]:
    """For each token the sum of the values merged into it."""
    return add_up(x, into, x.shape[1])


def shares(into: Int[Tensor, "B n"], weight: Float[Tensor, "B n"]) -> Float[Tensor, "B n"]:
    """Each token's share of the weight of all that are merged into the same one."""
    return weight / summed(weight, into).gather(1, into)


def averaged(
    x: Float[Tensor, "B n *D"], into: Int[Tensor, "B n"], share: Float[Tensor, "B n"]
) -> Float[Tensor, "B n *D"]:
    """For each token the mean, weighted by `shares`, of the values merged into it; zero for tokens merged away."""
    return summed(x * share.view(*share.shape, *(1,) * (x.dim() - 2)), into)


def evens_first(into: Int[Tensor, "B n"], count: int) -> Int[Tensor, "B m"]:
    """The numbers of the `count` remaining tokens, even ones before odd ones: the order after the published step."""
    number = torch.arange(into.shape[1], device=into.device)
    rank = (number % 2).masked_fill(into != number, 2)
    return rank.argsort(dim=1, stable=True)[:, :count]


def no_clip(option: str) -> str:
    """The message that `option` needs CLIP's vision encoder."""
    return f"{option} merges inside CLIP's blocks, which this model does not have; leave the option out."


def inside_encoder(
    view: TokenView,
    budget: Int[Tensor, " B"],
    option: str,
    run: Callable[[ClipEncoder, Int[Tensor, " b"], int], tuple[Tensor, Tensor, Tensor]],
) -> Merged:
    """Merge tokens inside the encoder, and put the result into the first entries of each image.

    Args:
        view: at layer 0.
        budget: tokens to keep in each image.
        option: the option that selects this, as written; for messages.
        run: returns states (b, n, D), sizes and raster indices of the n remaining tokens of the images b.

    Raises:
        UnsupportedModelError: the view is of a deeper layer, or the encoder is not CLIP's.
    """
    if view.layer:
        message = f"{option} encodes the image anew, so it can act at layer 0 only (is {view.layer}); leave it out."
        raise UnsupportedModelError(message)
    if not isinstance(view.encoder, ClipEncoder):
        raise UnsupportedModelError(no_clip(option))
    hidden, index, counts = view.hidden.clone(), view.index.clone(), budget.tolist()
    size = torch.ones_like(index, dtype=torch.float32)
    # All images with the same budget run together; budgets differ only where a row has several images.
    for count in sorted(set(counts) - {0, *view.sizes}):
        images = to_device([image for image, n in enumerate(counts) if n == count], index.device)
        states, sizes, raster = run(view.encoder, images, count)
        hidden[images, :count] = states.to(hidden.device, hidden.dtype)
        size[images, :count] = sizes.to(size.device, size.dtype)
        index[images, :count] = raster.to(index.device)
    # Never more than are present, and padding comes last.
    keep = torch.arange(index.shape[1], device=index.device) < to_device(budget, index.device)[:, None]
    return Merged(hidden, index, size, keep)
