"""HIVTP: keep the best tokens of each quadrant of the image, and the best token of each small window."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device

_SHARE, _SIDE = 0.25, 2


class HIVTP(Method):
    """Keeps a share of each quadrant, then the best remaining token of each small window, by the encoder's middle.

    A token's score is the attention it receives in CLIP's blocks 6, 7 and 8 of 24 (counted from 0), mean over blocks,
    heads and all queries. Without a keep, the published rule: of each quadrant the top 25 %, then of each 2×2 window
    the best token not yet kept. With a keep N: the smallest share of the quadrants that, with one pick per window,
    reaches N; the picks with the lowest scores are dropped. As N must exceed the number of windows, their side doubles
    until it does. Published before the decoder; at deeper layers, quadrants and windows are those of the original grid,
    and shares are of the tokens present.

    Paper: https://arxiv.org/abs/2509.23663.
    Differs from the reference:
        - an exact N (in the reference 145 to 288 of 576, depending on the image)
        - other grids than 24×24: the first half of an odd side is the larger one, windows at the border are smaller,
          shares round down
        - other encoders: the distinct blocks at the same relative depth, which for Qwen2.5-VL are 8, 9 and 10 of 32
        - ties go to the lower index.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2509.23663"

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset(_blocks(encoder)), grids=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        received = [view.encoder.received(block) for block in _blocks(view.encoder.shape)]
        score = view.ranking(view.of_image(torch.stack(received).mean(0)))
        requested, counts = budget.tolist(), list(view.counts)
        # A budget of all tokens means an adaptive keep: the published share.
        sides = [
            _SIDE if n == present else _side(*grid, n)
            for n, present, grid in zip(requested, counts, view.grids, strict=True)
        ]
        count, present, side = to_device([requested, counts, sides], score.device)
        adaptive = (count == present)[:, None]
        row, column, grids = _coordinates(view)
        entry_share = _entry_shares(score, view.valid, _quadrants(row, column, grids))
        window = _windows(row, column, grids, side[:, None])
        share = torch.where(adaptive, _SHARE, _smallest_share(entry_share, window, max(view.sizes), count[:, None]))
        overall = view.valid & (entry_share <= share)
        # Of booleans: valid and not among these.
        local = _best_of_each(score, view.valid > overall, window)
        # With quadrants or windows of unequal sizes the last step of the share may exceed N: the lowest are dropped.
        overall = highest(score, overall, count)
        return overall | highest(score, local, count - overall.sum(1))


def _blocks(encoder: EncoderShape) -> list[int]:
    return sorted({encoder.scaled(block, of=24) for block in (6, 7, 8)})


def _side(rows: int, columns: int, count: int) -> int:
    """The windows' side for an exact count: 2, doubled until there are fewer windows than tokens to keep, or one."""
    side = _SIDE
    while (windows := -(-rows // side) * -(-columns // side)) >= count and windows > 1:
        side *= 2
    return side


def _coordinates(view: TokenView) -> tuple[Int[Tensor, "B V"], Int[Tensor, "B V"], Int[Tensor, "B 2"]]:
    """Row and column of each token, and the sides of the grids."""
    sides = to_device(view.grids, view.valid.device)
    index = torch.where(view.valid, view.index, 0)
    return index // sides[:, 1:], index % sides[:, 1:], sides


def _quadrants(row: Int[Tensor, "B V"], column: Int[Tensor, "B V"], sides: Int[Tensor, "B 2"]) -> Int[Tensor, "B V"]:
    lower, right = 2 * row >= sides[:, :1], 2 * column >= sides[:, 1:]
    return 2 * lower.long() + right.long()


def _windows(
    row: Int[Tensor, "B V"], column: Int[Tensor, "B V"], grids: Int[Tensor, "B 2"], side: Int[Tensor, "B 1"]
) -> Int[Tensor, "B V"]:
    return row // side * ((grids[:, 1:] + side - 1) // side) + column // side


def _entry_shares(
    score: Float[Tensor, "B V"], valid: Bool[Tensor, "B V"], quadrant: Int[Tensor, "B V"]
) -> Float[Tensor, "B V"]:
    """The smallest share at which each token is among the top of its quadrant: (rank + 1) / size; infinite for padding."""
    fine = torch.float32 if score.device.type == "mps" else torch.float64
    members = torch.where(valid, quadrant, 4)
    # Sorted by quadrant, and within one by falling score; a rank is then the distance to the quadrant's first token.
    order = score.argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, members.gather(1, order).argsort(dim=1, stable=True))
    sizes = members.new_zeros(len(members), 5).scatter_add_(1, members, torch.ones_like(members))
    place = torch.arange(1, score.shape[1] + 1, device=score.device).expand(order.shape)
    rank = torch.empty_like(order).scatter_(1, order, place) - (sizes.cumsum(1) - sizes).gather(1, members)
    return torch.where(valid, rank.to(fine) / sizes.gather(1, members), torch.inf)


def _smallest_share(
    entry_share: Float[Tensor, "B V"], window: Int[Tensor, "B V"], windows: int, count: Int[Tensor, "B 1"]
) -> Float[Tensor, "B 1"]:
    """The smallest share at which the quadrants' tokens and one more of each window that is not full reach `count`.

    `windows` is more than the largest number in `window`.
    """
    exists = entry_share.isfinite()
    # A window is full at the share at which its last token is kept; a full window adds no further token.
    full = entry_share.new_full((len(entry_share), windows), -torch.inf)
    full = full.scatter_reduce(1, window, entry_share.masked_fill(~exists, -torch.inf), "amax")
    used = full.isfinite()
    full = full.masked_fill(~used, torch.inf).sort(dim=1).values
    # The candidates are the shares at which some token enters, and 0; sorted, so that counts are searches.
    shares = torch.cat([torch.zeros_like(count, dtype=entry_share.dtype), entry_share.sort(dim=1).values], dim=1)
    tokens = torch.searchsorted(shares[:, 1:].contiguous(), shares, right=True)
    filled = torch.searchsorted(full, shares, right=True)
    enough = tokens + used.sum(1, keepdim=True) - filled >= count
    return shares.masked_fill(~enough, torch.inf).amin(1, keepdim=True)


def _best_of_each(
    score: Float[Tensor, "B V"], candidates: Bool[Tensor, "B V"], window: Int[Tensor, "B V"]
) -> Bool[Tensor, "B V"]:
    """The candidate with the highest score in each window, ties to the lower index."""
    order = score.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, window.gather(1, order).argsort(dim=1, stable=True))
    sorted_window = window.gather(1, order)
    is_first = torch.ones_like(candidates)
    is_first[:, 1:] = sorted_window[:, 1:] != sorted_window[:, :-1]
    return torch.zeros_like(candidates).scatter(1, order, is_first) & candidates
