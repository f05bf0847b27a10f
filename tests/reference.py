"""An independent reference for pruning: nothing is removed, the dropped tokens' keys are only masked.

Runs the unmodified model on one unpadded row, prompt and generated tokens at once and without a cache, and gives every
decoder layer the mask (and, renumbered, the rotary tables) that it would have if the dropped tokens were gone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def dropped_columns(row_ids: list[int], image_token: int, images: list[int], masks: list[Tensor]) -> set[int]:
    """Columns of the visual tokens that a stage's `masks` (one an image) do not keep."""
    columns = [column for column, token in enumerate(row_ids) if token == image_token]
    kept = [bool(flag) for mask in masks for flag in mask]
    assert len(columns) == len(kept) == sum(images)
    return {column for column, flag in zip(columns, kept, strict=True) if not flag}


def masked_logits(
    model: Any,
    inputs: dict[str, Tensor],
    generated: Tensor,
    drops: dict[int, set[int]],
    compact: bool,
    forgotten: dict[int, set[int]] | None = None,
) -> Tensor:
    """Logits (steps, vocabulary) that predict each of the `generated` tokens of one row.

    Args:
        model: unmodified, any attention kernel that takes a 4-D additive mask.
        inputs: one row, unpadded.
        generated: ids (steps,) that follow the prompt.
        drops: for each stage's layer, all columns that are gone from that layer on.
        compact: renumber the positions of what is left from each stage's layer on.
        forgotten: for some layers, further columns that generated tokens do not see there.
    """
    prompt = inputs["input_ids"].shape[1]
    extended = dict(inputs)
    for name, fill in (("input_ids", generated), ("attention_mask", 1), ("mm_token_type_ids", 0)):
        if name in inputs:
            tail = torch.zeros_like(generated)[None] + fill
            extended[name] = torch.cat([inputs[name], tail.to(inputs[name].dtype)], dim=1)
    length = extended["input_ids"].shape[1]
    decoder = model.model.language_model

    def swap(layer: int):
        gone: set[int] = set()
        for stage_layer in sorted(drops):
            if stage_layer <= layer:
                gone = drops[stage_layer]

        def hook(module: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            allowed = torch.ones(length, length, dtype=torch.bool).tril()
            allowed[:, sorted(gone)] = False
            allowed[prompt:, sorted((forgotten or {}).get(layer, ()))] = False
            allowed |= torch.eye(length, dtype=torch.bool)
            mask = torch.zeros(1, 1, length, length, dtype=args[0].dtype)
            mask = mask.masked_fill(~allowed, torch.finfo(args[0].dtype).min)
            kwargs = {**kwargs, "attention_mask": mask}
            if compact and gone:
                number, positions = 0, []
                for column in range(length):
                    positions.append(number)
                    number += column not in gone
                kwargs["position_embeddings"] = decoder.rotary_emb(args[0], torch.tensor([positions]))
            return args, kwargs

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
    return logits[prompt - 1 : length - 1]
