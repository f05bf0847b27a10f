"""VFlowOpt: keep the tokens that the vision encoder's few global tokens attend to, and merge the rest cell by cell."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from math import log
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.shared.tensors import add_up
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import MOST, Encoder, Signals
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device


@dataclass(frozen=True)
class _Groups:
    """Importance of the tokens, those that are merged, the most important of these in each cell, and each token's cell."""

    importance: Float[Tensor, "B V"]
    low: Bool[Tensor, "B V"]
    leads: Bool[Tensor, "B V"]
    cell: Int[Tensor, "B V"]


@dataclass(frozen=True)
class _Importance:
    """Importance of all original tokens for the options `t` and `alpha`."""

    t: float
    alpha: float
    tokens: Float[Tensor, "B N"]


@dataclass(frozen=True)
class VFlowOpt(Method):
    """Keeps the tokens that the encoder's most attended tokens attend to; before the decoder it merges the others.

    Importance is the mean attention row, in the block whose output the decoder is given, of the global tokens: those
    whose received attention exceeds t times the mean of all. At layer 0 the least important tokens are merged until N
    remain: those in one m×m cell of the grid become their mean, weighted by importance, at the position of the most
    important. At deeper layers the least important are dropped. Presets ``vflowopt-50``, ``vflowopt-25`` and
    ``vflowopt-10`` were tuned for LLaVA-OneVision, whose decoder depth and encoder are different.

    Args:
        t: a higher threshold gives fewer global tokens; if there is none, the most attended token is used.
        m: side of a cell, in tokens; larger cells merge the unimportant tokens into fewer tokens.
        alpha: adds alpha times the softmax of the entropy (bits) of each token's pixels to the importance.

    Paper: https://arxiv.org/abs/2508.05211.
    Differs from the reference:
        - it merges round(n-N) + ⌊n/m²⌋ tokens, whatever the number of cells; here as many as leave exactly N (if there are
          more cells than N, the most important ones)
        - the class token's row and column are excluded
        - a Qwen token's attention is the mean over its patches' rows and the sum over their columns
        - the grey value of the pixels (normalised, times 255, cast to bytes with wrap-around, as in the reference) is PIL's.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2508.05211"
    t: float = 28.683
    m: float = 11.757
    alpha: float = 0.0

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.selected}), pixels=self.alpha > 0, grids=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        importance = view.ranking(self._importance(view))
        if view.layer:
            return highest(importance, view.valid, budget)
        host = torch.tensor(view.counts)
        present, goal, excess = to_device(torch.stack([host, budget, host - budget]), importance.device)
        view.carry = groups = _Groups(importance, *self._groups(view, importance, present[:, None], excess[:, None]))
        # Of booleans: valid and not low.
        return highest(importance, (view.valid > groups.low) | groups.leads, goal)

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        if view.layer:
            return view.hidden, view.index
        groups = view.carried(_Groups)
        importance, low, leads, cell = groups.importance, groups.low, groups.leads, groups.cell
        states = view.with_additions(view.hidden)
        hidden = states.to(importance.dtype)
        # Importances that round to 0 still get equal weights, so that a group of them has a mean.
        weight = torch.where(low, importance.clamp(min=torch.finfo(importance.dtype).tiny), 0)
        spare = hidden.shape[1] + 1
        total = add_up(weight, cell, spare).gather(1, cell)
        share = weight / total.clamp(min=torch.finfo(total.dtype).tiny)
        means = add_up(hidden * share[..., None], cell, spare).gather(1, cell[..., None].expand_as(hidden))
        return torch.where(leads[..., None], means.to(states.dtype), states), view.index

    def _importance(self, view: TokenView) -> Float[Tensor, "B V"]:
        """Importance of the tokens present; computed once per prefill, because it is the same at every stage."""
        earlier = view.remembered(_Importance)
        if earlier is None or (earlier.t, earlier.alpha) != (self.t, self.alpha):
            encoder = view.encoder
            tokens = _attention_of_global_tokens(encoder, self.t)
            if self.alpha > 0:
                tokens = tokens + self.alpha * _entropies(encoder).to(tokens)
            earlier = _Importance(self.t, self.alpha, encoder.of_view(tokens))
            view.remember(earlier)
        return view.of_image(earlier.tokens)

    def _groups(
        self,
        view: TokenView,
        importance: Float[Tensor, "B V"],
        present: Int[Tensor, "B 1"],
        excess: Int[Tensor, "B 1"],
    ) -> tuple[Bool[Tensor, "B V"], Bool[Tensor, "B V"], Int[Tensor, "B V"]]:
        """The tokens that are merged, the most important of them in each cell, and the cell of each token.

        Args:
            view: of the tokens.
            importance: of each token.
            present: how many tokens each image has.
            excess: how many fewer remain.
        """
        valid, device, spare = view.valid, view.valid.device, view.valid.shape[1]
        # Before the decoder all tokens are present, so columns are raster indices.
        cell = to_device(pad_sequence([_cells(*grid, self.m) for grid in view.grids], True, spare), device)
        order = importance.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = torch.arange(spare, device=device).expand_as(order)
        # The number of less important tokens; of equally important ones, the later counts as less important.
        below = present - 1 - torch.empty_like(order).scatter_(1, order, rank)
        ends = torch.full((len(valid), spare + 1), spare, device=device)
        first = ends.scatter_reduce(1, cell, below, "amin").gather(1, cell) == below
        # One token of each cell remains, so every further merged token makes the image smaller by one. `saved` counts
        # how many tokens merging all less important ones saves; merging continues until that is enough.
        place, saves = below.clamp(min=0), (valid > first).long()
        saved = torch.zeros_like(order).scatter_(1, place, saves).cumsum(1).gather(1, place) - saves
        low = valid & (saved < excess)
        tops = torch.full_like(ends, -1).scatter_reduce(1, cell, torch.where(low, below, -1), "amax")
        return low, low & (tops.gather(1, cell) == below), cell


@lru_cache
def _cells(rows: int, columns: int, m: float) -> Int[Tensor, " n"]:
    """The cell of each token of a grid, on the host; m need not be a whole number."""
    row, column = (torch.tensor([int(line / m) for line in range(side)]) for side in (rows, columns))
    return (row[:, None] * (column[-1] + 1) + column).flatten()


def _attention_of_global_tokens(encoder: Encoder, t: float) -> Float[Tensor, "I N"]:
    """The mean attention row of the most attended tokens, for each image of the run, padded with zeros."""
    images, patches = range(len(encoder.grids)), encoder.shape.patches_per_token
    # The head means are kept for the second use, unless they are too large for that.
    kept = list(_pieces(encoder)) if sum(entries**2 for entries in encoder.entries) <= MOST else None
    received = encoder.aligned(_flow(encoder, kept or _pieces(encoder), None), images)
    sizes = to_device([[size] for size in encoder.sizes], received.device)
    # Of booleans: attended enough, and no padding.
    is_global = (received > t * (received.sum(1, keepdim=True) / sizes)) > encoder.padding(received.device)
    # Without a token above the threshold, the most attended one is used; padding, which has 0, comes after all tokens.
    column = torch.arange(received.shape[1], device=received.device)
    is_global |= (column == received.argmax(1, keepdim=True)) > is_global.any(1, keepdim=True)
    weight = is_global.to(received.dtype) / (is_global.sum(1, keepdim=True) * patches)
    weight = weight[encoder.token_numbers(received.device)]
    return encoder.aligned(_flow(encoder, kept or _pieces(encoder), weight), images)


def _pieces(encoder: Encoder) -> Iterator[tuple[Int[Tensor, "S q"], Int[Tensor, "S k"], Float[Tensor, "S q k"]]]:
    """Queries, keys and attention in the selected block, mean over heads."""
    for queries, keys, attention in encoder.attention_chunks(encoder.shape.selected):
        yield queries, keys, attention.mean(1)


def _flow(
    encoder: Encoder, pieces: Iterable[tuple[Tensor, Tensor, Tensor]], weights: Float[Tensor, " n"] | None
) -> Float[Tensor, " n"]:
    """Attention that each token of the run receives: summed over the rows of all tokens, times the weight of each."""
    of_entries: Tensor | None = None
    parts = []
    for queries, keys, attention in pieces:
        if of_entries is None:
            every = attention.new_ones(sum(encoder.sizes)) if weights is None else weights.to(attention.dtype)
            # The class token's row has no weight.
            of_entries = encoder.of_entries(every)
        parts.append((keys, (of_entries[queries][:, None] @ attention).squeeze(1)))
    return encoder.of_tokens(encoder.of_keys(parts)).sum(1)


def _entropies(encoder: Encoder) -> Float[Tensor, "I N"]:
    """The softmax of the tokens' entropies, for each image of the run, padded with zeros."""
    entropy = encoder.aligned(_entropy(encoder.token_pixels()), range(len(encoder.grids)))
    return entropy.masked_fill(encoder.padding(entropy.device), -torch.inf).softmax(1)


def _entropy(pixels: Float[Tensor, "n 3 p"]) -> Float[Tensor, " n"]:
    """Entropy in bits of the grey values of each token's pixels."""
    values = (pixels.to(torch.float32) * 255).long() % 256
    shares = to_device([[19595], [38470], [7471]], values.device)
    grey = ((values * shares).sum(1) + 32768) >> 16
    counts = torch.zeros(len(grey), 256, device=grey.device)
    counts.scatter_add_(1, grey, torch.ones_like(grey, dtype=torch.float32))
    return torch.special.entr(counts / grey.shape[1]).sum(1) / log(2)
