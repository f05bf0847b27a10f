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
from lmms_prune.methods.shared.greedy.searches import run
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
        compared = self.states[..., : self.width] if self.metric is None else self.metric
        step = matched(compared, self.counts, remove)
        states, size, slot = step.merge(self.states, self.size, self.slot)
        metric = None if self.metric is None else step.merge(self.metric, self.size, self.slot)[0]
        counts = tuple(n - r for n, r in zip(self.counts, remove, strict=True))
        return Bag(states, self.width, metric, size, slot, counts)

    def in_view(self, view: TokenView) -> Merged:
        """The tokens written back to their columns of the view."""
        # Padding is written to a spare last slot.
        slot = torch.where(self.valid, self.slot, view.valid.shape[1])
        keep = torch.zeros_like(pad(view.valid, (0, 1))).scatter(1, slot, True)
        hidden = pad(view.with_additions(view.hidden), (0, 0, 0, 1))
        hidden = hidden.scatter(1, slot[..., None].expand_as(self.states), self.states.to(hidden.dtype))
        size = torch.ones_like(keep, dtype=self.size.dtype).scatter(1, slot, self.size)
        return Merged(hidden[:, :-1], view.index, size[:, :-1], keep[:, :-1])


@dataclass(frozen=True)
class Pass:
    """One merging pass.

    Args:
        into: for each token the number of the token into which it is merged: its own, or that of the most similar odd one.
        order: the numbers of the remaining tokens, in their order; behind them, what fills the rows.
    """

    into: Int[Tensor, "B n"]
    order: Int[Tensor, "B m"]

    def merge(
        self, x: Float[Tensor, "B n D"], weight: Float[Tensor, "B n"], slot: Int[Tensor, "B n"]
    ) -> tuple[Float[Tensor, "B m D"], Float[Tensor, "B m"], Int[Tensor, "B m"]]:
        """The weighted mean of what is merged into each remaining token, computed in the weights' type; its weight and slot."""
        return run("merge", x, weight, slot, self.into, self.order)


def matched(
    metric: Float[Tensor, "B n K"],
    counts: Sequence[int],
    remove: Sequence[int],
    *,
    evens_first: bool = False,
    penalty: Float[Tensor, "B n"] | None = None,
    protected: int = 0,
) -> Pass:
    """Choose which even tokens are merged into odd ones: those with the highest cosine to one.

    Args:
        metric: the states that are compared.
        counts: tokens of each row, which come first in it.
        remove: tokens that are merged away in each row; at most the unprotected even tokens of the row.
        evens_first: remaining even tokens come before the odd ones; otherwise the order stays.
        penalty: subtracted from the cosine of even tokens when those to be merged are chosen, not their partners.
        protected: tokens at the front that are never merged away.
    """
    length = metric.shape[1]
    if any(remove):
        is_full = all(count == length for count in counts)
        score, partner = run("nearest", metric, None if is_full else to_device(counts, metric.device))
        score = score if penalty is None else score - penalty[:, ::2]
    else:
        score = metric.new_zeros(metric[:, ::2, 0].shape)
        partner = torch.zeros_like(score, dtype=torch.long)
    return Pass(*run("pairs", score, partner, length, tuple(counts), tuple(remove), evens_first, protected))


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
