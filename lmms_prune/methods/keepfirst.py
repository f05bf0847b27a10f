"""KeepFirst: the control for a bias towards early positions."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from lmms_prune.methods.base import ScoreMethod
from lmms_prune.methods.view import TokenView


class KeepFirst(ScoreMethod):
    """Keeps the first visual tokens of the sequence: the top of the image.

    Attention scores of a causal decoder favour positions; a method that does no better than this only has that bias.

    Paper: https://arxiv.org/abs/2512.07580 (the finding that simple baselines must be in every table).
    Differs from the paper: a control of this project, not a method of the paper.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2512.07580"

    def score(self, view: TokenView) -> Float[Tensor, "B V"]:
        column = torch.arange(view.valid.shape[1], device=view.valid.device)
        return -column.float().expand(view.valid.shape)
