"""The certificate's reference for stages that only drop tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from lmms_prune.certificate.reference import KeptColumns, masked_run


def dropped_columns(row_ids: list[int], image_token: int, images: list[int], masks: list[Tensor]) -> set[int]:
    """Return the columns of the visual tokens that a stage drops.

    Args:
        row_ids: ids of one unpadded prompt.
        image_token: id of the image token.
        images: number of visual tokens of each image.
        masks: for each image, True for each kept token.

    Raises:
        ValueError: the masks and the images have different numbers of tokens.
    """
    columns = [column for column, token in enumerate(row_ids) if token == image_token]
    kept = [bool(flag) for mask in masks for flag in mask]
    if len(kept) != sum(images):
        raise ValueError(f"the masks have {len(kept)} tokens, but the images have {sum(images)}")
    return {column for column, flag in zip(columns, kept, strict=True) if not flag}


def masked_logits(
    model: Any,
    inputs: Mapping[str, Tensor],
    generated: Int[Tensor, " S"],
    drops: Mapping[int, set[int]],
    compact: bool,
    forgotten: Mapping[int, set[int]] | None = None,
) -> Float[Tensor, "S vocabulary"]:
    """Return the logits of `masked_run` for stages that only drop tokens.

    Args:
        model, inputs, generated, compact, forgotten: as for `masked_run`.
        drops: by stage layer, all columns that are dropped at that layer or before.
    """
    length = inputs["input_ids"].shape[1]
    kept = {layer: KeptColumns([c for c in range(length) if c not in dropped]) for layer, dropped in drops.items()}
    return masked_run(model, inputs, generated, kept, compact, forgotten).logits
