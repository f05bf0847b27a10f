"""VFlowOpt: keep the tokens that the vision encoder's few global tokens attend to, and merge the rest cell by cell."""

from __future__ import annotations

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.shared.tensors import add_up, to_device
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Encoder, Signals
from lmms_prune.models.shape import EncoderShape


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
        - a Qwen2.5-VL token's attention is the mean over its patches' rows and the sum over their columns
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
        low, leads, _ = self._groups(view, importance, to_device(budget, importance.device))
        return highest(importance, (view.valid & ~low) | leads, budget)

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V D"], Int[Tensor, "B V"]]:
        if view.layer:
            return view.hidden, view.index
        importance = self._importance(view)
        low, leads, cell = self._groups(view, importance, keep.sum(1))
        hidden = view.hidden.to(importance.dtype)
        # Importances that round to 0 still get equal weights, so that a group of them has a mean.
        weight = torch.where(low, importance.clamp(min=torch.finfo(importance.dtype).tiny), 0)
        spare = hidden.shape[1] + 1
        total = add_up(weight, cell, spare).gather(1, cell)
        share = weight / total.clamp(min=torch.finfo(total.dtype).tiny)
        means = add_up(hidden * share[..., None], cell, spare).gather(1, cell[..., None].expand_as(hidden))
        return torch.where(leads[..., None], means.to(view.hidden.dtype), view.hidden), view.index

    def _importance(self, view: TokenView) -> Float[Tensor, "B V"]:
        """Importance of the tokens present; computed once per prefill, because it is the same at every stage."""
        key = f"vflowopt t={self.t} alpha={self.alpha}"
        if key not in view.memory:
            encoder = view.encoder
            images = _attention_of_global_tokens(encoder, self.t)
            if self.alpha > 0:
                pictures = zip(encoder.images(), encoder.grids, images, strict=True)
                images = [x + self.alpha * _entropy(image, *grid).softmax(0).to(x) for image, grid, x in pictures]
            view.memory[key] = pad_sequence([images[i] for i in encoder.owner], batch_first=True)
        importance = view.memory[key]
        assert isinstance(importance, Tensor)
        return view.of_image(importance)

    def _groups(
        self, view: TokenView, importance: Float[Tensor, "B V"], count: Int[Tensor, " B"]
    ) -> tuple[Bool[Tensor, "B V"], Bool[Tensor, "B V"], Int[Tensor, "B V"]]:
        """The tokens that are merged, the most important of them in each cell, and the cell of each token."""
        valid, device, spare = view.valid, view.valid.device, view.valid.shape[1]
        # The cell row (or column) of each grid row; m need not be a whole number.
        line = [int(row / self.m) for row in range(max((max(grid) for grid in view.grids), default=0))]
        lines = to_device(line, device, torch.long)
        width, across = to_device([[c, line[c - 1] + 1] for _, c in view.grids], device).T[..., None]
        index = torch.where(valid, view.index, 0)
        cell = torch.where(valid, lines[index // width] * across + lines[index % width], spare)

        order = importance.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = torch.arange(spare, device=device).expand_as(order)
        # The number of less important tokens; of equally important ones, the later counts as less important.
        below = valid.sum(1, keepdim=True) - 1 - torch.empty_like(order).scatter_(1, order, rank)
        ends = torch.full((len(valid), spare + 1), spare, device=device)
        first = ends.scatter_reduce(1, cell, below, "amin").gather(1, cell) == below
        # One token of each cell remains, so every further merged token makes the image smaller by one. `saved` counts
        # how many tokens merging all less important ones saves; merging continues until that is enough.
        saved = torch.zeros_like(order).scatter_(1, below.clamp(min=0), (valid & ~first).long()).cumsum(1)
        saved = saved.gather(1, below.clamp(min=0)) - (valid & ~first).long()
        low = valid & (saved < (valid.sum(1) - count)[:, None])
        tops = torch.full_like(ends, -1).scatter_reduce(1, cell, torch.where(low, below, -1), "amax")
        return low, low & (tops.gather(1, cell) == below), cell


def _attention_of_global_tokens(encoder: Encoder, t: float) -> list[Tensor]:
    """The mean attention row of the most attended tokens, for each image of the run."""
    weights, before, patches = [], encoder.shape.class_tokens, encoder.shape.patches_per_token
    for received in _flow(encoder, None):
        is_global = received > t * received.mean()
        # Without a token above the threshold, the most attended one is used.
        is_global |= ~is_global.any() & (torch.arange(len(is_global), device=is_global.device) == received.argmax())
        weight = is_global.to(received.dtype) / (is_global.sum() * patches)
        weights.append(torch.nn.functional.pad(weight.repeat_interleave(patches), (before, 0)))
    return _flow(encoder, weights)


def _flow(encoder: Encoder, weights: list[Tensor] | None) -> list[Tensor]:
    """Attention that each token receives in the selected block, mean over heads.

    Summed over all rows but the class token's, or over all rows with `weights`.
    """
    before, patches, sums = encoder.shape.class_tokens, encoder.shape.patches_per_token, {}
    for image, queries, keys, attention in encoder.attention_chunks(encoder.shape.selected):
        if image not in sums:
            rows, columns = encoder.grids[image]
            sums[image] = attention.new_zeros(before + patches * rows * columns)
        weight = (queries >= before).to(attention.dtype) if weights is None else weights[image][queries]
        sums[image][keys] += weight @ attention.mean(0)
    return [sums[image][before:].unflatten(0, (-1, patches)).sum(-1) for image in range(len(encoder.grids))]


def _entropy(image: Float[Tensor, "3 height width"], rows: int, columns: int) -> Float[Tensor, " n"]:
    """Entropy in bits of the grey values of each token's pixels."""
    high, wide = image.shape[1] // rows, image.shape[2] // columns
    values = (image[:, : rows * high, : columns * wide].to(torch.float32) * 255).long() % 256
    red, green, blue = values
    grey = (19595 * red + 38470 * green + 7471 * blue + 32768) >> 16
    # One row of grey values for each token.
    grey = grey.unflatten(1, (columns, wide)).unflatten(0, (rows, high)).transpose(1, 2).flatten(2).flatten(0, 1)
    counts = torch.zeros(len(grey), 256, device=grey.device).scatter_add(
        1, grey, torch.ones_like(grey, dtype=torch.float32)
    )
    share = counts / grey.shape[1]
    return torch.special.entr(share).sum(1) / log(2)
