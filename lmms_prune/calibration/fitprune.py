"""FitPrune's search: how many visual tokens each layer can lose before its attention changes too much.

Paper: https://arxiv.org/abs/2409.10197. Dimension letters: B rows (one), L sequence, D hidden, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from math import floor
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lmms_prune.calibration.cost import LayerCost, saving
from lmms_prune.calibration.data import CalibrationError
from lmms_prune.methods.fitprune import measures
from lmms_prune.methods.shared.tensors import gather
from lmms_prune.methods.view import LayerInput
from lmms_prune.models.hooked import hooked
from lmms_prune.models.parts import ModelParts
from lmms_prune.pruning.layout import Layout
from lmms_prune.pruning.ragged import attention_mask, gather_rotary
from lmms_prune.schedule import Schedule, Stage

_STEP = 0.01
_FINE = 10_000

Decide = Callable[[int, Tensor, Tensor], Tensor]
"""Which visual tokens go on, from the layer and its two measures of every token that is present."""


@dataclass(frozen=True)
class FoundDeletions:
    """What the search found.

    Args:
        schedule: what to run.
        alpha: the share of a layer's attention that may be lost.
        reduction: the share of the FLOPs saved with `alpha`, mean over the samples, as the search counts them.
        schedule_reduction: the share that `schedule` really saves: deletions are rounded down, and what goes inside a
            layer there goes before the next one here.
        deletions: visual tokens that go in each layer; where images differ in size, the share of the original ones.
    """

    schedule: Schedule
    alpha: float
    reduction: float
    schedule_reduction: float
    deletions: list[int] | list[float]


@dataclass(frozen=True)
class CapturedPrompt:
    """The input of layer 0 of one prompt, and what its layout is read from."""

    inputs: dict[str, Any]
    state: LayerInput
    size: int


@torch.no_grad()
def search_fitprune(
    model: Any,
    prompts: Sequence[Mapping[str, Any]],
    *,
    reduction: float,
    report: Callable[[str], None] = lambda line: None,
) -> FoundDeletions:
    """The deletions that save a share of the visual tokens' FLOPs and leave the most of every layer's attention.

    For the smallest alpha (bisected to 0.01) that saves enough on average over the prompts: at each layer a token goes
    if it is among the least attended to by the text, and among those by the image, that together hold less than what
    may be lost, so that 1 - alpha of what the layer holds unpruned remains. As in the reference's code both
    sets are one token smaller than the largest possible, and a prompt loses nothing more once, with the tokens that it
    has then, it saves enough. Where all images have as many tokens, a layer's deletions are the mean over the prompts,
    rounded down; else their shares are averaged, and rounded down to four decimals.

    Args:
        model: a loaded checkpoint.
        prompts: inputs of the model, one row with one image each.
        reduction: the share of the visual tokens' FLOPs (`LayerCost`) to save; attention sees the tokens that enter a
            layer, the MLP those that its deletions leave.
        report: is told each alpha that is tried.

    Raises:
        CalibrationError: no alpha saves as much.
    """
    if not 0 < reduction < 1:
        raise CalibrationError(f"--reduction {100 * reduction:g} must lie between 0 and 100 percent.")
    parts = ModelParts.of(model)
    cost, captured = LayerCost.of(parts), [capture(parts, prompt) for prompt in prompts]
    whole = [unpruned_totals(parts, prompt) for prompt in captured]

    def run(alpha: float) -> tuple[list[list[int]], float]:
        deleted = [
            delete(parts, prompt, totals, alpha, reduction, cost)
            for prompt, totals in zip(captured, whole, strict=True)
        ]
        saved = fmean(saving(cost, p.size, counts) for p, counts in zip(captured, deleted, strict=True))
        report(f"alpha {alpha:.4f}: {saved:.1%} saved")
        return deleted, saved

    low, high = 0.0, 1.0
    deleted, saved = run(high)
    if saved < reduction:
        raise CalibrationError(
            f"--reduction {100 * reduction:g}: of this model at most {100 * saved:.1f} % can be saved."
        )
    while high - low > _STEP:
        middle = (low + high) / 2
        tried, share = run(middle)
        if share >= reduction:
            high, deleted, saved = middle, tried, share
        else:
            low = middle
    fixed, sizes = parts.family.tokens_per_image(parts.config), [prompt.size for prompt in captured]
    schedule, deletions = average_schedule(deleted, sizes, fixed)
    real = [sum(map(cost.layer, schedule.layer_counts(len(parts.layers), [n]))) for n in sizes]
    full = [len(parts.layers) * cost.layer(n) for n in sizes]
    kept = fmean(part / all_of_it for part, all_of_it in zip(real, full, strict=True))
    return FoundDeletions(schedule, high, saved, 1 - kept, deletions)


def average_schedule(
    deleted: Sequence[Sequence[int]], sizes: Sequence[int], fixed: int | None
) -> tuple[Schedule, list[int] | list[float]]:
    """The schedule of the mean deletions, and these, one a layer.

    Args:
        deleted: of each prompt, tokens that go in each layer.
        sizes: of each prompt, its image's tokens.
        fixed: tokens of every image, or None where they differ and shares are averaged.
    """
    unit = fixed or _FINE
    means = [
        floor(sum(Fraction(count * unit, size) for count, size in zip(layer, sizes, strict=True)) / len(sizes))
        for layer in zip(*deleted, strict=True)
    ]
    stages, left = [], unit
    # What the last layer deletes is gone after the decoder only.
    for layer, count in enumerate(means[:-1], 1):
        left -= count
        if count:
            stages.append(Stage("fitprune", layer, left if fixed else Decimal(left) / _FINE))
    return Schedule(tuple(stages)), means if fixed else [count / _FINE for count in means]


def fit(measure: Float[Tensor, " V"], remains: float) -> Bool[Tensor, " V"]:
    """All but the lowest tokens of `measure` whose loss leaves at least `remains`, and one more, as in the reference."""
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
    """Visual tokens that one prompt loses in each layer, given what each layer's measures add up to unpruned."""
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
    """What an unpruned run of one prompt gives to layer 0."""
    seen: list[LayerInput] = []

    def see(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append(LayerInput(0, args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"]))

    with hooked([parts.layers[0].register_forward_pre_hook(see, with_kwargs=True)]):
        parts.multimodal(**inputs, use_cache=False)
    read = {name: inputs[name] for name in ("input_ids", "attention_mask", "image_grid_thw") if name in inputs}
    counts = Layout.of(parts, read, None, None).counts
    if len(counts) != 1:
        raise CalibrationError(f"a sample of the search holds {len(counts)} images; it takes one a prompt.")
    return CapturedPrompt(read, seen[0], counts[0])


def unpruned_totals(parts: ModelParts, prompt: CapturedPrompt) -> list[tuple[float, float]]:
    """What the two measures of each layer add up to, unpruned."""
    totals: list[tuple[float, float]] = []

    def decide(layer: int, cross: Tensor, within: Tensor) -> Tensor:
        totals.append((float(cross.cpu().double().sum()), float(within.cpu().double().sum())))
        return torch.ones_like(cross, dtype=torch.bool)

    _walk(parts, prompt, decide)
    return totals


def _walk(parts: ModelParts, prompt: CapturedPrompt, decide: Decide) -> None:
    """Run the decoder's layers on one prompt, deleting visual tokens between the layers.

    What goes between a layer's attention and its MLP may as well go after the MLP, which mixes no tokens.
    """
    layout, hidden = Layout.of(parts, prompt.inputs, None, None), prompt.state.hidden
    cos, sin = rotary = prompt.state.rotary
    for layer, module in enumerate(parts.layers):
        state = LayerInput(layer, hidden, rotary)
        cross, within = measures(layout.view(parts, state, state, 0))
        keep = decide(layer, cross[0], within[0])
        mask = attention_mask(layout.present, hidden.shape[1], False, parts.form, hidden.dtype)
        hidden = module(hidden, attention_mask=mask, position_embeddings=rotary, position_ids=None)
        packing = layout.prune(keep[None], [int(keep.sum())])
        hidden = gather(hidden, packing.index)
        rotary = gather_rotary(cos, layout.origin), gather_rotary(sin, layout.origin)
