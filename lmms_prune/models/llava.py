"""LLaVA-1.5: one visual token per patch of CLIP, in a square grid of the same size for all images. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models.family import Family, Grid
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.sizes import (
    Architecture,
    ArchitectureError,
    EncoderSizes,
    bytes_per_number,
    decoder_sizes,
    stated_sizes,
)

# The library's defaults for values that a config.json omits (that of LLaVA-1.5 on the hub does).
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "vocab_size": 32000,
}
_CLIP = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
CLIP_L_336 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_CLIP_TYPE = "clip_vision_model"
_OTHER_ENCODER = "a LLaVA with the vision encoder '{}' is not supported; only CLIP's is."
IMAGE_TOKEN = 32000


@dataclass(frozen=True)
class Llava(Family):
    """LLaVA-1.5 (``--model llava_pruned``). Prompts and pixels are those of lmms-eval's own chat ``llava_hf``."""

    def tokens_per_image(self, config: Any) -> int | None:
        return self.tokens_per_square(config)

    def tokens_per_square(self, config: Any) -> int:
        """Tokens of each square that the vision encoder sees: an image, or a tile of one.

        Raises:
            UnsupportedModelError: the vision encoder is not CLIP's.
        """
        vision = config.vision_config
        if (kind := getattr(vision, "model_type", None)) != _CLIP_TYPE:
            raise UnsupportedModelError(_OTHER_ENCODER.format(kind))
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches + (config.vision_feature_select_strategy == "full")

    def grids(self, config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Grid]:
        # With a class token among the tokens (strategy "full") isqrt still gives the side of the square of patches.
        return [(isqrt(size), isqrt(size)) for size in sizes]

    def grids_of_thw(self, config: Any, thw: Any) -> list[Grid]:
        return []

    def encoder(self, multimodal: Any) -> Any:
        return multimodal.vision_tower

    def encoder_blocks(self, encoder: Any) -> Any:
        # Older library versions wrap the encoder once more.
        return getattr(encoder, "vision_model", encoder).encoder.layers

    def last_of_vision(self, multimodal: Any) -> Any:
        return multimodal.multi_modal_projector

    def encoder_shape(self, config: Any) -> EncoderShape:
        layer, strategy = config.vision_feature_layer, config.vision_feature_select_strategy
        if not isinstance(layer, int) or strategy != "default":
            raise UnsupportedModelError(
                f"signals of the vision encoder need one vision_feature_layer (is {layer}) and the strategy 'default' (is "
                f"'{strategy}')."
            )
        depth = config.vision_config.num_hidden_layers
        # Hidden state 0 is the embedding, so state i is the output of block i - 1.
        selected = (layer if layer >= 0 else depth + 1 + layer) - 1
        return EncoderShape(depth, selected, class_tokens=1, patches_per_token=1, is_clip=True, projects_after=True)

    def encoder_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        return (args[0] if args else kwargs["pixel_values"]), None

    def signals_class(self) -> Any:
        from lmms_prune.models.clip_encoder import ClipEncoder

        return ClipEncoder

    def only_grid(self, config: Any) -> Grid | None:
        side = config.vision_config.image_size // config.vision_config.patch_size
        return side, side

    def image_inputs(self, config: Any, grid: Grid, noise: Any) -> dict[str, Any]:
        side = config.vision_config.image_size
        return {"pixel_values": noise((1, 3, side, side))}

    def processor_fault(self, processor: Any, config: Any) -> str:
        # The processor writes the image's tokens into the prompt, and counts them from fields of its own.
        side, tokens = config.vision_config.image_size, self.tokens_per_square(config)
        strategy = config.vision_feature_select_strategy
        needed = {
            "patch_size": config.vision_config.patch_size,
            "vision_feature_select_strategy": strategy,
            "num_additional_image_tokens": 1,  # CLIP's class token
        }
        stated = {name: getattr(processor, name, None) for name in needed}
        fix = f"Set {', '.join(f'{name}={value}' for name, value in needed.items())} there."
        if absent := [name for name, value in stated.items() if value is None]:
            return f"its processor_config.json has no {', '.join(absent)}, so no prompt can be made. {fix}"
        counted = (side // stated["patch_size"]) ** 2 + stated["num_additional_image_tokens"]
        counted -= stated["vision_feature_select_strategy"] == "default"
        if counted == tokens:
            return ""
        values = ", ".join(f"{name}={value}" for name, value in stated.items())
        return (
            f"its processor_config.json counts {counted} tokens for an image of which the model makes {tokens} ({values}; what is "
            f"absent there has the library's default). {fix}"
        )

    def processed(
        self, processor: Any, prompts: list[str], messages: list[list[dict[str, Any]]], arguments: Any
    ) -> Any:
        parts = [part for chat in messages for message in chat for part in message["content"]]
        images = [part["image"] for part in parts if "image" in part]
        if arguments.image_aspect == "pad":
            from lmms_prune.models.images import pad_to_square

            images = [pad_to_square(image, processor.image_processor.image_mean) for image in images]
        return processor(images=images or None, text=prompts, padding=True, return_tensors="pt")

    def view_of(self, settings: Mapping[str, str]) -> str:
        return settings.get("image_aspect", "crop")

    def text_defaults(self, stated: Any) -> Mapping[str, Any]:
        """The library's defaults for values that a text configuration omits."""
        return LLAMA

    @property
    def vision_defaults(self) -> Mapping[str, Any]:
        """The library's defaults for values that a vision configuration omits."""
        return _CLIP

    def architecture(self, config: Mapping[str, Any], name: str) -> Architecture:
        stated = config.get("text_config", {})
        text = stated_sizes(self.text_defaults(stated), stated, f"{name}: text_config")
        vision = stated_sizes(self.vision_defaults, config.get("vision_config", {}), f"{name}: vision_config")
        if (kind := config.get("vision_config", {}).get("model_type", _CLIP_TYPE)) != _CLIP_TYPE:
            raise ArchitectureError(f"{name}: {_OTHER_ENCODER.format(kind)}")
        hidden, wide = text["hidden_size"], vision["hidden_size"]
        encoder = EncoderSizes(
            layers=vision["num_hidden_layers"],
            hidden=wide,
            heads=vision["num_attention_heads"],
            intermediate=vision["intermediate_size"],
            patch=3 * vision["patch_size"] ** 2,
            matrices=2,
            full=tuple(range(vision["num_hidden_layers"])),
            window=0,
            merge=1,
            class_tokens=1,
            projector=((wide, hidden), (hidden, hidden)),
        )
        image_tokens = (vision["image_size"] // vision["patch_size"]) ** 2
        return decoder_sizes(self, text, name, encoder, image_tokens, bytes_per_number(config))

    def random_config(self, published: str, layers: int | None) -> Any:
        from transformers import LlavaConfig

        sizes = self.published[published]
        text = {**LLAMA, **sizes["text_config"], "model_type": "llama"}
        if layers is not None:
            text["num_hidden_layers"] = layers
        vision = {**sizes["vision_config"], "model_type": "clip_vision_model"}
        return LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE_TOKEN)


LLAVA = Llava(
    model_type="llava",
    model_name="llava_pruned",
    title="LLaVA-1.5",
    checkpoint="llava-hf/llava-1.5-7b-hf",
    stock_model="llava_hf",
    renumbers=True,
    example=(24, 24),
    refused=("min_pixels", "max_pixels"),
    published={
        "llava-1.5-7b": {
            "model_type": "llava",
            "text_config": {"vocab_size": 32064},
            "vision_config": CLIP_L_336,
        },
        "llava-1.5-13b": {
            "model_type": "llava",
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
