"""Qwen2-VL: every block of its vision encoder attends over the whole image, with plain MLPs. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lmms_prune.models.qwen_vl import QwenVL
from lmms_prune.models.sizes import EncoderSizes

_QUALITY = 85  # of the JPEGs that lmms-eval's own model makes of all images


# The library's defaults for values that a config.json omits.
_VISION = {
    "depth": 32,
    "embed_dim": 1280,
    "hidden_size": 3584,
    "mlp_ratio": 4,
    "num_heads": 16,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


@dataclass(frozen=True)
class Qwen2VL(QwenVL):
    """Qwen2-VL (``--model qwen2_vl_pruned``). Prompts, pixels and decoding are those of lmms-eval's ``qwen2_vl``.

    lmms-eval has no chat model of it, only a simple one, from whose source the rest is taken: images come before the
    question, each as a JPEG of quality 85, resized within the pixel bounds already before the processor; the text loses
    every "<image>"; an answer ends at every stop text, a blank line among them, and is stripped.
    """

    @property
    def vision_defaults(self) -> Mapping[str, Any]:
        return _VISION

    def encoder_sizes(self, vision: Mapping[str, Any]) -> EncoderSizes:
        width, merge = vision["embed_dim"], vision["spatial_merge_size"]
        return EncoderSizes(
            layers=vision["depth"],
            hidden=width,
            heads=vision["num_heads"],
            intermediate=width * vision["mlp_ratio"],
            patch=3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
            matrices=2,
            full=tuple(range(vision["depth"])),
            window=0,
            merge=merge,
            class_tokens=0,
            projector=((width * merge**2, width * merge**2), (width * merge**2, vision["hidden_size"])),
        )

    def processed(
        self, processor: Any, prompts: list[str], messages: list[list[dict[str, Any]]], arguments: Any
    ) -> Any:
        from lmms_prune.models.images import as_jpeg  # Pillow, which no --help is to wait for

        bounds = {"min_pixels": arguments.min_pixels, "max_pixels": arguments.max_pixels}

        def given(part: dict[str, Any]) -> dict[str, Any]:
            return {**part, "image": as_jpeg(part["image"], _QUALITY), **bounds} if "image" in part else part

        shown = [[{**message, "content": [*map(given, message["content"])]} for message in chat] for chat in messages]
        return super().processed(processor, [prompt.replace("<image>", "") for prompt in prompts], shown, arguments)

    def view_of(self, settings: Mapping[str, str]) -> str:
        return "opaque"  # a JPEG has no transparency


QWEN2_VL = Qwen2VL(
    model_type="qwen2_vl",
    model_name="qwen2_vl_pruned",
    title="Qwen2-VL",
    checkpoint="Qwen/Qwen2-VL-7B-Instruct",
    stock_model="qwen2_vl",
    renumbers=False,
    example=(24, 32),
    defaults={
        "min_pixels": 4 * 28 * 28,
        "max_pixels": 768 * 28 * 28,
        "system_prompt": "You are a helpful assistant.",
    },
    refused=("prompt", "image_aspect"),
    trims_answers=True,
    published={
        "qwen2-vl-2b": {
            "tie_word_embeddings": True,
            "model_type": "qwen2_vl",
            "text_config": {
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_hidden_layers": 28,
                "num_attention_heads": 12,
                "num_key_value_heads": 2,
                "vocab_size": 151936,
            },
            "vision_config": {"embed_dim": 1280, "hidden_size": 1536},
        },
        "qwen2-vl-7b": {
            "model_type": "qwen2_vl",
            "text_config": {
                "hidden_size": 3584,
                "intermediate_size": 18944,
                "num_hidden_layers": 28,
                "num_attention_heads": 28,
                "num_key_value_heads": 4,
                "vocab_size": 152064,
            },
            "vision_config": {"embed_dim": 1280, "hidden_size": 3584},
        },
    },
)
