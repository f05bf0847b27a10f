"""FitPrune's search: how many visual tokens each layer can drop before its attention changes too much.

Paper: https://arxiv.org/abs/2409.10197. Dimension letters: B rows (one), L sequence, D hidden, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from itertools import count as numbers
from math import ceil, floor, log2
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lmms_prune.calibration.cost import LayerCost, saving
from lmms_prune.calibration.data import SearchError
from lmms_prune.methods.fitprune import measures
from lmms_prune.methods.shared.tensors import gather
from lmms_prune.methods.view import LayerInput
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.layout import Layout
from lmms_prune.pruning.ragged import attention_mask, gather_rotary
from lmms_prune.schedule import Schedule, Stage

_STEP = 0.01  # resolution of alpha
_ALPHAS = 1 + ceil(log2(1 / _STEP))  # how many are tried: the largest, and those of the bisection
_FINE = 10_000  # shares have four decimals

Decide = Callable[[int, Tensor, Tensor], Tensor]
"""Chooses the kept visual tokens, from the layer and its two measures of every token still present."""


@dataclass(frozen=True)
class FoundDeletions:
    """The result of FitPrune's search.

    Args:
        schedule: the schedule to run.
        alpha: the share of a layer's attention that may be lost.
        reduction: the share of the FLOPs saved with `alpha`, averaged over the samples, as the search counts FLOPs.
        schedule_reduction: the share that `schedule` actually saves. It is smaller: deletions are rounded down, and the
            schedule drops before the next layer what the search drops inside a layer.
        deletions: visual tokens deleted in each layer; if images differ in size, shares of the original tokens.
    """

    schedule: Schedule
    alpha: float
    reduction: float
    schedule_reduction: float
    deletions: list[int] | list[float]


@dataclass(frozen=True)
class CapturedPrompt:
    """The input of layer 0 of one prompt.

    Args:
        inputs: the model inputs that the layout of visual tokens is read from.
        state: hidden states and rotary tables at layer 0.
        size: visual tokens of the image.
        additions: what the decoder adds to them after its first layers, layer by layer.
    """

    inputs: dict[str, Any]
    state: LayerInput
    size: int
    additions: Sequence[Tensor] = ()


@torch.no_grad()
def search_fitprune(
    model: Any,
    prompts: Sequence[Mapping[str, Any]],
    *,
    reduction: float,
    report: Callable[[str], None] = lambda line: None,
    counted: Callable[[int, int], None] = lambda done, total: None,
) -> FoundDeletions:
    """Find the deletions that save a share of the visual tokens' FLOPs and keep the most of every layer's attention.

    Finds the smallest alpha (by bisection, to 0.01) that saves enough on average over the prompts. At each layer a token
    is deleted if it belongs to two sets: the tokens least attended to by the text, and those least attended to by the
    image. Each set is chosen so that 1 - alpha of the layer's unpruned attention remains. As in the reference's code, both
    sets are one token smaller than the largest possible, and a prompt loses no more tokens once those already deleted save
    enough. If all images have the same number of tokens, a layer's deletions are the mean over the prompts, rounded down.
    Otherwise the shares are averaged, and rounded down to four decimals.

    Args:
        model: a loaded checkpoint.
        prompts: model inputs, each of one row with one image.
        reduction: the share of the visual tokens' FLOPs (`LayerCost`) to save. Attention is counted for the tokens that
            enter a layer, the MLP for those that remain after the layer's deletions.
        report: called with a line for each alpha that is tried.
        counted: called with the number of prompts that were run, and that will be, each once for every alpha.

    Raises:
        SearchError: no alpha saves as much.
    """
    if not 0 < reduction < 1:
        raise SearchError(f"--reduction {100 * reduction:g} must lie between 0 and 100 percent.")
    parts = ModelParts.of(model)
    cost, captured = LayerCost.of(parts), [capture(parts, prompt) for prompt in prompts]
    unpruned = [unpruned_totals(parts, prompt) for prompt in captured]

    ended = numbers(1)

    def run(alpha: float) -> tuple[list[list[int]], float]:
        deleted = []
        for prompt, totals in zip(captured, unpruned, strict=True):
            deleted.append(delete(parts, prompt, totals, alpha, reduction, cost))
            counted(next(ended), _ALPHAS * len(captured))
        saved = fmean(saving(cost, p.size, counts) for p, counts in zip(captured, deleted, strict=True))
        report(f"alpha {alpha:.4f}: {saved:.1%} saved")
        return deleted, saved

    low, high = 0.0, 1.0
    deleted, saved = run(high)
    if saved < reduction:
        raise SearchError(f"--reduction {100 * reduction:g}: of this model at most {100 * saved:.1f} % can be saved.")
    while high - low > _STEP:
        middle = (low + high) / 2
        tried, share = run(middle)
        if share >= reduction:
            high, deleted, saved = middle, tried, share
        else:
            low = middle
    fixed, sizes = parts.family.tokens_per_image(parts.config), [prompt.size for prompt in captured]
    schedule, deletions = average_schedule(deleted, sizes, fixed)
    pruned_cost = [sum(map(cost.layer, schedule.layer_counts(len(parts.layers), [n]))) for n in sizes]
    full_cost = [len(parts.layers) * cost.layer(n) for n in sizes]
    share = fmean(pruned / full for pruned, full in zip(pruned_cost, full_cost, strict=True))
    return FoundDeletions(schedule, high, saved, 1 - share, deletions)


def average_schedule(
    deleted: Sequence[Sequence[int]], sizes: Sequence[int], fixed: int | None
) -> tuple[Schedule, list[int] | list[float]]:
    """The schedule of the mean deletions, and the mean deletions themselves, one per layer.

    Args:
        deleted: for each prompt, the tokens deleted in each layer.
        sizes: for each prompt, its image's tokens.
        fixed: tokens of every image; None if images differ in size, and shares are averaged.
    """
    unit = fixed or _FINE
    means = [
        floor(sum(Fraction(count * unit, size) for count, size in zip(layer, sizes, strict=True)) / len(sizes))
        for layer in zip(*deleted, strict=True)
    ]
    stages, kept = [], unit
    # Deletions in the last layer act only after the decoder, so no stage can express them.
    for layer, count in enumerate(means[:-1], 1):
        kept -= count
        if count:
            stages.append(Stage("fitprune", layer, kept if fixed else Decimal(kept) / _FINE))
    return Schedule(tuple(stages)), means if fixed else [count / _FINE for count in means]


def fit(measure: Float[Tensor, " V"], remains: float) -> Bool[Tensor, " V"]:
    """The tokens to keep: the highest of `measure`, so that their sum is at least `remains`, and one more.

    The extra token is the reference's.
    """
    order = measure.argsort(descending=True, stable=True)
    sums = torch.nn.functional.pad(measure[order].cpu().double().cumsum(0), (1, 0))
    count = int((sums < remains).sum()) + 1
    return torch.zeros_like(measure, dtype=torch.bool).index_fill(0, order[:count], True)


def delete(
    parts: ModelParts,
    prompt: CapturedPrompt,
    totals: Sequence[tuple[float, float]],
    alpha: float,
    reduction: float,
    cost: LayerCost,
) -> list[int]:
    """The number of visual tokens that one prompt loses in each layer.

    Args:
        parts: the model.
        prompt: the input of layer 0.
        totals: the unpruned sums of each layer's two measures.
        alpha: the share of them that may be lost.
        reduction: the saving after which nothing more is deleted.
        cost: the cost of a layer.
    """
    lost = [0] * len(parts.layers)

    def decide(layer: int, cross: Tensor, within: Tensor) -> Tensor:
        if saving(cost, prompt.size, lost) >= reduction:
            return torch.ones_like(cross, dtype=torch.bool)
        remains = [(1 - alpha) * total for total in totals[layer]]
        keep = fit(cross, remains[0]) | fit(within, remains[1])
        lost[layer] = len(keep) - int(keep.sum())
        return keep

    _walk(parts, prompt, decide)
    return lost


def capture(parts: ModelParts, inputs: Mapping[str, Any]) -> CapturedPrompt:
    """Record the input of layer 0 in an unpruned run of one prompt.

    Raises:
        SearchError: the prompt has no image, or several.
    """
    states: list[LayerInput] = []
    additions: list[Tensor] = []

    def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
        states.append(LayerInput(0, args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"]))

    first = parts.layers[0]
    with hooked([parts.record_additions(additions), first.register_forward_pre_hook(record, with_kwargs=True)]):
        parts.multimodal(**inputs, use_cache=False)
    layout_inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_grid_thw") if name in inputs}
    counts = Layout.of(parts, layout_inputs, None, None).counts
    if len(counts) != 1:
        raise SearchError(f"a sample of the search holds {len(counts)} images; it takes one a prompt.")
    return CapturedPrompt(layout_inputs, states[0], counts[0], additions)


def unpruned_totals(parts: ModelParts, prompt: CapturedPrompt) -> list[tuple[float, float]]:
    """The sums of each layer's two measures over all visual tokens, unpruned."""
    totals: list[tuple[float, float]] = []

    def decide(layer: int, cross: Tensor, within: Tensor) -> Tensor:
        totals.append((float(cross.cpu().double().sum()), float(within.cpu().double().sum())))
        return torch.ones_like(cross, dtype=torch.bool)

    _walk(parts, prompt, decide)
    return totals


def _walk(parts: ModelParts, prompt: CapturedPrompt, decide: Decide) -> None:
    """Run the decoder's layers on one prompt, deleting visual tokens between the layers.

    The paper deletes between a layer's attention and its MLP. Deleting after the MLP gives the same result, because the
    MLP mixes no tokens.
    """
    layout, hidden = Layout.of(parts, prompt.inputs, None, None), prompt.state.hidden
    cos, sin = rotary = prompt.state.rotary
    for layer, module in enumerate(parts.layers):
        state = LayerInput(layer, hidden, rotary)
        cross, within = measures(layout.view(parts, state, state, 0))
        keep = decide(layer, cross[0], within[0])
        mask = attention_mask(layout.present, hidden.shape[1], False, parts.form, hidden.dtype)
        hidden = module(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
        if layer < len(prompt.additions):
            hidden = layout.add(hidden, prompt.additions[layer])
        packing = layout.prune(keep[None], [int(keep.sum())])
        hidden = gather(hidden, packing.index)
        rotary = gather_rotary(cos, layout.origin), gather_rotary(sin, layout.origin)
