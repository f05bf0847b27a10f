"""PruMerge and PruMerge+: keep the outliers of the class token's attention, and merge similar tokens into each.

Worked example: PruMerge with a keep of N = 3 of six patches v0 to v5, features of one number; for the example, the two
most similar tokens are merged instead of 32.

    attention  v0 .10   v1 .50   v2 .02   v3 .20   v4 .04   v5 .10
    key        v0 0°    v1 40°   v2 50°   v3 90°   v4 85°   v5 10°
    feature    v0 1     v1 2     v2 4     v3 8     v4 16    v5 32

The N - 1 = 2 tokens with the highest attention are v1 and v3; v0, v2, v4 and v5 are dropped. Most similar to v1 are v2 and
v5: 2 + .02·4 + .10·32 = 5.28. Most similar to v3 are v4 and v2: 8 + .04·16 + .02·4 = 8.72. The summary token is the sum
over all that are dropped: .10·1 + .02·4 + .04·16 + .10·32 = 4.02; its raster index is the highest that is dropped, 5.
Order: v1, v3, summary. Raster indices: 1 3 5. Features before the projector: 5.28, 8.72, 4.02.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.shared.tensors import BLOCK, directions, gather, settled
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device

_NEAREST = 32
"""How many of the most similar tokens are merged into a kept one."""


@dataclass(frozen=True)
class _Decided:
    """What `select` has decided.

    Args:
        attention: of all tokens.
        listed: all tokens: the kept ones in their order, then the dropped ones, then padding.
        count: how many are kept, without the summary token.
        last: the last column that is dropped, at which the summary token stands; -1 if none is.
        most: at most so many tokens are kept in an image, known on the host.
    """

    attention: Float[Tensor, "B V"]
    listed: Int[Tensor, "B V"]
    count: Int[Tensor, "B 1"]
    last: Int[Tensor, "B 1"]
    most: int


@dataclass(frozen=True)
class PruMerge(Method):
    """Keeps the tokens whose class-token attention is an outlier, adds similar tokens to each, and one sum of the dropped.

    Attention and keys are those of the encoder's last block (CLIP's 23), as one head of full width. Without a keep, the K
    outliers exceed Q3 + 1.5·(Q3 - Q1) of the attention; PruMerge+ adds every ⌊⌊n/K⌋/3⌋-th token of the raster. Each kept
    token becomes itself plus the attention-weighted sum of the 32 tokens with the most similar keys; the last token is
    such a sum over all dropped ones. Then they are projected. Order: by falling attention, the raster's, the sum.

    With a keep N: PruMerge keeps the N - 1 highest and the sum (N = 73 is the published 1/8); PruMerge+ the ⌊(N-1)/4⌋
    highest (at least one), the rest of the N - 1 evenly spaced over the others, and the sum. The latter is our choice.

    Args:
        variant: "plus" is PruMerge+, "plain" is PruMerge.
        order: of the kept tokens: "reference", or "raster".
        no_class: an encoder without a class token (Qwen's), for which the method is not defined: "refuse", or, as a
            choice of ours, "received": attention received in the last block, tokens and keys after the 2×2 merge.

    Paper: https://arxiv.org/abs/2403.15388.
    Differs from the reference:
        - every image has its own K (the reference pools a batch's)
        - no outlier: the sum alone (the reference fails)
        - where all tokens are kept there is no sum, which would be zero
        - a sum has a raster index, the highest that is dropped
        - the spatial tokens of 1/8 are not repeated
        - attention and similarity in float32 or finer
        - ties go to the lower index, those of similarity in the order of the kept tokens, then of the dropped ones.
    Differs from the paper: sums are not averages, and kept tokens too are added to others (both as in the reference).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.15388"
    variant: Literal["plus", "plain"] = "plus"
    order: Literal["reference", "raster"] = "reference"
    no_class: Literal["refuse", "received"] = "refuse"

    def prepare(self, parts: ModelParts) -> None:
        if not parts.encoder_shape.class_tokens and self.no_class == "refuse":
            raise UnsupportedModelError(
                f"prumerge reads the attention of a class token, which {parts.family.title}'s vision encoder has not. "
                "Use a model whose encoder has one (CLIP's), or no_class=received (received attention instead: our choice, not the paper's)."
            )

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({_block(encoder)}), features=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        # Before the decoder all tokens are present, so columns are raster indices.
        attention, valid = view.ranking(_attention(view).to(view.valid.device)), view.valid
        requested, counts = budget.tolist(), list(view.counts)
        # A budget of all tokens means an adaptive keep; with a given keep, the result for such an image is ignored.
        adaptive = [n == count for n, count in zip(requested, counts, strict=True)]
        best = [self._by_attention(n - 1) for n in requested]
        best_count, decides, size = to_device([best, adaptive, counts], attention.device)
        top = highest(attention, valid, best_count)
        even = _evenly(valid & ~top, [n - 1 - k for n, k in zip(requested, best, strict=True)], best, counts)
        if any(adaptive):
            decides, size = decides[:, None] > 0, size[:, None]
            top = torch.where(decides, _outliers(attention, valid, size), top)
            own = _regular(top, valid, size) if self.variant == "plus" else torch.zeros_like(top)
            even = torch.where(decides, own, even)
        chosen = top | even
        column = torch.arange(valid.shape[1], device=valid.device)
        last = torch.where(valid & ~chosen, column, -1).amax(1, keepdim=True)
        # Sort keys: those of `top` up to 0, of `even` from 1 on, of dropped tokens and padding beyond V.
        place = torch.where(even, column, column + len(column)).to(attention) + 1
        listed = torch.where(top, -attention, place).argsort(dim=1, stable=True)
        most = max((c if own else n - 1 for c, n, own in zip(counts, requested, adaptive, strict=True)), default=0)
        view.carry = _Decided(attention, listed, chosen.sum(1, keepdim=True), last, max(1, most))
        keep = chosen | (column == last)
        return keep if all(requested) else keep & to_device(budget > 0, keep.device)[:, None]

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        roles, encoder = view.carried(_Decided), view.encoder
        column = torch.arange(keep.shape[1], device=keep.device)
        if self.order == "reference":
            # The r-th listed token goes to the r-th kept column; the summary token comes after them.
            entry = (keep.cumsum(1) - 1).clamp(min=0)
            is_summary = entry == roles.count
            index = torch.where(is_summary, roles.last, roles.listed.gather(1, entry))
        else:
            is_summary, index = column == roles.last, view.index
            entry = torch.empty_like(index).scatter_(1, roles.listed, column.expand_as(index))
        # The summary token is the last row.
        entry = torch.where(is_summary, roles.most, entry.clamp(max=roles.most - 1))
        return encoder.project(gather(_merged(view, roles), entry)).to(keep.device), index

    def _by_attention(self, kept: int) -> int:
        """How many of `kept` tokens, the summary token not counted, are kept by attention; the keep is given."""
        if self.variant == "plain":
            return max(0, kept)
        return min(max(0, kept), max(1, kept // 4))


def _block(encoder: EncoderShape) -> int:
    """The block after the one whose output the decoder is given: CLIP's last."""
    return min(encoder.selected + 1, encoder.depth - 1)


def _attention(view: TokenView) -> Float[Tensor, "B N"]:
    encoder, block = view.encoder, _block(view.encoder.shape)
    if encoder.shape.class_tokens:
        return encoder.class_attention(block, one_head=True)[:, 0]
    # A token's patches are averaged; their sum has the published scale, on which all tokens have at most 1 in sum.
    return encoder.received(block) * encoder.shape.patches_per_token


def _outliers(
    attention: Float[Tensor, "B V"], valid: Bool[Tensor, "B V"], size: Int[Tensor, "B 1"]
) -> Bool[Tensor, "B V"]:
    """Tokens above the third quartile by more than 1.5 interquartile ranges."""
    rising = attention.masked_fill(~valid, torch.inf).sort(dim=1).values

    def quartile(number: int) -> Tensor:
        # At number·(n - 1)/4 of the rising values, linear between the neighbours.
        place = number * (size - 1)
        low, high = (rising.gather(1, ((place + step) // 4).clamp(min=0)) for step in (0, 3))
        return low + (high - low) * (place % 4).to(rising) / 4

    first, third = quartile(1), quartile(3)
    return valid & (attention > third + 1.5 * (third - first))


def _regular(top: Bool[Tensor, "B V"], valid: Bool[Tensor, "B V"], size: Int[Tensor, "B 1"]) -> Bool[Tensor, "B V"]:
    """The grid of PruMerge+ in steps of ⌊⌊n/K⌋/3⌋ over the raster, without the last token and those of `top`."""
    count, column = top.sum(1, keepdim=True), torch.arange(top.shape[1], device=top.device)
    stride = (size // count.clamp(min=1) // 3).clamp(min=1)
    return valid & ~top & (column % stride == 0) & (column < size - 1) & (count > 0)


def _evenly(
    rest: Bool[Tensor, "B V"], counts: Sequence[int], taken: Sequence[int], sizes: Sequence[int]
) -> Bool[Tensor, "B V"]:
    """`counts` tokens of `rest` in each image: of its u tokens, in raster order, the numbers ⌊(2m+1)·u/(2·count)⌋.

    Args:
        rest: tokens to choose from.
        counts: how many of them; may be negative where none.
        taken: how many tokens of the image are not in `rest`.
        sizes: tokens of the image.
    """
    if max(counts, default=0) <= 0:
        return torch.zeros_like(rest)
    numbers = torch.zeros(rest.shape, dtype=torch.bool)
    for row, (count, used, size) in enumerate(zip(counts, taken, sizes, strict=True)):
        numbers[row, [(2 * m + 1) * (size - used) // (2 * count) for m in range(count)]] = True
    return rest & to_device(numbers, rest.device).gather(1, (rest.cumsum(1) - 1).clamp(min=0))


def _merged(view: TokenView, roles: _Decided) -> Float[Tensor, "B M C"]:
    """The first `most` listed tokens with their similar ones added, and the sum of those that are dropped."""
    encoder, device, smallest = view.encoder, roles.listed.device, min(view.counts)
    features = view.with_additions(encoder.features().to(device))
    features = gather(features.to(torch.promote_types(features.dtype, torch.float32)), roles.listed)
    unit = gather(directions(encoder.keys(_block(encoder.shape), one_head=True).to(device)), roles.listed)
    attention = roles.attention.gather(1, roles.listed).to(features)
    number = torch.arange(unit.shape[1], device=device)
    nearest, others = max(1, min(_NEAREST, unit.shape[1] - 1)), unit.transpose(1, 2)
    parts, dropped = [], number >= roles.count
    exists = None
    if smallest < unit.shape[1]:
        # Padding comes last in the list, as in the image.
        exists = view.valid
        dropped = dropped & exists
    # In blocks of rows, so that the cosines of all kept tokens with all others never exist at once.
    for start in range(0, roles.most, BLOCK):
        rows = slice(start, min(start + BLOCK, roles.most))
        cosine = settled(unit[:, rows] @ others)
        cosine.diagonal(start, dim1=1, dim2=2).fill_(-torch.inf)
        if exists is not None:
            cosine.masked_fill_(~exists[:, None], -torch.inf)
        # Of equal cosines at the edge, the first in the list.
        edge = cosine.topk(nearest, dim=2).values[..., -1:]
        above, equal = cosine > edge, cosine == edge
        joins = above | (equal & (equal.cumsum(2) <= nearest - above.sum(2, keepdim=True)))
        if smallest <= _NEAREST:
            joins &= cosine > -torch.inf
        parts.append(features[:, rows] + torch.where(joins, attention[:, None], 0) @ features)
    total = torch.where(dropped, attention, 0)[:, None] @ features
    return torch.cat([*parts, total], dim=1)
