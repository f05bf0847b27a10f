"""An independent reference for pruning: nothing is removed, the dropped tokens' keys are only masked.

Runs the unmodified model on one unpadded row, prompt and generated tokens at once and without a cache, and gives every
decoder layer the mask (and, renumbered, the rotary tables) that it would have if the dropped tokens were gone. It shares
no code with what cuts, and is as plain as can be: it must be right at first sight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

Tables = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Standing:
    """What stands in a row from one stage's layer on.

    Args:
        columns: those of the prompt, in the order in which their tokens stand.
        written: for some of them, the state that a method has put there at this layer.
    """

    columns: Sequence[int]
    written: Mapping[int, Float[Tensor, " D"]] = field(default_factory=dict)


@dataclass(frozen=True)
class Masked:
    """What the reference computed for one row of `prompt` + S tokens.

    Args:
        logits: those that predict each of the S generated tokens.
        tables: cosine and sine tables that each layer was given, over the whole row.
    """

    logits: Float[Tensor, "S vocabulary"]
    tables: list[Tables]


def dropped_columns(row_ids: list[int], image_token: int, images: list[int], masks: list[Tensor]) -> set[int]:
    """Columns of the visual tokens that a stage's `masks` (one an image) do not keep."""
    columns = [column for column, token in enumerate(row_ids) if token == image_token]
    kept = [bool(flag) for mask in masks for flag in mask]
    if len(kept) != sum(images):
        raise ValueError(f"masks of {len(kept)} tokens for images of {sum(images)}")
    return {column for column, flag in zip(columns, kept, strict=True) if not flag}


def masked_logits(
    model: Any,
    inputs: Mapping[str, Tensor],
    generated: Int[Tensor, " S"],
    drops: Mapping[int, set[int]],
    compact: bool,
    forgotten: Mapping[int, set[int]] | None = None,
) -> Float[Tensor, "S vocabulary"]:
    """As `masked_run`, for stages that only drop: for each stage's layer, all columns that are gone from that layer on."""
    length = inputs["input_ids"].shape[1]
    standing = {layer: Standing([c for c in range(length) if c not in gone]) for layer, gone in drops.items()}
    return masked_run(model, inputs, generated, standing, compact, forgotten).logits


def masked_run(
    model: Any,
    inputs: Mapping[str, Tensor],
    generated: Int[Tensor, " S"],
    standing: Mapping[int, Standing],
    compact: bool,
    forgotten: Mapping[int, set[int]] | None = None,
) -> Masked:
    """Run one row with everything masked that is gone.

    Args:
        model: unmodified, any attention kernel that takes a 4-D additive mask.
        inputs: one row, unpadded.
        generated: the ids that follow the prompt.
        standing: for each stage's layer, what is left of the prompt from that layer on.
        compact: renumber the positions of what is left from each stage's layer on.
        forgotten: for some layers, further columns that generated tokens do not see there.
    """
    prompt = inputs["input_ids"].shape[1]
    extended = _extended(inputs, generated)
    length = extended["input_ids"].shape[1]
    decoder = model.model.language_model
    tables: list[Tables] = []

    def swap(layer: int) -> Callable[..., tuple[tuple, dict]]:
        stages = [stage for stage in sorted(standing) if stage <= layer]
        columns = list(standing[stages[-1]].columns) if stages else list(range(prompt))
        columns += range(prompt, length)
        written = standing[layer].written if layer in standing else {}

        def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            hidden = args[0].clone()
            for column, state in written.items():
                hidden[0, column] = state.to(hidden)
            place = torch.full((length,), length)
            place[columns] = torch.arange(len(columns))
            # Each sees what stands before it; whoever is gone sees itself, as it must see something.
            allowed = (place[None, :] <= place[:, None]) & (place < length)[None, :]
            allowed[prompt:, sorted((forgotten or {}).get(layer, ()))] = False
            allowed |= torch.eye(length, dtype=torch.bool)
            mask = torch.zeros(1, 1, length, length, dtype=hidden.dtype)
            mask = mask.masked_fill(~allowed, torch.finfo(hidden.dtype).min).to(hidden.device)
            kwargs = {**kwargs, "attention_mask": mask}
            if compact and stages:
                numbers = torch.where(place < length, place, 0)[None]
                kwargs["position_embeddings"] = decoder.rotary_emb(hidden, numbers.to(hidden.device))
            tables.append(kwargs["position_embeddings"])
            return (hidden, *args[1:]), kwargs

        return hook

    handles = [
        module.register_forward_pre_hook(swap(layer), with_kwargs=True) for layer, module in enumerate(decoder.layers)
    ]
    try:
        with torch.no_grad():
            logits = model(**extended, use_cache=False).logits[0]
    finally:
        for handle in handles:
            handle.remove()
    return Masked(logits[prompt - 1 : length - 1], tables)


def _extended(inputs: Mapping[str, Tensor], generated: Tensor) -> dict[str, Tensor]:
    """A row's inputs with the generated tokens after the prompt."""
    extended = dict(inputs)
    for name, fill in (("input_ids", generated), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            tail = torch.zeros_like(generated)[None] + fill
            extended[name] = torch.cat([inputs[name], tail.to(inputs[name])], dim=1)
    return extended
