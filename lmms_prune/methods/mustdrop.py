"""MustDrop: merge uniform windows inside the vision encoder, then drop tokens that no text token attends to.

Worked example of a deeper stage, six visual tokens v0 to v5, two text tokens a and b, theta_g = theta_i = 0.1. The
attention that the text pays to the image in the layer before (mean over heads):

              v0    v1    v2    v3    v4    v5
    a        .02   .30   .01   .01   .20   .03      sum over the text and the image: 1.00
    b        .02   .20   .10   .02   .08   .01
    sum      .04   .50   .11   .03   .28   .04      a token needs 0.1 · 1.00 = 0.100 in sum, or
    max      .02   .30   .10   .02   .20   .03      0.1 from a single text token, to be kept

v1, v2 and v4 pass. v3 passes neither test, but it has the highest class attention and the key set holds ⌈0.08·6⌉ = 1
token, so it is kept too. Kept: v1 v2 v3 v4. With a keep of 3, the key set v3 comes first, then the tokens with the
largest min(sum / 0.1, max / 0.1): v1 (3.0) and v4 (2.0). Kept: v1 v3 v4.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.view import TokenView
from lmms_prune.models.clip_encoder import ClipEncoder
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device

# Tokens along a window's side, and the tokens that merging one takes away.
_SIDE, _SAVED = 3, 8


@dataclass(frozen=True)
class _Reencoded:
    """Raster indices in the order of the encoder's shorter sequence, its states, and the attention by raster index."""

    order: Int[Tensor, "B N"]
    states: Float[Tensor, "B N D"]
    attention: Float[Tensor, "B N"]


@dataclass(frozen=True)
class _KeySet:
    """The original tokens that no deeper stage drops."""

    tokens: Bool[Tensor, "B N"]


