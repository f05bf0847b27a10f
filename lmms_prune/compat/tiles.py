"""LLaVA-NeXT with the padding of its tiles: transformers cuts it off, most papers do not. Free of torch until it is used."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

_UNPADS = "unpads_tiles"
"""The name in a model's configuration under which it is noted; absent where the padding is cut off."""


def unpads(config: Any) -> bool:
    """Whether a model of this configuration cuts off what its tiles hold beyond the image, and adds newline tokens."""
    return bool(getattr(config, _UNPADS, True))


def keep_padding(model: Any, processor: Any) -> None:
    """Let a loaded LLaVA-NeXT and its processor keep all patches of all tiles, without newline tokens.

    As in most papers, where ``mm_patch_merge_type`` is ``spatial``: 2,880 tokens for two by two tiles. It cannot be undone;
    load them again instead. The model may be a `peft.PeftModel`.
    """
    keep_padding_in_model(model)
    keep_padding_in_processor(processor)


def keep_padding_in_model(model: Any) -> None:
    """The half of `keep_padding` that concerns the model, for inputs that no processor makes."""
    # PEFT's wrapper of an adapter has an attribute `model` too: the whole model, which packs no features.
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    multimodal = getattr(model, "model", model)
    model.config.unpads_tiles = False
    multimodal.pack_image_features = partial(_packed, type(multimodal), model.config)


def keep_padding_in_processor(processor: Any) -> None:
    """The half of `keep_padding` that concerns the processor, which counts an image's tokens."""
    processor._get_unpadded_features = _features


def _packed(
    kind: Any, config: Any, image_features: Any, image_sizes: Any, vision_feature_select_strategy: Any, **_: Any
) -> Any:
    """The features of all patches: as if each image had exactly the size of its tiles, and there were no newline token."""
    from transformers.image_processing_utils import select_best_resolution

    canvases = [select_best_resolution(size.tolist(), config.image_grid_pinpoints) for size in image_sizes]
    model = SimpleNamespace(config=config)
    return kind.pack_image_features(model, image_features, canvases, vision_feature_select_strategy, None)


def _features(
    height: int, width: int, patches_height: int, patches_width: int, scale_height: int, scale_width: int
) -> tuple[int, int]:
    """Patches of the tiles and newline tokens, in place of the processor's own count."""
    return patches_height * scale_height * patches_width * scale_width, 0
