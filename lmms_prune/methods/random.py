"""Random: the control that, deep in the decoder, is as good as any method."""

from __future__ import annotations

from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from lmms_prune.methods.base import ScoreMethod
from lmms_prune.methods.view import TokenView


class Random(ScoreMethod):
    """Keeps a uniform sample, without replacement, of the visual tokens still present.

    Paper: https://arxiv.org/abs/2512.07580 (the hybrids' deep stage).
    Differs from the reference:
        - seeded per sample and layer, where the authors' scripts draw unseeded
        - draws among the tokens present, where the scripts draw among the number requested from the stage before.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2512.07580"

    def score(self, view: TokenView) -> Float[Tensor, "B V"]:
        return view.uniform()
