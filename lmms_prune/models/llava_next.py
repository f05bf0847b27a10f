"""LLaVA-NeXT (1.6): CLIP on the whole image and on tiles of it, with a newline token after each row. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Any

from lmms_prune.compat.tiles import unpads
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models.family import Grid
from lmms_prune.models.llava import CLIP_L_336, IMAGE_TOKEN, LLAMA, Llava
from lmms_prune.models.mosaic import Mosaic, mosaic
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.sizes import Architecture

_PINPOINTS = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
_MISTRAL = {"model_type": "mistral", "num_key_value_heads": 8, "intermediate_size": 14336}


@dataclass(frozen=True)
class LlavaNext(Llava):
    """LLaVA-NeXT (``--model llava_next_pruned``). Prompts and pixels are those of lmms-eval's own chat ``llava_hf``.

    With ``unpad=false`` an image is all patches of its base and tiles, without newline tokens: 2,880 for two by two tiles,
    as most papers count them.
    """

    def tokens_per_image(self, config: Any) -> int | None:
        self.tokens_per_square(config)  # refuses another encoder
        if config.vision_feature_select_strategy != "default":
            strategy = config.vision_feature_select_strategy
            raise UnsupportedModelError(
                f"vision_feature_select_strategy '{strategy}' of a LLaVA-NeXT is not supported; only 'default' is."
            )
        return None

    def tile_tokens(self, config: Any) -> int:
        return self.tokens_per_square(config)

    def only_grid(self, config: Any) -> Grid | None:
        return None

    def grids(self, config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Grid]:
        return []

    def mosaics(self, config: Any, inputs: Mapping[str, Any]) -> list[Mosaic]:
        sizes = inputs.get("image_sizes")
        return [] if sizes is None else [_mosaic(config, (height, width)) for height, width in sizes.tolist()]

    def image_sizes(self, config: Any, inputs: Mapping[str, Any]) -> list[int]:
        return [image.tokens for image in self.mosaics(config, inputs)]

    def encoder_shape(self, config: Any) -> EncoderShape:
        return replace(super().encoder_shape(config), tiles=True)

    def signals_class(self) -> Any:
        from lmms_prune.models.clip_encoder import TiledClipEncoder

        return TiledClipEncoder

    def image_inputs(self, config: Any, grid: Grid, noise: Any) -> dict[str, Any]:
        import torch

        side, patch = config.vision_config.image_size, config.vision_config.patch_size
        # Another shape of the grid gives another number of tiles, and another part of them that is cut off.
        size = (max(1, grid[0] * patch - patch // 2), grid[1] * patch)
        image = _mosaic(config, size)
        return {"pixel_values": noise((1, image.encoded, 3, side, side)), "image_sizes": torch.tensor([size])}

    def joined(self, images: Sequence[Mapping[str, Any]], dtype: Any) -> dict[str, Any]:
        from torch.nn.functional import pad

        # As the processor does it: images of fewer tiles are filled up with tiles that the model leaves out.
        most = max((image["pixel_values"].shape[1] for image in images), default=0)
        filled = [
            {**image, "pixel_values": pad(pixels, (0,) * 7 + (most - pixels.shape[1],))}
            for image in images
            for pixels in [image["pixel_values"]]
        ]
        return super().joined(filled, dtype)

    def processed(
        self, processor: Any, prompts: list[str], messages: list[list[dict[str, Any]]], arguments: Any
    ) -> Any:
        parts = [part for chat in messages for message in chat for part in message["content"]]
        images = [part["image"] for part in parts if "image" in part]
        return processor(images=images or None, text=prompts, padding=True, return_tensors="pt")

    def prepare_model(self, model: Any, arguments: Any) -> None:
        from lmms_prune.compat.tiles import keep_padding_in_model

        if arguments.unpad is False:
            keep_padding_in_model(model)

    def prepare_processor(self, processor: Any, arguments: Any) -> None:
        from lmms_prune.compat.tiles import keep_padding_in_processor

        if arguments.unpad is False:
            keep_padding_in_processor(processor)

    def view_of(self, settings: Mapping[str, str]) -> str:
        return "whole"

    def text_defaults(self, stated: Any) -> Mapping[str, Any]:
        is_mistral = isinstance(stated, Mapping) and stated.get("model_type") == "mistral"
        sizes = {name: size for name, size in _MISTRAL.items() if name != "model_type"} if is_mistral else {}
        return {**LLAMA, **sizes}

    @property
    def vision_defaults(self) -> Mapping[str, Any]:
        return CLIP_L_336

    def architecture(self, config: Mapping[str, Any], name: str) -> Architecture:
        sizes = super().architecture(config, name)
        side = isqrt(sizes.tokens_per_image or 1)
        return replace(sizes, encoder=replace(sizes.encoder, tile=side), tokens_per_image=None)

    def random_config(self, published: str, layers: int | None) -> Any:
        from transformers import LlavaNextConfig

        sizes = self.published[published]
        text = {"model_type": "llama", **self.text_defaults(sizes["text_config"]), **sizes["text_config"]}
        if layers is not None:
            text["num_hidden_layers"] = layers
        vision = {**sizes["vision_config"], "model_type": "clip_vision_model"}
        pinpoints = [list(size) for size in _PINPOINTS]
        return LlavaNextConfig(
            text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN, image_grid_pinpoints=pinpoints
        )


def _mosaic(config: Any, size: tuple[int, int]) -> Mosaic:
    """The mosaic of an image of `size` (height and width in pixels), as the model puts it together."""
    from transformers.image_processing_utils import select_best_resolution

    vision = config.vision_config
    canvas = tuple(select_best_resolution(size, config.image_grid_pinpoints))
    unpad = unpads(config)
    return mosaic(size, canvas, vision.image_size, vision.image_size // vision.patch_size, unpad=unpad, newlines=unpad)


LLAVA_NEXT = LlavaNext(
    model_type="llava_next",
    model_name="llava_next_pruned",
    title="LLaVA-NeXT",
    checkpoint="llava-hf/llava-v1.6-vicuna-7b-hf",
    stock_model="llava_hf",
    renumbers=True,
    example=(48, 60),  # five tiles of 24 by 24
    defaults={"unpad": True},
    refused=("prompt", "image_aspect", "min_pixels", "max_pixels"),
    arguments=("unpad",),
    image_arguments=("image_sizes",),
    published={
        "llava-v1.6-vicuna-7b": {
            "model_type": "llava_next",
            "text_config": {"vocab_size": 32064},
            "vision_config": CLIP_L_336,
        },
        "llava-v1.6-mistral-7b": {
            "model_type": "llava_next",
            "text_config": {"vocab_size": 32064, "sliding_window": None, **_MISTRAL},
            "vision_config": CLIP_L_336,
        },
        "llava-v1.6-vicuna-13b": {
            "model_type": "llava_next",
            "text_config": {
                "vocab_size": 32064,
                "hidden_size": 5120,
                "intermediate_size": 13824,
                "num_hidden_layers": 40,
                "num_attention_heads": 40,
            },
            "vision_config": CLIP_L_336,
        },
    },
)
