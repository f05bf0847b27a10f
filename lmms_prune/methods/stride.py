"""Stride: the control that reads no signal and keeps tokens at even distances."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lmms_prune.methods.base import Method
from lmms_prune.methods.view import TokenView
from lmms_prune.models.tensors import to_device


class Stride(Method):
    """Keeps N visual tokens at even distances along the sequence.

    Of n tokens, those at ⌊(2k+1)n / 2N⌋ for k = 0 … N−1 are kept: the middle of each of N equal stretches.

    Paper: https://arxiv.org/abs/2512.07580 (the finding that simple baselines must be in every table).
    Differs from the paper: a control of this project, not a method of the paper.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2512.07580"

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        count = to_device(budget, view.valid.device)[:, None]
        k = torch.arange(view.valid.shape[1], device=count.device)
        entry = (2 * k + 1) * view.valid.sum(1, keepdim=True) // (2 * count).clamp(min=1)
        # Stretches beyond the budget are marked in a spare last column.
        entry = torch.where(k < count, entry, len(k))
        marked = torch.zeros(len(count), len(k) + 1, dtype=torch.bool, device=count.device)
        return marked.scatter(1, entry, True)[:, :-1]
