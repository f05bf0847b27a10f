"""Qwen2.5-VL: most blocks of its vision encoder attend in windows, all have gated MLPs. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from lmms_prune.models.qwen_vl import QwenVL
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.sizes import EncoderSizes

# The library's defaults for values that a config.json omits.
_VISION = {
    "depth": 32,
    "hidden_size": 3584,
    "intermediate_size": 3420,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "window_size": 112,
    "out_hidden_size": 3584,
    "fullatt_block_indexes": (7, 15, 23, 31),
}


@dataclass(frozen=True)
class Qwen25VL(QwenVL):
    """Qwen2.5-VL (``--model qwen2_5_vl_pruned``). Prompts and pixels are those of lmms-eval's chat ``qwen2_5_vl``."""

    @property
    def vision_defaults(self) -> Mapping[str, Any]:
        return _VISION

    def encoder_shape(self, config: Any) -> EncoderShape:
        vision = config.vision_config
        window = vision.window_size // vision.patch_size // vision.spatial_merge_size
        return replace(super().encoder_shape(config), window=window, full=tuple(vision.fullatt_block_indexes))

    def encoder_sizes(self, vision: Mapping[str, Any]) -> EncoderSizes:
        merge = vision["spatial_merge_size"]
        merged = vision["hidden_size"] * merge**2
        return EncoderSizes(
            layers=vision["depth"],
            hidden=vision["hidden_size"],
            heads=vision["num_heads"],
            intermediate=vision["intermediate_size"],
            patch=3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
            matrices=3,
            full=tuple(vision["fullatt_block_indexes"]),
            window=vision["window_size"] // vision["patch_size"] // merge,
            merge=merge,
            class_tokens=0,
            projector=((merged, merged), (merged, vision["out_hidden_size"])),
        )


QWEN2_5_VL = Qwen25VL(
    model_type="qwen2_5_vl",
    model_name="qwen2_5_vl_pruned",
    title="Qwen2.5-VL",
    checkpoint="Qwen/Qwen2.5-VL-7B-Instruct",
    stock_model="qwen2_5_vl",
    renumbers=False,
    example=(40, 32),
    defaults={"min_pixels": 256 * 28 * 28, "max_pixels": 2048 * 28 * 28},
    refused=("prompt", "image_aspect"),
    published={
        "qwen2.5-vl-3b": {
            "tie_word_embeddings": True,
            "model_type": "qwen2_5_vl",
            "text_config": {
                "hidden_size": 2048,
                "intermediate_size": 11008,
                "num_hidden_layers": 36,
                "num_attention_heads": 16,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
            },
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 2048},
        },
        "qwen2.5-vl-7b": {
            "model_type": "qwen2_5_vl",
            "text_config": {
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "vocab_size": 152064,
            },
            "vision_config": {"hidden_size": 1280, "out_hidden_size": 3584},
        },
    },
)
