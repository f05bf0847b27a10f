"""VScan: before the decoder, half of the tokens by a deep and half by a shallow map, with all others merged into them.

Worked example: N = 4 of six patches v0 to v5 in a 2×3 grid, which is a single window; features of one number.

    shallow    v0 .1    v1 .3    v2 .2    v3 .1    v4 .2    v5 .1
    deep       v0 .5    v1 .9    v2 .1    v3 .1    v4 .3    v5 .2
    direction  v0 0°    v1 90°   v2 20°   v3 80°   v4 40°   v5 30°

⌊4/2⌋ = 2 local tokens are the highest of the window in the shallow map: v1, and v2 before v4, which ties. The other 2 are the
highest of the deep map that are not local: v0 and v4. Kept: v0 v1 v2 v4. Nearest to v3 is v1, and to v5 v2 (10° as to v4,
and the lower index). With features 1 2 4 8 16 32: v1 becomes (2 + 8)/2 = 5 and v2 becomes (4 + 32)/2 = 18.
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
from lmms_prune.methods.shared.tensors import BLOCK, add_up, directions, gather, settled
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device

_NO_WINDOW = 2**31
"""The window of padding: greater than all others."""


@dataclass(frozen=True)
class _Kept:
    """At most so many tokens are kept in an image."""

    most: int


@dataclass(frozen=True)
class VScan(Method):
    """Before the decoder, keeps tokens of a shallow map in every window, then of a deep map, and merges all others.

    At layer 0, with a class token: maps are its attention in CLIP's blocks 5 and 22 (head mean). Each 6×6 window keeps the
    ⌊⌊N/2⌋/windows⌋ tokens with the highest shallow attention; the deep map's highest of the others fill up to N. Without
    one: maps are the attention received in blocks 7 and 31. The ⌊N/2⌋ tokens with the highest shallow attention, at most
    ⌈⌊N/2⌋/windows⌉ in each 4×4 window, and the deep map's highest. Every dropped token is averaged, all members equally,
    into the kept one with the most similar input of the decoder (cosine).

    At a deeper layer, the published second stage: the highest attention of the last prompt token in this layer (head mean).

    Args:
        rope: at a deeper layer: whether queries and keys are rotated, as in the code for LLaVA; that for Qwen2.5-VL does not.

    Paper: https://arxiv.org/abs/2505.22654. Presets ``vscan-64`` (published), ``vscan-128``, ``vscan-192`` (the same shares),
    and for Qwen2.5-VL ``vscan-11pct`` and ``vscan-50pct``.
    Differs from the reference:
        - N is exact: with windows, what ⌊N/2⌋ does not divide goes to the deep map (the reference keeps fewer, unless ⌊N/2⌋
          is a multiple of the windows, as in the presets)
        - ratios are of the original tokens, and rounded (the code for Qwen2.5-VL truncates, of those that are present)
        - a grid that is not whole windows: the last of a direction is larger, and there is at least one
        - Qwen2.5-VL's keys are rotated once (its FlashAttention path rotates twice)
        - positions by the run's policy (published: LLaVA compact, Qwen2.5-VL original)
        - maps, similarity and averages in float32 or finer
        - ties go to the lower index.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2505.22654"
    rope: bool = True

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({_shallow_block(encoder), encoder.selected}), grids=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        if view.layer:
            attention = view.attention(view.last, ahead=True, rotated=self.rope)
            return highest(view.ranking(attention[:, :, 0].mean(dim=1)), view.valid, budget)
        encoder, valid, requested = view.encoder, view.valid, budget.tolist()
        shape, device = encoder.shape, valid.device
        # Before the decoder all tokens are present, so columns are raster indices.
        shallow = view.ranking(encoder.saliency(_shallow_block(shape)).to(device))
        deep = view.ranking(encoder.saliency(shape.selected).to(device))
        side = 6 if shape.class_tokens else 4
        grids = [_windows(rows, columns, side) for rows, columns in view.grids]
        window = to_device(pad_sequence([each for each, _ in grids], True, _NO_WINDOW), device)
        # Whole shares of the windows, or a limit that they must not exceed.
        halves = [(n // 2, windows) for n, (_, windows) in zip(requested, grids, strict=True)]
        share = [half // windows if shape.class_tokens else -(-half // windows) for half, windows in halves]
        count, local, share_of = to_device([requested, [half for half, _ in halves], share], device)
        is_local = valid & (_rank_within(window, shallow) < share_of[:, None])
        if not shape.class_tokens:
            is_local = highest(shallow, is_local, local)
        view.carry = _Kept(max([1, *requested]))
        return is_local | highest(deep, valid & ~is_local, count - is_local.sum(1))

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        if view.layer:
            return view.hidden, view.index
        features = view.with_additions(view.hidden).to(torch.promote_types(view.hidden.dtype, torch.float32))
        column = torch.arange(keep.shape[1], device=keep.device)
        # Kept tokens and padding remain where they are.
        into = torch.where(view.valid & ~keep, _nearest_kept(view, keep), column)
        members = add_up(torch.cat([features, torch.ones_like(features[..., :1])], dim=2), into, keep.shape[1])
        return (members[..., :-1] / members[..., -1:].clamp(min=1)).to(view.hidden.dtype), view.index


def _shallow_block(encoder: EncoderShape) -> int:
    return encoder.scaled(5, of=24) if encoder.class_tokens else encoder.scaled(7, of=32)


@lru_cache
def _windows(rows: int, columns: int, side: int) -> tuple[Int[Tensor, " n"], int]:
    """The window of each token of a grid, on the host, and the number of windows."""
    down, across = max(1, rows // side), max(1, columns // side)
    row = (torch.arange(rows) // side).clamp(max=down - 1)
    column = (torch.arange(columns) // side).clamp(max=across - 1)
    return (row[:, None] * across + column).flatten(), down * across


def _rank_within(window: Int[Tensor, "B V"], score: Float[Tensor, "B V"]) -> Int[Tensor, "B V"]:
    """The rank of each token within its window, by falling score, ties by index."""
    # Sorted by window, and within a window by falling score; a rank is then the distance to the window's first token.
    best_first = score.argsort(dim=1, descending=True, stable=True)
    order = best_first.gather(1, window.gather(1, best_first).argsort(dim=1, stable=True))
    in_order = window.gather(1, order)
    number = torch.arange(score.shape[1], device=score.device)
    begins = torch.nn.functional.pad(in_order[:, 1:] != in_order[:, :-1], (1, 0))
    first = torch.where(begins, number, 0).cummax(dim=1).values
    return torch.empty_like(order).scatter_(1, order, number - first)


def _nearest_kept(view: TokenView, keep: Bool[Tensor, "B V"]) -> Int[Tensor, "B V"]:
    """The column of the kept token with the highest cosine to each token; equal ones go to the lowest."""
    unit, most = directions(view.hidden), view.carried(_Kept).most
    columns = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    kept, is_kept = gather(unit, columns).transpose(1, 2), keep.gather(1, columns)[:, None]
    # In blocks of rows, so that the cosines of all tokens with all kept ones never exist at once.
    nearest = [
        settled(unit[:, start : start + BLOCK] @ kept).masked_fill_(~is_kept, -torch.inf).argmax(2)
        for start in range(0, unit.shape[1], BLOCK)
    ]
    return columns.gather(1, torch.cat(nearest, dim=1))
