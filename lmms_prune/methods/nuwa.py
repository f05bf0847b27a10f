"""Nüwa: keep salient tokens from the whole image, each summed with its surroundings; later those the prompt attends to."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import normalize

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import MOST, Signals
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device

_PUBLISHED = 24 * 24  # visual tokens of the images for which the paper states the reach


@dataclass(frozen=True)
class _Saliency:
    """The encoder's attention to the tokens present."""

    score: Float[Tensor, "B V"]


class Nuwa(Method):
    """Before the decoder, keeps the most salient tokens of every 2×2 cell and sums similar, near tokens into them.

    At layer 0 the k tokens of each cell with the highest class-token attention are candidates (the smallest k that gives
    enough), and the N highest are kept. Those below the 0.55 quantile of the kept scores become a sum over all tokens,
    weighted by similarity (mean output of the encoder's last third) and nearness, before they are projected. At a deeper
    layer the method is the published second stage: the N tokens with the highest attention from the last prompt token in the
    layer before. Presets ``nuwa-192``, ``nuwa-128`` and ``nuwa-64``.

    Paper: https://arxiv.org/abs/2602.02951.
    Differs from the reference:
        - k for any N and grid (published: 1, 2, 3 for N = 112, 224, 336)
        - nearness ends at a distance of √(280·h·w/576) in an h×w grid (published: √280 in 24×24)
        - the quantile is found by rank
        - float32
        - text positions by the run's policy ("original" is the published one)
        - Qwen's encoders have no class token and merge before they project: saliency is the attention received in the last
          block, and the merger's outputs are summed.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2602.02951"

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.selected}), outputs=frozenset(_last_third(encoder)), features=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        if view.layer:
            return highest(view.ranking(view.attention(view.last)[:, :, 0].mean(dim=1)), view.valid, budget)
        score = view.ranking(view.of_image(view.encoder.saliency()))
        view.carry, rank = _Saliency(score), _ranks_in_cells(score, view)
        # The smallest k per image that gives enough is the number of those, of 0 … 3, that give too few.
        k = torch.arange(4, device=rank.device)
        candidates = ((rank[..., None] < k) & view.valid[..., None]).sum(dim=1)
        smallest = (candidates < to_device(budget, rank.device)[:, None]).sum(dim=1, keepdim=True)
        return highest(score, view.valid & (rank < smallest), budget)

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        if view.layer:
            return view.hidden, view.index
        alone = _salient(view.carried(_Saliency).score, keep)
        return view.encoder.project(_gathered(view, alone)).to(view.hidden.device), view.index


def _last_third(encoder: EncoderShape) -> range:
    """Blocks whose mean output is compared: CLIP's hidden states 16 to 24, that is the outputs of its blocks 15 to 23."""
    return range(encoder.scaled(15, of=24), encoder.depth)


def _ranks_in_cells(score: Float[Tensor, "B V"], view: TokenView) -> Int[Tensor, "B V"]:
    """The rank of each token within its 2×2 cell (smaller at odd edges), by falling score."""
    width = to_device([columns for _, columns in view.grids], score.device)[:, None]
    row, column = view.index // width, view.index % width
    cell = torch.where(view.valid, row // 2 * ((width + 1) // 2) + column // 2, torch.iinfo(torch.long).max)
    # Sorted by cell, and within a cell by falling score; a rank is then the distance to the cell's first token.
    best_first = score.argsort(dim=1, descending=True, stable=True)
    order = best_first.gather(1, cell.gather(1, best_first).argsort(dim=1, stable=True))
    in_order = cell.gather(1, order)
    number = torch.arange(score.shape[1], device=score.device).expand_as(order)
    begins = torch.ones_like(view.valid)
    begins[:, 1:] = in_order[:, 1:] != in_order[:, :-1]
    first = torch.where(begins, number, 0).cummax(dim=1).values
    return torch.empty_like(order).scatter_(1, order, number - first)


def _salient(score: Float[Tensor, "B V"], keep: Bool[Tensor, "B V"]) -> Bool[Tensor, "B V"]:
    """Kept tokens with at least the 0.55 quantile of the kept scores.

    The interpolated quantile lies between the scores of the ranks below and above 11(N-1)/20. A score is at least the
    quantile exactly if it is at least the upper of the two, and comparing with that needs no rounding.
    """
    count = keep.sum(dim=1, keepdim=True)
    rank = (11 * (count - 1) + 19) // 20
    rising = score.masked_fill(~keep, torch.inf).sort(dim=1).values
    return keep & (score >= rising.gather(1, rank.clamp(min=0)))


def _gathered(view: TokenView, alone: Bool[Tensor, "B V"]) -> Float[Tensor, "B V C"]:
    """The encoder's features; all but those of `alone` are weighted sums over similar and near tokens."""
    encoder = view.encoder
    features = view.with_additions(view.of_image(encoder.features()))
    fine = torch.promote_types(features.dtype, torch.float32)
    # The sum has the direction of the mean.
    total = sum(view.of_image(encoder.output(block)).to(fine) for block in _last_third(encoder.shape))
    assert isinstance(total, Tensor)
    unit, features_fine = normalize(total, dim=-1), features.to(fine)
    width = to_device([columns for _, columns in view.grids], unit.device)[:, None]
    coordinates = torch.stack([view.index // width, view.index % width], dim=-1).to(fine)
    reach = to_device([sqrt(280 * h * w / _PUBLISHED) for h, w in view.grids], unit.device, fine)
    parts, column = [], torch.arange(unit.shape[1], device=unit.device)
    for piece in column.split(max(1, MOST // max(1, unit.shape[0] * unit.shape[1]))):
        similarity = (unit[:, piece] @ unit.transpose(1, 2)).clamp(min=0)
        distance = torch.cdist(coordinates[:, piece], coordinates, compute_mode="donot_use_mm_for_euclid_dist")
        weight = similarity * (1 - (distance / reach[:, None, None]).clamp(max=1))
        weight = weight.masked_fill(~view.valid[:, None] | alone[:, piece, None], 0)
        weight = weight / (weight.sum(dim=-1, keepdim=True) + 1e-8)
        # As in the reference, a token's own weight is set to 1 after the normalisation, so that a row sums to more than 1.
        weight = weight.masked_fill(piece[:, None] == column, 1)
        parts.append(weight @ features_fine)
    return torch.cat(parts, dim=1).to(features.dtype)
