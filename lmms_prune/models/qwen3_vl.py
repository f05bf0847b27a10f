"""Qwen3-VL, dense models: the decoder adds encoder features between its first layers (DeepStack). Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_prune.models.qwen_vl import QwenVL
from lmms_prune.models.sizes import EncoderSizes

# The library's defaults for values that a config.json omits.
_TEXT = {
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "vocab_size": 151936,
}
_VISION = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 3584,
    "deepstack_visual_indexes": (8, 16, 24),
}
_SMALL_ENCODER = {  # of the 2B and 4B models
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "deepstack_visual_indexes": [5, 11, 17],
}
_SIDE = 32  # pixels along one side of a visual token


@dataclass(frozen=True)
class Qwen3VL(QwenVL):
    """Qwen3-VL (``--model qwen3_vl_pruned``). Prompts, pixels and answers are those of lmms-eval's chat ``qwen3_vl``.

    Images are resized once, by qwen-vl-utils to multiples of 32 pixels; the processor resizes nothing. lmms-eval's model has
    ``min_pixels`` and ``max_pixels`` too, but its chat form does not hold images to them. Here they are held to them, and
    the defaults are the bounds that its images have: those of qwen-vl-utils, 4 and 16,384 visual tokens.
    """

    @property
    def text_defaults(self) -> Mapping[str, Any]:
        return _TEXT

    @property
    def vision_defaults(self) -> Mapping[str, Any]:
        return _VISION

    def encoder_sizes(self, vision: Mapping[str, Any]) -> EncoderSizes:
        merge = vision["spatial_merge_size"]
        merged = vision["hidden_size"] * merge**2
        merger = ((merged, merged), (merged, vision["out_hidden_size"]))
        return EncoderSizes(
            layers=vision["depth"],
            hidden=vision["hidden_size"],
            heads=vision["num_heads"],
            intermediate=vision["intermediate_size"],
            patch=3 * vision["temporal_patch_size"] * vision["patch_size"] ** 2,
            matrices=2,
            full=tuple(range(vision["depth"])),
            window=0,
            merge=merge,
            class_tokens=0,
            # One merger for the tokens, and one for each of the features that the decoder adds.
            projector=merger * (1 + len(vision["deepstack_visual_indexes"])),
        )

    def rope(self, half: int) -> dict[str, Any]:
        sections = [half - 2 * (5 * half // 16), 5 * half // 16, 5 * half // 16]
        return {"rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}

    def rotary_table(self, decoder: Any, table: Any) -> Any:
        return table  # one for all three channels, which the decoder has interleaved

    def between_layers(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Sequence[Any]]:
        added = kwargs.get("deepstack_visual_embeds")
        return {**kwargs, "deepstack_visual_embeds": None, "visual_pos_masks": None}, added or ()

    def additions(self, encoded: Any) -> Sequence[Any]:
        return encoded.deepstack_features

    def processed(
        self, processor: Any, prompts: list[str], messages: list[list[dict[str, Any]]], arguments: Any
    ) -> Any:
        from qwen_vl_utils import process_vision_info

        bounds = {"min_pixels": arguments.min_pixels, "max_pixels": arguments.max_pixels}

        def bounded(part: dict[str, Any]) -> dict[str, Any]:
            return {**part, **bounds} if "image" in part else part

        chats = [[{**message, "content": [*map(bounded, message["content"])]} for message in chat] for chat in messages]
        images, _ = process_vision_info(chats, image_patch_size=processor.image_processor.patch_size)
        return processor(text=prompts, images=images, do_resize=False, padding=True, return_tensors="pt")


QWEN3_VL = Qwen3VL(
    model_type="qwen3_vl",
    model_name="qwen3_vl_pruned",
    title="Qwen3-VL",
    checkpoint="Qwen/Qwen3-VL-8B-Instruct",
    stock_model="qwen3_vl",
    renumbers=False,
    example=(35, 28),
    defaults={
        "min_pixels": 4 * _SIDE**2,
        "max_pixels": 16384 * _SIDE**2,
        "system_prompt": "You are a helpful assistant.",
    },
    refused=("prompt", "image_aspect"),
    # As in torchtitan's experiments/qwen3_vl (commit 0375bb6; 2B and 8B), and in the config.json of fine-tuned checkpoints on
    # the hub: amburger66/robometer-4b-lora-robotsmith-task03 (4B), Steinate/Cortex (8B).
    published={
        "qwen3-vl-2b": {
            "tie_word_embeddings": True,
            "model_type": "qwen3_vl",
            "text_config": {
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "num_hidden_layers": 28,
                "num_attention_heads": 16,
                "num_key_value_heads": 8,
                "vocab_size": 151936,
            },
            "vision_config": {**_SMALL_ENCODER, "out_hidden_size": 2048},
        },
        "qwen3-vl-4b": {
            "tie_word_embeddings": True,
            "model_type": "qwen3_vl",
            "text_config": {
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "vocab_size": 151936,
            },
            "vision_config": {**_SMALL_ENCODER, "out_hidden_size": 2560},
        },
        "qwen3-vl-8b": {
            "model_type": "qwen3_vl",
            "text_config": {
                "hidden_size": 4096,
                "intermediate_size": 12288,
                "num_hidden_layers": 36,
                "num_attention_heads": 32,
                "num_key_value_heads": 8,
                "vocab_size": 151936,
            },
            "vision_config": {"out_hidden_size": 4096},
        },
    },
)
