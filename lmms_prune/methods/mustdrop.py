"""MustDrop: merge alike windows inside the vision encoder, then drop what no text token attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.view import TokenView
from lmms_prune.models.clip_encoder import ClipEncoder
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape

_KEYS, _ORDER, _UNMERGED = "mustdrop keys", "mustdrop order", "mustdrop unmerged keys"
# Tokens along a window's side, and the tokens that merging one takes away.
_SIDE, _SAVED = 3, 8


@dataclass(frozen=True)
class MustDrop(Method):
    """Merges 3×3 windows of alike tokens at layer 0; deeper drops tokens that the text looks at neither in sum nor once.

    Layer 0: windows whose nine patches after the encoder's block 0 have a mean pairwise cosine ≥ similarity become their
    mean, and the rest of the encoder runs on [windows, most alike first; other tokens]. The 8 % with the highest class
    attention in the encoder's last block are the key set. Deeper: with B the head mean of text to image attention in the
    layer before, a token outside the key set goes if Σ_text B < theta_g·Σ_text,image B and max_text B < theta_i.
    Published as ``mustdrop@0,mustdrop@3,mustdrop@7,mustdrop@11,mustdrop@15`` (presets ``mustdrop-192``, -128, -64).
    What the deeper stages drop, generated tokens do not see in the layers before them either: from the layer before the
    first such stage on, caches are cut to what the last one leaves.
    With a keep N, layer 0 merges the ⌊(n-N)/8⌋ most alike windows and drops what exceeds N by class attention; deeper
    stages keep the key set, then the highest min(Σ_text B / theta_g·Σ, max_text B / theta_i).

    Args:
        theta_g: deeper than layer 0: share of all attention below which a token may go.
        theta_i: deeper than layer 0: attention of a single text token below which it may go.
        similarity: at layer 0: mean cosine from which a window is merged.

    Paper: https://arxiv.org/abs/2411.10803.
    Differs from the reference: each image merges as many windows as it has, not the batch's minimum; rows and columns
    beyond whole windows are not merged; a merged window has its middle token's position; without a stage at layer 0 the
    key set is that of the unmerged encoder; no text after the image drops nothing; the encoder runs in full first, and once
    more on the windows. Qwen2.5-VL, whose
    encoder has no class token and cannot run on merged windows: the merger's outputs are averaged, and received attention
    (mean over the window) stands for the class token's.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2411.10803"
    theta_g: float = 0.001
    theta_i: float = 0.001
    similarity: float = 0.8

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.depth - 1}), outputs=frozenset({0}))

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        # A stage with a keep is never asked about an image that keeps all: there the answer does not matter.
        own = (budget == torch.tensor(view.counts, dtype=budget.dtype)).to(view.valid.device)
        if view.layer == 0:
            return self._merge(view, budget, own)
        share, most = _attended(view)
        view.ranking(share)
        protected = view.of_image(_key_set(view)) & view.valid
        total = share.sum(1, keepdim=True)
        stays = (share >= self.theta_g * total) | (most >= self.theta_i) | protected
        tiny = torch.finfo(share.dtype).tiny
        score = torch.minimum(share / (self.theta_g * total).clamp(min=tiny), most / max(self.theta_i, tiny))
        count, first = budget.to(share.device), protected.sum(1)
        ranked = highest(score, protected, count) | highest(
            score, view.valid & ~protected, (count - first).clamp(min=0)
        )
        return torch.where(own[:, None], stays & view.valid, ranked)

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V D"], Int[Tensor, "B V"]]:
        """At layer 0 the merged windows and the other tokens, encoded anew, in the encoder's order."""
        if view.layer:
            return view.hidden, view.index
        handed: Any = view.memory[_ORDER]
        order, states, attention = handed
        # An image that keeps every token has no merged window, whatever its rule would have merged.
        whole = keep.sum(1) == view.valid.sum(1)
        keys = highest(attention, keep, _eight_percent(keep.sum(1)))
        view.memory[_KEYS] = torch.where(whole[:, None], _unmerged_keys(view), keys)
        left = (~keep.gather(1, order)).long().argsort(dim=1, stable=True)
        place = left.gather(1, (keep.cumsum(1) - 1).clamp(min=0))
        rows = torch.arange(len(keep), device=keep.device)[:, None]
        return states[rows, place], order.gather(1, place)

    def _merge(self, view: TokenView, budget: Int[Tensor, " B"], own: Bool[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        """Choose the windows, run the encoder on what is left, and drop what exceeds the budget."""
        patches = view.encoder.output(0).to(view.valid.device)
        members, exists = _windows(view)
        alike = _alike(patches, members)
        room = (view.valid.sum(1) - budget.to(own.device)).clamp(min=0) // _SAVED
        merged = torch.where(own[:, None], exists & (alike >= self.similarity), highest(alike, exists, room))
        order, length = _order(view.valid, members, merged, alike)
        if isinstance(view.encoder, ClipEncoder):
            states, attention = _run_on(view.encoder, _averaged(patches, members, merged), order, length)
        else:
            received = view.encoder.received(view.encoder.shape.depth - 1).to(order.device)
            states, attention = (_averaged(x, members, merged) for x in (view.hidden, received[..., None]))
            rows = torch.arange(len(order), device=order.device)[:, None]
            states, attention = states[rows, order], attention[rows, order, 0]
        left = torch.arange(order.shape[1], device=order.device) < length[:, None]
        goes_on = torch.zeros_like(view.valid).scatter(1, order, left)
        attention = torch.zeros_like(attention).scatter(1, order, attention)
        view.memory[_ORDER] = (order, states.to(view.hidden), attention)
        return highest(view.ranking(attention), goes_on, torch.where(own, length, budget.to(own.device)))


def _eight_percent(count: Int[Tensor, " B"]) -> Int[Tensor, " B"]:
    """⌈0.08·count⌉."""
    return (2 * count + 24) // 25


def _key_set(view: TokenView) -> Bool[Tensor, "B N"]:
    """Over the original tokens: those that no stage of ours drops."""
    if _KEYS in view.memory:
        keys = view.memory[_KEYS]
        assert isinstance(keys, Tensor)
        return keys
    return _unmerged_keys(view)


def _unmerged_keys(view: TokenView) -> Bool[Tensor, "B N"]:
    """Found once a prefill; stages at layer 0 may put others in its place."""
    known = view.memory.get(_UNMERGED)
    if not isinstance(known, Tensor):
        view.memory[_UNMERGED] = known = _find_unmerged_keys(view)
    return known


def _find_unmerged_keys(view: TokenView) -> Bool[Tensor, "B N"]:
    encoder = view.encoder
    last = encoder.shape.depth - 1
    attention = encoder.saliency(last)
    valid = view.original.valid
    return highest(attention.to(valid.device), valid, _eight_percent(valid.sum(1)))


def _attended(view: TokenView) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B V"]]:
    """Sum and maximum over the text tokens of the attention that each visual token gets, mean over heads."""
    zero = torch.zeros_like(view.hidden[..., 0], dtype=torch.promote_types(view.hidden.dtype, torch.float32))
    total, most = zero, zero
    for piece, attention in view.attention_chunks(view.text):
        seen = view.text.valid[:, piece, None] & view.valid[:, None]
        weights = torch.where(seen, attention.mean(1), 0)
        total, most = total + weights.sum(1), torch.maximum(most, weights.amax(1))
    return total, most


def _windows(view: TokenView) -> tuple[Int[Tensor, "B W 9"], Bool[Tensor, "B W"]]:
    """The raster indices of each whole 3×3 window, row by row, and which windows exist."""
    device = view.valid.device
    grid = torch.tensor(view.grids, device=device)
    down, across = (grid // _SIDE)[:, :1], (grid // _SIDE)[:, 1:]
    number = torch.arange(max(r // _SIDE * (c // _SIDE) for r, c in view.grids), device=device)
    exists = number < down * across
    corner = number // across.clamp(min=1) * _SIDE * grid[:, 1:] + number % across.clamp(min=1) * _SIDE
    step = torch.arange(_SIDE, device=device)
    inside = (step[:, None] * grid[:, 1:, None] + step).flatten(1)
    return torch.where(exists[..., None], corner[..., None] + inside[:, None], 0), exists


def _alike(patches: Float[Tensor, "B N C"], members: Int[Tensor, "B W 9"]) -> Float[Tensor, "B W"]:
    """Mean cosine of the 72 ordered pairs of each window."""
    fine = patches.to(torch.promote_types(patches.dtype, torch.float32))
    rows = torch.arange(len(fine), device=fine.device)[:, None, None]
    unit = torch.nn.functional.normalize(fine, dim=-1)[rows, members]
    cosine = unit @ unit.transpose(2, 3)
    cosine = cosine - torch.diag_embed(cosine.diagonal(dim1=2, dim2=3))
    return cosine.sum((2, 3)) / 72


def _order(
    valid: Bool[Tensor, "B N"], members: Int[Tensor, "B W 9"], merged: Bool[Tensor, "B W"], alike: Float[Tensor, "B W"]
) -> tuple[Int[Tensor, "B N"], Int[Tensor, " B"]]:
    """Raster indices in the order that the encoder goes on with, and how many of them do: the rest is merged away."""
    best = alike.masked_fill(~merged, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(best).scatter_(1, best, torch.arange(best.shape[1], device=best.device).expand_as(best))
    windows, tokens = merged.shape[1], valid.shape[1]
    turn = torch.where(valid, windows + torch.arange(tokens, device=valid.device), windows + tokens)
    # What is not merged writes to a spare last column.
    turn = torch.cat([turn, turn[:, :1]], dim=1)
    target = torch.where(merged[..., None], members, tokens)
    turn = turn.scatter(1, target.flatten(1), windows + tokens)
    turn = turn.scatter(1, target[..., _SIDE * _SIDE // 2], rank)[:, :-1]
    return turn.argsort(dim=1, stable=True), valid.sum(1) - _SAVED * merged.sum(1)


def _averaged(
    x: Float[Tensor, "B N C"], members: Int[Tensor, "B W 9"], merged: Bool[Tensor, "B W"]
) -> Float[Tensor, "B N C"]:
    """`x` with the mean of each merged window in the place of its middle token."""
    rows = torch.arange(len(x), device=x.device)[:, None]
    means = x.to(torch.promote_types(x.dtype, torch.float32))[rows[..., None], members].mean(2).to(x.dtype)
    spare = torch.cat([x, x[:, :1]], dim=1)
    return spare.index_put((rows, torch.where(merged, members[..., _SIDE * _SIDE // 2], x.shape[1])), means)[:, :-1]


def _run_on(
    encoder: ClipEncoder, patches: Float[Tensor, "B N C"], order: Int[Tensor, "B N"], length: Int[Tensor, " B"]
) -> tuple[Float[Tensor, "B N D"], Float[Tensor, "B N"]]:
    """The encoder after block 0 on the first `length` patches in `order`: projected, and the last block's class attention."""
    rows, view_device = torch.arange(len(order), device=order.device)[:, None], order.device
    first = encoder.class_output(0)
    x = torch.cat([first[:, None], patches[rows, order].to(first)], dim=1)
    entries, length = torch.arange(x.shape[1], device=x.device), length.to(x.device)
    # What was merged away stays as padding that nobody sees, so that no shape waits for the device.
    bias = torch.zeros(x.shape[:2], device=x.device).masked_fill(entries > length[:, None], -torch.inf)
    features, attention = x, torch.zeros_like(x[..., 0])
    for block in range(1, encoder.shape.depth):
        between, _, weights = encoder.attend(block, x, bias)
        x, attention = encoder.feed(block, between), weights[:, :, 0].mean(1)
        features = x if block == encoder.shape.selected else features
    return encoder.project(features[:, 1:]).to(view_device), attention[:, 1:].to(view_device)
