"""FitPrune: drop, layer by layer, the tokens that both the text and the image itself attend to least."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lmms_prune.methods.base import ScoreMethod
from lmms_prune.methods.view import Tokens, TokenView


class FitPrune(ScoreMethod):
    """Keeps the visual tokens with the highest product of text-to-image and image-to-image attention in the layer before.

    Both factors come from the attention's maximum over heads: its sum over all text rows after the image, times its
    mean over the rows of the visual tokens present. Published as a few deletions in almost every layer, found offline
    (presets ``fitprune-10`` to ``fitprune-90``: how many percent of the FLOPs they save). Acts at layer 1 or deeper.

    Paper: https://arxiv.org/abs/2409.10197.
    Differs from the reference:
        - it deletes inside layer i, between attention and MLP; here the same tokens are dropped at the input of layer
          i+1, which is the same for all kept tokens, while the dropped ones run through one MLP more
        - scores in float32; without text after the image all are 0
        - ties go to the lower index.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2409.10197"

    def score(self, view: TokenView) -> Float[Tensor, "B V"]:
        cross, within = measures(view)
        return cross * within


def measures(view: TokenView) -> tuple[Float[Tensor, "B V"], Float[Tensor, "B V"]]:
    """Attention from the text and from the image to each visual token in the layer before, maximum over heads.

    Returns:
        the sum over the text tokens after the image, and the mean over the visual tokens present; 0 in the padding.
    """
    counts = view.valid.sum(dim=1, keepdim=True).clamp(min=1)
    return _total(view, view.text), _total(view, view.visual) / counts


def _total(view: TokenView, queries: Tokens) -> Float[Tensor, "B V"]:
    """Sum over `queries` of the head maximum of their attention to each visual token."""
    total = torch.zeros(view.valid.shape, device=view.valid.device)
    for piece, attention in view.attention_chunks(queries):
        rows = queries.valid[:, piece, None].to(attention.device)
        total = total + attention.amax(dim=1).masked_fill(~rows, 0).sum(dim=1)
    return total.masked_fill(~view.valid, 0)
