"""VTW's search: the first layer at which withdrawing the image hardly changes the next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lmms_prune.calibration.data import CalibrationError
from lmms_prune.pruning.hooks import prune
from lmms_prune.schedule import Schedule


@dataclass(frozen=True)
class FoundLayer:
    """What the search found.

    Args:
        schedule: withdrawal at the layer that was found, or None where no layer is near enough.
        divergences: the mean divergence at every layer tried.
    """

    schedule: Schedule | None
    divergences: dict[int, float]


@torch.no_grad()
def search_vtw(
    model: Any,
    prompts: Sequence[Mapping[str, Any]],
    *,
    eta: float = 0.003,
    lowest: int = 5,
    report: Callable[[str], None] = lambda line: None,
) -> FoundLayer:
    """The smallest layer K with mean KL(p_K || p) ≤ `eta`.

    p is the next token's distribution, p_K the same with the image withdrawn at layer K.

    Paper: https://arxiv.org/abs/2405.05803 (direction, start and threshold as in its code).

    Args:
        model: a loaded checkpoint.
        prompts: inputs of the model, one row each.
        eta: the mean divergence, in nats, that is small enough.
        lowest: the first layer tried; all deeper ones are.
        report: is told each layer's divergence.

    Raises:
        CalibrationError: `lowest` is beyond the model, or `eta` negative.
    """
    layers = model.config.text_config.num_hidden_layers
    if not 0 <= lowest < layers:
        raise CalibrationError(f"--lowest {lowest} is beyond the model, whose layers are 0 to {layers - 1}.")
    if not eta >= 0:
        raise CalibrationError(f"--eta {eta} must not be negative.")
    whole = [_next_token(model, prompt) for prompt in prompts]
    divergences: dict[int, float] = {}
    for layer in range(lowest, layers):
        total = 0.0
        for prompt, unpruned in zip(prompts, whole, strict=True):
            with prune(model, f"vtw@{layer}"):
                pruned = _next_token(model, prompt)
            total += float((pruned.exp() * (pruned - unpruned)).sum())
        divergences[layer] = total / len(prompts)
        report(f"layer {layer}: divergence {divergences[layer]:.3g}")
    near = [layer for layer, divergence in divergences.items() if divergence <= eta]
    return FoundLayer(Schedule.parse(f"vtw@{near[0]}") if near else None, divergences)


def _next_token(model: Any, prompt: Mapping[str, Any]) -> Float[Tensor, " W"]:
    """The logarithms of the next token's probabilities, in float32 or finer."""
    logits = model(**prompt, logits_to_keep=1, use_cache=False).logits[0, -1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
