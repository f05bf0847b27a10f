"""FastV: keep the tokens that the last prompt token attended to in the layer before."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lmms_prune.methods.base import ScoreMethod
from lmms_prune.methods.view import TokenView


class FastV(ScoreMethod):
    """Keeps the visual tokens with the highest attention from the last prompt token in the layer before.

    The score is the mean over query heads of the softmax over all keys; it is not renormalised over the image.
    Needs a layer before it, so it acts at layer 1 or deeper.

    Paper: https://arxiv.org/abs/2403.06764.
    Differs from the reference:
        - the one attention row is recomputed (float32 softmax and mean) where the cached reference runs the layer twice
          and caches its keys twice
        - kept tokens stay in order
        - generated tokens never prune.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.06764"

    def score(self, view: TokenView) -> Float[Tensor, "B V"]:
        return view.attention(view.last)[:, :, 0].mean(dim=1)
