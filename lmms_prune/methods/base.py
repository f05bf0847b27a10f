"""The contract of a method: a mask over the visual tokens of each image, within a budget.

Dimension letters as in `lmms_prune.view`: B images, V visual tokens, D hidden.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.view import TokenView


@dataclass(frozen=True)
class Method(ABC):
    """Chooses which visual tokens go on. Knows no model, cuts nothing, keeps no state."""

    paper: ClassVar[str]

    @abstractmethod
    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        """Which visual tokens of each image go on.

        Args:
            view: what may be read; left as it was.
            budget: tokens to keep in each image, on the CPU; never more than are present.

        Returns:
            a mask, on the view's device, with exactly `budget` entries set in each row, all of them valid tokens.
        """

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> Float[Tensor, "B V D"]:
        """Hidden states of the visual tokens after this stage; merging and recycling override this."""
        return view.hidden


class ScoreMethod(Method):
    """Keeps the tokens with the highest scores; ties go to the lower raster index."""

    @abstractmethod
    def score(self, view: TokenView) -> Float[Tensor, "B V"]:
        """One finite score a token; what stands in the padding does not matter."""

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        return highest(self.score(view), view.valid, budget)


def highest(
    score: Float[Tensor, "B V"], candidates: Bool[Tensor, "B V"], count: Int[Tensor, " B"]
) -> Bool[Tensor, "B V"]:
    """The `count` candidates of each row with the highest score, ties to the lower index."""
    order = score.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(score.shape[1], device=score.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, rank)
    return (rank < count.to(score.device)[:, None]) & candidates
