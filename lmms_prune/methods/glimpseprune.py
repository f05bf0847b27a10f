"""GlimpsePrune: keep the tokens that a trained selector predicts to be needed for the question."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from os.path import isfile
from typing import Any, ClassVar
from zipfile import BadZipFile

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods.base import Method, highest
from lmms_prune.methods.view import TokenView
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.tensors import to_device


@dataclass(frozen=True)
class GlimpsePrune(Method):
    """Keeps the visual tokens to which a trained importance predictor gives the highest logits.

    The predictor reads the attention of the last prompt token in the layer before and the visual tokens' hidden
    states. Without a keep, every token with a logit above 0 is kept, as published: the count depends on the question. Not
    training-free: it runs only with a selector that was trained for the same checkpoint.

    Args:
        weights: a ``torch.export`` archive (.pt2) of the selector, a module (attention (B, H, V), hidden (B, V, D),
            valid (B, V)) → logits (B, V), exported with B and V dynamic. No default: without it the method refuses.

    Paper: https://arxiv.org/abs/2508.01548.
    Differs from the paper:
        - the selector is an exported program of any content; the published weights have to be exported into it
        - the last prompt token replaces the learned glimpse token, which would have to be appended to the prompt
        - neither could be compared with the published checkpoints.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2508.01548"
    weights: str = ""

    def prepare(self, parts: ModelParts) -> None:
        _load(self.weights, next(parts.decoder.parameters()).device)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        logits = view.ranking(self._logits(view))
        ranked = highest(logits, view.valid, budget)
        # A budget of all tokens means an adaptive keep: the selector decides.
        selected = view.valid & (logits > 0)
        adaptive = to_device(budget == torch.tensor(view.counts), ranked.device)[:, None]
        return torch.where(adaptive, selected, ranked)

    def _logits(self, view: TokenView) -> Float[Tensor, "B V"]:
        attention = view.attention(view.last)[:, :, 0]
        selector = _load(self.weights, view.hidden.device)
        return selector(attention.to(view.hidden.dtype), view.hidden, view.valid)


@lru_cache(maxsize=2)
def _load(weights: str, device: torch.device) -> Any:
    """The exported selector.

    Raises:
        UnsupportedModelError: none is given, or it cannot be read.
    """
    if not weights:
        message = "glimpseprune needs its trained selector, which is not part of this package: give weights=<file.pt2>."
        raise UnsupportedModelError(f"{message} A training-free method that reads the same is fastv.")
    if not isfile(weights):
        raise UnsupportedModelError(f"glimpseprune: weights={weights} is no file; give a torch.export archive (.pt2).")
    try:
        return torch.export.load(weights).module().to(device)
    except (RuntimeError, ValueError, KeyError, OSError, BadZipFile) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        message = f"glimpseprune: weights={weights} is no torch.export archive (.pt2) of a selector: {reason}"
        raise UnsupportedModelError(message) from error
