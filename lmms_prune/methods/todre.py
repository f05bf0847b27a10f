"""ToDRE: keep the most diverse tokens, and drop the whole image once the text no longer attends to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.base import Method
from lmms_prune.methods.shared.greedy.searches import greedy
from lmms_prune.methods.shared.tensors import directions
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device


@dataclass(frozen=True)
class ToDRE(Method):
    """Stage 1 keeps dissimilar tokens; stage 2, written without a keep, drops an image that the text ignores.

    With a keep, at any layer: start with the token of highest class-token attention in the encoder's selected block, and
    add one by one the token with the smallest sum of cosines to all kept ones (on the layer's input). Without a keep: an
    image is dropped entirely if the attention that the text pays to it in the layer before, mean over heads and text
    tokens, is less than tau. Published as ``todre@0:0.25,todre@28`` (⌊7L/8⌋ of L layers; presets ``todre-25``,
    ``todre-10``).

    Args:
        tau: attention below which stage 2 drops the image; stage 1 does not read it.

    Paper: https://arxiv.org/abs/2505.18757 (version 2: sums of cosines, where version 1 took the farthest point).
    Differs from the paper:
        - attention from the image to the text is 0 under a causal mask and is not computed
        - the pivot's block is the one whose output is projected, as in other methods, not the encoder's last
        - an image with no text after it is kept
        - without a class token (Qwen) the pivot is the token that receives most attention, not a random one
        - at layer 0 stage 2 reads that layer's own attention
        - cosines in float64
        - ties go to the lower index, those of equal tokens too.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2505.18757"
    tau: float = 0.1

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(attention=frozenset({encoder.selected}))

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        # A budget of all tokens means an adaptive keep. (With a given keep, the result for an image that keeps all is
        # ignored by the caller.)
        adaptive = budget == torch.tensor(view.counts, dtype=budget.dtype)
        keep = torch.zeros_like(view.valid) if adaptive.all() else _diverse(view, budget)
        if adaptive.any():
            keeps_image = view.valid & (self._text_attention(view) >= self.tau)[:, None]
            keep = torch.where(to_device(adaptive, keep.device)[:, None], keeps_image, keep)
        return keep

    @staticmethod
    def _text_attention(view: TokenView) -> Float[Tensor, " B"]:
        """Attention that goes to the image, mean over heads and text tokens."""
        text = view.text.valid
        fine = torch.float64 if view.hidden.dtype == torch.float64 else torch.float32
        total = torch.zeros(len(text), dtype=fine, device=text.device)
        for piece, attention in view.attention_chunks(view.text, ahead=view.layer == 0):
            seen = text[:, None, piece, None] & view.valid[:, None, None]
            total = total + torch.where(seen, attention, 0).sum((2, 3)).mean(1)
        view.ranking(total[:, None].expand(view.valid.shape))
        return torch.where(text.any(1), total / text.sum(1).clamp(min=1), torch.inf)


def _diverse(view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
    """The pivot, and the tokens that a greedy search for small sums of cosines adds to it."""
    unit = directions(view.hidden)
    saliency = view.ranking(view.of_image(view.encoder.saliency())).to(unit)
    limit, most = to_device(budget, unit.device), max(budget.tolist(), default=0)
    return greedy("sums", unit, saliency, view.valid, limit, most)
