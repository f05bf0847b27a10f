"""VisionZip: dominant tokens as they are, and contextual tokens that gather the rest."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.shared.tensors import BLOCK, gather
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape

# Tokens that seek their target at once.


@dataclass(frozen=True)
class VisionZip(Method):
    """Keeps the tokens that the vision encoder attends to most, and merges the others into evenly spaced targets.

    N = D + C. Dominant: LLaVA's class token itself and the D-1 patches with its highest attention. Contextual: of the
    rest, in raster order, the first C of every ⌊rest/C⌋-th are targets; each other token goes to the target with the
    most similar key (cosine, mean over heads), before the projector. Order: class token, dominant, contextual, the latter
    two in raster order (Qwen2.5-VL: all in raster order); a target stands at its own position, the class token at the lowest one that no kept patch has.

    Args:
        contextual: contextual tokens of each 64 kept, rounded half to even; 0 merges nothing. -1 is as published:
            LLaVA 10 of each 64 (162+30, 108+20, 54+10), Qwen2.5-VL ⌊N/14⌋ and at least one (D = 0.65 n, C = 0.05 n).
        merge: what a target becomes: "sum", as the reference has it, itself plus the mean of what goes to it; "mean",
            as the paper says, the mean over itself and all of these.

    Paper: https://arxiv.org/abs/2412.04467.
    Differs from the reference: similarities and merging in float32; ties go to the lower index. Qwen2.5-VL has no class
    token: D tokens by the attention they receive in the last block, keys after rotation, merging after the merger.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.04467"
    contextual: int = -1
    merge: Literal["sum", "mean"] = "sum"

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.selected}), features=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        class_tokens = view.encoder.shape.class_tokens
        targets = torch.tensor([self._targets(n, class_tokens) for n in budget.tolist()])
        most = int(targets.max())
        patches = (budget - targets - class_tokens).clamp(min=0)
        dominant = highest(view.ranking(view.of_image(view.encoder.saliency())), view.valid, patches)
        rest = view.valid & ~dominant
        step = (torch.tensor(view.counts) - patches) // targets.clamp(min=1)
        step, targets = step.to(rest.device)[:, None].clamp(min=1), targets.to(rest.device)[:, None]
        place = rest.cumsum(1) - 1
        target = rest & (place % step == 0) & (place // step < targets)
        columns = target.long().argsort(dim=1, descending=True, stable=True)[:, :most]
        view.memory["visionzip"] = dominant, target, columns
        short = budget.to(rest.device) - (dominant | target).sum(1)
        # All are present before the decoder, so columns are raster indices.
        return dominant | target | highest(-view.index.float(), rest & ~target, short)

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V D"], Int[Tensor, "B V"]]:
        masks = view.memory["visionzip"]
        assert isinstance(masks, tuple)
        dominant, target, columns = masks
        encoder, device = view.encoder, view.valid.device
        features = encoder.features().to(device)
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        merged = self._merged(view, features, view.valid & ~dominant & ~target, target, columns)
        place = torch.arange(keep.shape[1], device=device)
        index, class_tokens = view.index, encoder.shape.class_tokens
        # Without a class token merged tokens stay where they stood among the others.
        later = len(place) if class_tokens else 0
        turn = torch.where(dominant, place, torch.where(target, later + place, 3 * len(place)))
        if class_tokens:
            gathered = encoder.class_output(encoder.shape.selected).to(merged)
            merged = torch.cat([gathered[:, None], merged], dim=1)
            # Only the class token's place is kept for neither of the two; without one it comes last of all.
            lent = keep & ~dominant & ~target
            first = torch.where(lent.any(1), -1, 3 * len(place))
            turn = torch.cat([first[:, None], turn], dim=1)
            index = torch.cat([lent.long().argmax(1, keepdim=True), index], dim=1)
        order = turn.argsort(dim=1, stable=True)[:, : keep.shape[1]]
        # What comes r-th goes to the r-th kept place.
        order = order.gather(1, (keep.cumsum(1) - 1).clamp(min=0))
        tokens = encoder.project(merged.gather(1, order[..., None].expand(-1, -1, merged.shape[2])))
        return tokens.to(device), index.gather(1, order)

    def _targets(self, count: int, class_tokens: int) -> int:
        """C for N."""
        if self.contextual >= 0:
            return round(Fraction(count * self.contextual, 64))
        if class_tokens:
            return round(Fraction(count * 10, 64))
        return min(count, max(1, count // 14))

    def _merged(
        self,
        view: TokenView,
        features: Float[Tensor, "B V C"],
        others: Bool[Tensor, "B V"],
        target: Bool[Tensor, "B V"],
        columns: Int[Tensor, "B T"],
    ) -> Float[Tensor, "B V C"]:
        """`features`, with what the targets become at their places; `columns` are the targets', then arbitrary ones."""
        if not columns.shape[1]:
            return features
        keys = view.encoder.keys(view.encoder.shape.selected).to(features.device)
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        keys = torch.nn.functional.normalize(keys, dim=-1)
        goals, itself = gather(keys, columns).transpose(1, 2), gather(features, columns)
        total, count = torch.zeros_like(itself), torch.zeros_like(itself[..., :1])
        for start in range(0, features.shape[1], BLOCK):
            piece = slice(start, start + BLOCK)
            cosine = (keys[:, piece] @ goals).masked_fill(~target.gather(1, columns)[:, None], -torch.inf)
            # A product with zeros and ones adds up in the same order every time, where scattering does not.
            goes = torch.nn.functional.one_hot(cosine.argmax(2), columns.shape[1]) * others[:, piece, None]
            goes = goes.to(features.dtype).transpose(1, 2)
            total, count = total + goes @ features[:, piece], count + goes.sum(2, keepdim=True)
        mean = self.merge == "mean"
        made = (itself + total) / (1 + count) if mean else itself + total / count.clamp(min=1)
        made = torch.zeros_like(features).scatter(1, columns[..., None].expand_as(made), made)
        return torch.where(target[..., None], made, features)