@dataclass(frozen=True)
class MustDrop(Method):
    """Merges uniform 3×3 windows at layer 0; at deeper layers drops tokens that get little attention from the text.

    Layer 0: windows whose nine patches after the encoder's block 0 have a mean pairwise cosine ≥ similarity become their
    mean. The rest of the encoder runs on [windows, most uniform first; other tokens]. The 8 % with the highest class
    attention in the encoder's last block are the key set. Deeper: with B the head mean of text to image attention in the
    layer before, a token outside the key set is dropped if Σ_text B < theta_g·Σ_text,image B and max_text B < theta_i.

    With a keep N, layer 0 merges the ⌊(n-N)/8⌋ most uniform windows and then drops the tokens with the lowest class
    attention until N are kept. Deeper stages keep the key set, then the tokens with the highest
    min(Σ_text B / theta_g·Σ, max_text B / theta_i).

    Generated tokens do not see the tokens that deeper stages drop, in earlier layers either: from the layer before the
    first such stage on, caches are cropped to the tokens that the last one keeps. Published as
    ``mustdrop@0,mustdrop@3,mustdrop@7,mustdrop@11,mustdrop@15`` (presets ``mustdrop-192``, -128, -64).

    Args:
        theta_g: deeper than layer 0: share of all attention below which a token may be dropped.
        theta_i: deeper than layer 0: attention of a single text token below which it may be dropped.
        similarity: at layer 0: mean cosine from which a window is merged.

    Paper: https://arxiv.org/abs/2411.10803.
    Differs from the reference:
        - each image merges as many windows as it has, not the batch's minimum
        - rows and columns beyond whole windows are not merged
        - a merged window has its middle token's position
        - without a stage at layer 0 the key set is that of the unmerged encoder
        - an image with no text after it loses no tokens
        - the encoder runs in full first, and once more on the windows
        - Qwen's encoders have no class token and cannot run on merged windows: the merger's outputs are averaged, and
          received attention (mean over the window) replaces the class token's.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2411.10803"
    theta_g: float = 0.001
    theta_i: float = 0.001
    similarity: float = 0.8

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.depth - 1}), outputs=frozenset({0}))

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        # A budget of all tokens means an adaptive keep. (With a given keep, the result for an image that keeps all is
        # ignored by the caller.)
        adaptive = to_device(budget == torch.tensor(view.counts, dtype=budget.dtype), view.valid.device)
        if view.layer == 0:
            return self._merge(view, budget, adaptive)
        attention_sum, attention_max = _text_attention(view)
        view.ranking(attention_sum)
        key_set = view.of_image(_key_set(view)) & view.valid
        total = attention_sum.sum(1, keepdim=True)
        # The published rule: a token survives if the text as a whole, or any single text token, attends to it.
        above = (attention_sum >= self.theta_g * total) | (attention_max >= self.theta_i) | key_set
        # For a given keep: how many times a token exceeds both thresholds, so that the order agrees with the rule.
        # Thresholds and sums may be 0; the smallest normal number keeps the quotients finite.
        tiny = torch.finfo(attention_sum.dtype).tiny
        score = torch.minimum(
            attention_sum / (self.theta_g * total).clamp(min=tiny), attention_max / max(self.theta_i, tiny)
        )
        # The key set comes first, whatever its score.
        count, key_count = to_device(budget, attention_sum.device), key_set.sum(1)
        others = highest(score, view.valid & ~key_set, (count - key_count).clamp(min=0))
        ranked = highest(score, key_set, count) | others
        return torch.where(adaptive[:, None], above & view.valid, ranked)

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        """At layer 0 the merged windows and the other tokens, encoded anew, in the encoder's order."""
        if view.layer:
            return view.hidden, view.index
        encoded = view.carried(_Reencoded)
        order, states, attention = encoded.order, encoded.states, encoded.attention
        # An image that keeps every token has no merged window, whatever the threshold would have merged.
        kept = keep.sum(1)
        keeps_all = kept == to_device(view.counts, kept.device)
        key_set = highest(attention, keep, _eight_percent(kept))
        view.remember(_KeySet(torch.where(keeps_all[:, None], _unmerged_keys(view), key_set)))
        # The kept entries of the encoder's sequence, in its order, go to the kept columns one after the other.
        kept_first = keep.gather(1, order).long().argsort(dim=1, descending=True, stable=True)
        entry = kept_first.gather(1, (keep.cumsum(1) - 1).clamp(min=0))
        rows = torch.arange(len(keep), device=keep.device)[:, None]
        return states[rows, entry], order.gather(1, entry)

    def _merge(self, view: TokenView, budget: Int[Tensor, " B"], adaptive: Bool[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        """Choose the windows, run the encoder on the shorter sequence, and drop the tokens that exceed the budget."""
        patches = view.encoder.output(0).to(view.valid.device)
        members, exists = _windows(view)
        uniformity = _uniformity(patches, members)
        # A merged window takes away eight tokens: with a keep, merge as many windows as fit above it.
        most = (torch.tensor(view.counts) - budget).clamp(min=0) // _SAVED
        by_threshold = exists & (uniformity >= self.similarity)
        merged = torch.where(adaptive[:, None], by_threshold, highest(uniformity, exists, most))
        order, length = _order(view.valid, members, merged, uniformity)
        if isinstance(view.encoder, ClipEncoder):
            states, attention = _run_on(view.encoder, _averaged(patches, members, merged), order, length)
        else:
            # This encoder cannot run on merged windows, so its outputs are averaged instead.
            received = view.encoder.received(view.encoder.shape.depth - 1).to(order.device)
            states, attention = (
                _averaged(x, members, merged) for x in (view.with_additions(view.hidden), received[..., None])
            )
            rows = torch.arange(len(order), device=order.device)[:, None]
            states, attention = states[rows, order], attention[rows, order, 0]
        # Back from the encoder's order to raster indices. A merged window is represented by its middle token.
        unmerged = torch.arange(order.shape[1], device=order.device) < length[:, None]
        candidates = torch.zeros_like(view.valid).scatter(1, order, unmerged)
        attention = torch.zeros_like(attention).scatter(1, order, attention)
        view.carry = _Reencoded(order, states.to(view.hidden), attention)
        count = torch.where(adaptive, length, to_device(budget, adaptive.device))
        return highest(view.ranking(attention), candidates, count)


def _eight_percent(count: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """⌈0.08·count⌉."""
    return (2 * count + 24) // 25


def _key_set(view: TokenView) -> Bool[Tensor, "B N"]:
    """The original tokens that no mustdrop stage drops, found by the first stage of a prefill."""
    if (earlier := view.remembered(_KeySet)) is not None:
        return earlier.tokens
    keys = _unmerged_keys(view)
    view.remember(_KeySet(keys))
    return keys


def _unmerged_keys(view: TokenView) -> Bool[Tensor, "B N"]:
    """The key set of the encoder without merged windows."""
    encoder = view.encoder
    last = encoder.shape.depth - 1
    attention = encoder.saliency(last)
    valid = view.original.valid
    return highest(attention.to(valid.device), valid, _eight_percent(torch.tensor(view.sizes)))


def _text_attention(view: TokenView) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B V"]]:
    """Sum and maximum over the text tokens of the attention that each visual token gets, mean over heads."""
    zero = torch.zeros_like(view.hidden[..., 0], dtype=torch.promote_types(view.hidden.dtype, torch.float32))
    total, largest = zero, zero
    # In pieces, because a long text times a large image does not fit into memory at once.
    for piece, attention in view.attention_chunks(view.text):
        both_real = view.text.valid[:, piece, None] & view.valid[:, None]
        weights = torch.where(both_real, attention.mean(1), 0)
        total, largest = total + weights.sum(1), torch.maximum(largest, weights.amax(1))
    return total, largest


def _windows(view: TokenView) -> tuple[Int[Tensor, "B W 9"], Bool[Tensor, "B W"]]:
    """The raster indices of each whole 3×3 window, row by row, and which windows exist."""
    members = pad_sequence([_members(*grid) for grid in view.grids], True, -1)
    members = to_device(members, view.valid.device)
    return members.clamp(min=0), members[..., 0] >= 0


@lru_cache
def _members(rows: int, columns: int) -> Int[Tensor, "W 9"]:
    """The raster indices of each whole window of a grid, on the host."""
    down, across = rows // _SIDE * _SIDE, columns // _SIDE * _SIDE
    index = torch.arange(rows * columns).view(rows, columns)[:down, :across]
    cells = index.unflatten(1, (-1, _SIDE)).unflatten(0, (-1, _SIDE)) if index.numel() else index.view(0, 0, 0, 0)
    return cells.transpose(1, 2).reshape(-1, _SIDE**2)


def _uniformity(patches: Float[Tensor, "B N C"], members: Int[Tensor, "B W 9"]) -> Float[Tensor, "B W"]:
    """Mean cosine of the 72 ordered pairs of different tokens in each window."""
    fine = patches.to(torch.promote_types(patches.dtype, torch.float32))
    rows = torch.arange(len(fine), device=fine.device)[:, None, None]
    unit = torch.nn.functional.normalize(fine, dim=-1)[rows, members]
    cosine = unit @ unit.transpose(2, 3)
    # A token's cosine with itself is not one of the pairs.
    cosine = cosine - torch.diag_embed(cosine.diagonal(dim1=2, dim2=3))
    return cosine.sum((2, 3)) / 72


def _order(
    valid: Bool[Tensor, "B N"],
    members: Int[Tensor, "B W 9"],
    merged: Bool[Tensor, "B W"],
    uniformity: Float[Tensor, "B W"],
) -> tuple[Int[Tensor, "B N"], Int[Tensor, " B"]]:
    """Raster indices in the order of the encoder's shorter sequence, and its length; tokens merged away come last."""
    best = uniformity.masked_fill(~merged, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(best).scatter_(1, best, torch.arange(best.shape[1], device=best.device).expand_as(best))
    windows, tokens = merged.shape[1], valid.shape[1]
    # Sort keys: merged windows get 0 … W-1, single tokens W + raster index, tokens merged away and padding the largest.
    sort_key = torch.where(valid, windows + torch.arange(tokens, device=valid.device), windows + tokens)
    # Windows that are not merged write to a spare last column.
    sort_key = torch.cat([sort_key, sort_key[:, :1]], dim=1)
    target = torch.where(merged[..., None], members, tokens)
    sort_key = sort_key.scatter(1, target.flatten(1), windows + tokens)
    # The middle token represents its window, so it is taken back from those merged away.
    sort_key = sort_key.scatter(1, target[..., _SIDE * _SIDE // 2], rank)[:, :-1]
    return sort_key.argsort(dim=1, stable=True), valid.sum(1) - _SAVED * merged.sum(1)


def _averaged(
    x: Float[Tensor, "B N C"], members: Int[Tensor, "B W 9"], merged: Bool[Tensor, "B W"]
) -> Float[Tensor, "B N C"]:
    """`x` with each merged window's middle token replaced by the mean of the window."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    means = x.to(torch.promote_types(x.dtype, torch.float32))[rows[..., None], members].mean(2).to(x.dtype)
    # Windows that are not merged write to a spare last column.
    spare = torch.cat([x, x[:, :1]], dim=1)
    return spare.index_put((rows, torch.where(merged, members[..., _SIDE * _SIDE // 2], x.shape[1])), means)[:, :-1]


def _run_on(
    encoder: ClipEncoder, patches: Float[Tensor, "B N C"], order: Int[Tensor, "B N"], length: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N"]]:
    """The encoder's blocks after the first, run on the first `length` patches in `order`.

    Returns:
        the projected features of the selected block, and the class attention in the last block.
    """
    rows, view_device = torch.arange(len(order), device=order.device)[:, None], order.device
    first = encoder.class_output(0)
    x = torch.cat([first[:, None], patches[rows, order].to(first)], dim=1)
    entries, length = torch.arange(x.shape[1], device=x.device), length.to(x.device)
    # Tokens merged away remain as masked padding, so that no shape has to be read back from the device.
    bias = torch.zeros_like(x[..., 0]).masked_fill_(entries > length[:, None], -torch.inf)
    features, attention = x, torch.zeros_like(x[..., 0])
    last, selected = encoder.shape.depth - 1, encoder.shape.selected
    for block in range(1, last + 1):
        if block == last:
            attention = encoder.class_row(block, x, bias)
        # Of the last block nothing else is read, unless its output is projected.
        if block < last or block == selected:
            x = encoder.feed(block, encoder.attend(block, x, bias)[0])
        features = x if block == selected else features
    return encoder.project(features[:, 1:]).to(view_device), attention[:, 1:].to(view_device)
