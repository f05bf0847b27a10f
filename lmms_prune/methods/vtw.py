"""VTW (visual tokens withdrawal): drop all visual tokens at a layer."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lmms_prune.methods.base import Method
from lmms_prune.methods.view import TokenView


class VTW(Method):
    """Drops every visual token; only text and generated tokens remain.

    Paper: https://arxiv.org/abs/2405.05803.
    Differs from the reference:
        - the layer is always set by the schedule; its search is not part of the method.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2405.05803"

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        return torch.zeros_like(view.valid)
