"""Stride: the control that looks at nothing and spreads evenly."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lmms_prune.methods.base import Method
from lmms_prune.methods.view import TokenView


class Stride(Method):
    """Keeps N visual tokens at even distances along the order in which they stand.

    Of n tokens, place ⌊(2k+1)n / 2N⌋ for k = 0 … N−1: the middle of each of N equal stretches.

    Paper: https://arxiv.org/abs/2512.07580 (the finding that simple baselines must be in every table).
    Differs from the paper: a control of this project.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2512.07580"

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        wanted = budget.to(view.valid.device)[:, None]
        k = torch.arange(view.valid.shape[1], device=wanted.device)
        place = (2 * k + 1) * view.valid.sum(1, keepdim=True) // (2 * wanted).clamp(min=1)
        # Stretches beyond the budget are marked on a spare last column.
        place = torch.where(k < wanted, place, len(k))
        marked = torch.zeros(len(wanted), len(k) + 1, dtype=torch.bool, device=wanted.device)
        return marked.scatter(1, place, True)[:, :-1]
