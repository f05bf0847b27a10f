"""VTW's search: the first layer at which withdrawing the image hardly changes the next token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lmms_prune.calibration.data import SearchError
from lmms_prune.pruning.hooks import prune
from lmms_prune.schedule import Schedule


@dataclass(frozen=True)
class FoundLayer:
    """The result of VTW's search.

    Args:
        schedule: withdrawal at the layer found; None if no layer's divergence is small enough.
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
    counted: Callable[[int, int], None] = lambda done, total: None,
) -> FoundLayer:
    """Find the smallest layer K with mean KL(p_K || p) ≤ `eta`.

    p is the next token's distribution, p_K the next token's distribution with the image withdrawn at layer K.

    Paper: https://arxiv.org/abs/2405.05803 (direction, start and threshold as in its code).

    Args:
        model: a loaded checkpoint.
        prompts: model inputs, one row each.
        eta: the largest accepted mean divergence, in nats.
        lowest: the first layer tried; all deeper layers are tried too.
        report: called with a line for each layer's divergence.
        counted: called with the number of prompts that were run, and that will be, each once for every layer.

    Raises:
        SearchError: the model has no layer `lowest`, or `eta` is negative.
    """
    layers = model.config.text_config.num_hidden_layers
    if not 0 <= lowest < layers:
        raise SearchError(f"--lowest {lowest} is beyond the model, whose layers are 0 to {layers - 1}.")
    if not eta >= 0:
        raise SearchError(f"--eta {eta} must not be negative.")
    unpruned_logs = [_next_token(model, prompt) for prompt in prompts]
    divergences: dict[int, float] = {}
    runs = (layers - lowest) * len(prompts)
    for layer in range(lowest, layers):
        total = 0.0
        for number, (prompt, unpruned) in enumerate(zip(prompts, unpruned_logs, strict=True), 1):
            with prune(model, f"vtw@{layer}"):
                pruned = _next_token(model, prompt)  # log probabilities
            total += float((pruned.exp() * (pruned - unpruned)).sum())
            counted((layer - lowest) * len(prompts) + number, runs)
        divergences[layer] = total / len(prompts)
        report(f"layer {layer}: divergence {divergences[layer]:.3g}")
    accepted = [layer for layer, divergence in divergences.items() if divergence <= eta]
    return FoundLayer(Schedule.parse(f"vtw@{accepted[0]}") if accepted else None, divergences)


def _next_token(model: Any, prompt: Mapping[str, Any]) -> Float[Tensor, " W"]:
    """Log probabilities of the next token, in float32 or finer."""
    logits = model(**prompt, logits_to_keep=1, use_cache=False).logits[0, -1]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
