"""The contract of a method: a mask over the visual tokens of each image, within a budget.

Dimension letters as in `lmms_prune.methods.view`: B images, V visual tokens, D hidden, E hidden and additions (DeepStack).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.errors import PruningError
from lmms_prune.methods.view import TokenView
from lmms_prune.models.encoder import Signals
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device


@dataclass(frozen=True)
class Method(ABC):
    """Chooses which visual tokens are kept. Knows no model, removes nothing, keeps no state.

    A method of one's own is a frozen dataclass whose fields are its options (each with a default: a flag, a number or a
    text; ``field(default=…, metadata={"help": …, "low": …, "high": …, "choices": …})`` says more), and whose class
    variables say what a built-in method's row in METHODS says:

    Args:
        paper: URL; may be empty.
        reads: the words of `lmms_prune.methods.spec.READS` for what it reads of the view.
        lowest_layer, highest_layer: where it can act; None is the model's last layer. What reads the layer before acts at 1
            or deeper in any case.
        adaptive: without a keep, the method decides how many tokens are kept.
        at_most: it may keep fewer tokens than its budget.
    """

    paper: ClassVar[str] = ""
    reads: ClassVar[tuple[str, ...]] = ()
    lowest_layer: ClassVar[int] = 0
    highest_layer: ClassVar[int | None] = None
    adaptive: ClassVar[bool] = False
    at_most: ClassVar[bool] = False

    @abstractmethod
    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        """Choose the visual tokens of each image that are kept.

        Args:
            view: the signals that may be read; not changed.
            budget: tokens to keep in each image, on the CPU, by the count rule of the method's row in METHODS; never
                more than are present. All tokens present if the keep is adaptive.

        Returns:
            a mask, on the view's device, with exactly `budget` entries set in each row, all of them valid tokens. A
            method whose row says `at_most`, or a stage with an adaptive keep, may set fewer.
        """

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        """Replace the kept tokens; methods that merge, recycle or reorder override this. By default nothing changes.

        Args:
            view: as in `select`.
            keep: the mask that `select` returned.

        Returns:
            hidden states, and the raster index of the token in each entry (it decides the token's position). Only kept
            entries count; an image may not have an index twice among them. What changes is returned with what the
            decoder will still add to it: `TokenView.with_additions`, merged, recycled or reordered as the states are.
        """
        return view.hidden, view.index

    def prepare(self, parts: ModelParts) -> None:  # noqa: B027  (most methods need nothing)
        """Load and check what the method needs beyond the model itself, before anything runs; by default nothing.

        Raises:
            UnsupportedModelError: it cannot be loaded, or does not fit the model.
        """

    def signals(self, encoder: EncoderShape) -> Signals:
        """What must be recorded of the vision encoder; by default nothing."""
        return Signals()


class ScoreMethod(Method):
    """Keeps the tokens with the highest scores; ties go to the lower raster index."""

    @abstractmethod
    def score(self, view: TokenView) -> Float[Tensor, "B V"]:
        """One finite score per token; padding may hold any value."""

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        score = self.score(view)
        # Checked here, where it is known what came: the same mistake fails deep inside a sort otherwise.
        if not isinstance(score, Tensor) or score.shape != view.valid.shape or not score.is_floating_point():
            raise PruningError(
                f"`score` returned {described(score)}; allowed is a tensor of floats of shape {tuple(view.valid.shape)}: "
                "one score for each image's visual tokens, padding included."
            )
        return highest(view.ranking(score), view.valid, budget)


def described(value: object) -> str:
    """A method's return value, in words: its type, or its dtype and shape."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"a tensor of {str(value.dtype).removeprefix('torch.')} of shape {tuple(value.shape)}"


def highest(
    score: Float[Tensor, "B V"], candidates: Bool[Tensor, "B V"], count: Int[Tensor, " B"]
) -> Bool[Tensor, "B V"]:
    """The `count` candidates of each row with the highest score, ties to the lower index."""
    order = score.masked_fill(~candidates, -torch.inf).argsort(dim=1, descending=True, stable=True)
    is_first = torch.arange(score.shape[1], device=score.device) < to_device(count, score.device)[:, None]
    return torch.empty_like(candidates).scatter_(1, order, is_first) & candidates


def grid_within(rows: int, columns: int, most: int) -> tuple[int, int]:
    """The largest grid of about the shape of `rows` × `columns` with at most `most` cells (at least one).

    One side follows from the other by rounding in proportion; of equally large grids the one nearer to the shape is
    taken. A grid too narrow for that becomes a single line.
    """
    shapes = {(r, max(1, round(r * columns / rows))) for r in range(1, rows + 1)}
    shapes |= {(max(1, round(c * rows / columns)), c) for c in range(1, columns + 1)}
    fitting = [(r, c) for r, c in shapes if r * c <= most and r <= rows and c <= columns]
    if not fitting:
        line = max(1, most)
        return (1, min(line, columns)) if columns >= rows else (min(line, rows), 1)
    # The aspect's error is compared in whole numbers, so that no rounding decides.
    return max(fitting, key=lambda shape: (shape[0] * shape[1], -abs(shape[0] * columns - shape[1] * rows), shape))
