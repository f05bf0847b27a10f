"""PDrop (PyramidDrop): keep the tokens that the last prompt token is about to attend to."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lmms_prune.methods.base import ScoreMethod
from lmms_prune.methods.view import TokenView


class PDrop(ScoreMethod):
    """Keeps the visual tokens with the highest attention from the last prompt token in the stage's own layer.

    The layer's own norm and projections are applied to its input, before anything is pruned: PDrop looks ahead, FastV
    looks back. The score is the mean over query heads of the softmax over all keys. Published as several stages, with
    keeps that shrink by a constant factor (presets ``pdrop-270``, ``pdrop-192``, ``pdrop-128``, ``pdrop-64``).

    Paper: https://arxiv.org/abs/2410.17247.
    Differs from the reference:
        - grouped heads are mapped to their keys
        - counts round half to even where the reference rounds ratios down (presets state the counts)
        - positions by the run's policy (the reference renumbers at each stage).
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.17247"

    def score(self, view: TokenView) -> Float[Tensor, "B V"]:
        return view.attention(view.last, ahead=True)[:, :, 0].mean(dim=1)
