"""What a method returns, held to its contract at once: a wrong type or shape would otherwise fail far from its cause."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lmms_prune.errors import PruningError
from lmms_prune.methods.base import described
from lmms_prune.methods.view import TokenView
from lmms_prune.pruning.block import Acting
from lmms_prune.pruning.trace import MISCOUNTED


@contextmanager
def reading(acting: Acting, view: TokenView) -> Iterator[None]:
    """Name the stage in the errors of its method, and let a method of one's own read only what its class declares."""
    spec = acting.stage.spec
    try:
        with view.read_by(spec.reads if spec.own else None):
            yield
    except PruningError as error:
        raise PruningError(f"stage {acting.number + 1} ('{acting.stage}'): {error}") from error


def checked_mask(mask: object, view: TokenView) -> Bool[Tensor, "B V"]:
    """The mask that `select` returned.

    Raises:
        PruningError: it is no mask over the view's tokens; says what came and what is allowed.
    """
    wanted = view.valid.shape
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != wanted:
        raise PruningError(
            f"`select` returned {described(mask)}; allowed is a tensor of bool of shape {tuple(wanted)}: for each image, "
            "which of its visual tokens (padding included) are kept."
        )
    return mask.to(view.valid.device)


def checked_rewrite(result: object, view: TokenView) -> tuple[Tensor, Int[Tensor, "B V"]]:
    """The states and raster indices that `rewrite` returned.

    Raises:
        PruningError: they are not of the view's tokens; says what came and what is allowed.
    """
    shape = tuple(view.valid.shape)
    if not isinstance(result, tuple) or len(result) != 2:
        raise PruningError(
            f"`rewrite` returned {described(result)}; allowed is a pair: hidden states and raster indices."
        )
    states, index = result
    if not isinstance(states, Tensor) or states.shape[:-1] != shape or not states.is_floating_point():
        raise PruningError(
            f"`rewrite` returned {described(states)} as hidden states; allowed are floats of shape {(*shape, 'D')}, as "
            "`view.hidden`."
        )
    if not isinstance(index, Tensor) or index.shape != shape or index.dtype != view.index.dtype:
        raise PruningError(
            f"`rewrite` returned {described(index)} as raster indices; allowed is a tensor of int64 of shape {shape}, as "
            "`view.index`."
        )
    return states, index


def miscounted(acting: Acting, keep: Bool[Tensor, "B V"], planned: Int[Tensor, " B"]) -> str:
    """How the mask of a stage misses its budgets."""
    pairs = zip(keep.sum(1).tolist(), planned.tolist(), strict=True)
    wrong = [(marked, budget) for marked, budget in pairs if marked != budget][:8]
    came, allowed = (", ".join(map(str, numbers)) for numbers in zip(*wrong, strict=True))
    return f"{MISCOUNTED} {_select_of(acting)} marked {came} tokens of an image; its budget allows exactly {allowed}."


def marked_padding(acting: Acting, keep: Bool[Tensor, "B V"], view: TokenView) -> str:
    """How many tokens the mask of a stage marks that are not there."""
    extra = ", ".join(str(n) for n in (keep & ~view.valid).sum(1).tolist() if n)
    return f"{MISCOUNTED} {_select_of(acting)} marked padding, {extra} entries of an image; allowed are those of `view.valid`."


def _select_of(acting: Acting) -> str:
    return f"In stage {acting.number + 1} ('{acting.stage}') `select`"
