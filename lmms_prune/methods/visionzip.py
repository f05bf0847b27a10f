"""VisionZip: dominant tokens as they are, and contextual tokens into which the rest is merged.

Worked example on LLaVA: N = 4 of six patches v0 to v5, contextual=32, features of one number.

    saliency   v0 .1    v1 .9    v2 .2    v3 .1    v4 .3    v5 .2
    key        v0 0°    v1 45°   v2 10°   v3 90°   v4 80°   v5 60°
    feature    v0 1     v1 2     v2 4     v3 8     v4 16    v5 32

C = 4·32/64 = 2 tokens are contextual and D = 2 dominant: the class token and v1. The rest is v0 v2 v3 v4 v5. Of these
every ⌊5/2⌋ = 2nd is a target, until there are C: v0 and v3. v2 has the more similar key in v0, v4 and v5 in v3. With
merge=sum, v0 becomes 1 + 4/1 = 5 and v3 becomes 8 + (16 + 32)/2 = 32.
The class token takes the lowest raster index that is neither dominant nor a target: 2.
Order: class token (at 2), v1, v0, v3. Raster indices: 2 1 0 3. Features before the projector: class token, 2, 5, 32.
"""

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
from lmms_prune.models.tensors import to_device


@dataclass(frozen=True)
class _Roles:
    """Which tokens are dominant, which are targets, and the columns of the targets, followed by arbitrary ones."""

    dominant: Bool[Tensor, "B V"]
    target: Bool[Tensor, "B V"]
    columns: Int[Tensor, "B T"]


@dataclass(frozen=True)
class VisionZip(Method):
    """Keeps the tokens that the vision encoder attends to most, and merges the others into evenly spaced targets.

    N = D + C. Dominant: LLaVA's class token itself and the D-1 patches with its highest attention. Contextual: of the
    rest, in raster order, the first C of every ⌊rest/C⌋-th are targets; each other token is merged into the target with
    the most similar key (cosine, mean over heads), before the projector. Order: class token, dominant, contextual, the
    latter two in raster order (Qwen: all in raster order). A target has its own position, the class token the
    lowest one that no kept patch has.

    Args:
        contextual: contextual tokens of each 64 kept, rounded half to even; 0 merges nothing. -1 is as published:
            LLaVA 10 of each 64 (162+30, 108+20, 54+10), Qwen ⌊N/14⌋ and at least one (D = 0.65 n, C = 0.05 n).
        merge: how a target is computed: "sum", as in the reference, itself plus the mean of the tokens merged into it;
            "mean", as in the paper, the mean over itself and all of these.

    Paper: https://arxiv.org/abs/2412.04467.
    Differs from the reference:
        - similarities and merging in float32
        - ties go to the lower index
        - Qwen's encoders have no class token: D tokens by the attention they receive in the last block, keys after rotation,
          merging after the merger.
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
        # The class token is one of the D dominant tokens.
        patches = (budget - targets - class_tokens).clamp(min=0)
        dominant = highest(view.ranking(view.of_image(view.encoder.saliency())), view.valid, patches)
        rest = view.valid & ~dominant
        step = (torch.tensor(view.counts) - patches) // targets.clamp(min=1)
        step, targets, total = to_device(torch.stack([step.clamp(min=1), targets, budget]), rest.device)[..., None]
        # Every step-th of the rest, in raster order, until there are C targets.
        rest_rank = rest.cumsum(1) - 1
        target = rest & (rest_rank % step == 0) & (rest_rank // step < targets)
        columns = target.long().argsort(dim=1, descending=True, stable=True)[:, :most]
        view.carry = _Roles(dominant, target, columns)
        # The class token needs an entry too: that of the lowest raster index which is neither dominant nor a target.
        missing = total[:, 0] - (dominant | target).sum(1)
        # Before the decoder all tokens are present, so columns are raster indices.
        return dominant | target | highest(-view.index.float(), rest & ~target, missing)

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        roles = view.carried(_Roles)
        dominant, target, columns = roles.dominant, roles.target, roles.columns
        encoder, device = view.encoder, view.valid.device
        features = view.with_additions(encoder.features().to(device))
        features = features.to(torch.promote_types(features.dtype, torch.float32))
        merged = self._merged(view, features, view.valid & ~dominant & ~target, target, columns)
        column = torch.arange(keep.shape[1], device=device)
        index, class_tokens = view.index, encoder.shape.class_tokens
        # Sort keys: the class token -1, dominant tokens 0 … V-1, targets V … 2V-1, all others 3V.
        # Without a class token dominant tokens and targets share one raster order.
        offset = len(column) if class_tokens else 0
        sort_key = torch.where(dominant, column, torch.where(target, offset + column, 3 * len(column)))
        if class_tokens:
            class_state = encoder.class_output(encoder.shape.selected).to(merged)
            merged = torch.cat([class_state[:, None], merged], dim=1)
            # The class token takes the one kept index that is neither dominant nor a target. A budget without dominant
            # tokens has no such index: then the class token comes last and is dropped.
            for_class = keep & ~dominant & ~target
            first = torch.where(for_class.any(1), -1, 3 * len(column))
            sort_key = torch.cat([first[:, None], sort_key], dim=1)
            index = torch.cat([for_class.long().argmax(1, keepdim=True), index], dim=1)
        order = sort_key.argsort(dim=1, stable=True)[:, : keep.shape[1]]
        # The r-th token of this order goes to the r-th kept entry.
        order = order.gather(1, (keep.cumsum(1) - 1).clamp(min=0))
        tokens = encoder.project(merged.gather(1, order[..., None].expand(-1, -1, merged.shape[2])))
        return tokens.to(device), index.gather(1, order)

    def _targets(self, count: int, class_tokens: int) -> int:
        """C, the number of contextual tokens, for N = `count` kept tokens."""
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
        """`features` with the targets merged.

        Args:
            view: whose encoder's keys decide.
            features: of all tokens.
            others: tokens that are merged into a target.
            target: the targets.
            columns: the columns of each image's targets, followed by arbitrary ones.
        """
        if not columns.shape[1]:
            return features
        keys = view.encoder.keys(view.encoder.shape.selected).to(features.device)
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        keys = torch.nn.functional.normalize(keys, dim=-1)
        target_keys, target_features = gather(keys, columns).transpose(1, 2), gather(features, columns)
        total, count = torch.zeros_like(target_features), torch.zeros_like(target_features[..., :1])
        # In blocks of rows, so that the cosines of all tokens with all targets never exist at once.
        for start in range(0, features.shape[1], BLOCK):
            piece = slice(start, start + BLOCK)
            cosine = (keys[:, piece] @ target_keys).masked_fill(~target.gather(1, columns)[:, None], -torch.inf)
            # A product with zeros and ones adds up in the same order every time, where scattering does not.
            joins = torch.nn.functional.one_hot(cosine.argmax(2), columns.shape[1]) * others[:, piece, None]
            joins = joins.to(features.dtype).transpose(1, 2)
            total, count = total + joins @ features[:, piece], count + joins.sum(2, keepdim=True)
        if self.merge == "mean":
            merged = (target_features + total) / (1 + count)
        else:
            merged = target_features + total / count.clamp(min=1)
        merged = torch.zeros_like(features).scatter(1, columns[..., None].expand_as(merged), merged)
        return torch.where(target[..., None], merged, features)
