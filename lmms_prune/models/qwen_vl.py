"""What Qwen's vision-language models share: an image at its own size, four patches a visual token, positions with three channels.

Free of torch.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_prune.models.family import Family, Grid
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.sizes import Architecture, EncoderSizes, bytes_per_number, decoder_sizes, stated_sizes

# The library's defaults for values that a config.json of Qwen2-VL and Qwen2.5-VL omits.
_TEXT: dict[str, Any] = {
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
}


@dataclass(frozen=True)
class QwenVL(Family):
    """A model of Qwen's with 2 x 2 patches a visual token and M-RoPE; a subclass adds what its vision encoder differs in."""

    @property
    def text_defaults(self) -> Mapping[str, Any]:
        """The library's defaults for sizes of the decoder that a config.json omits."""
        return _TEXT

    @property
    @abstractmethod
    def vision_defaults(self) -> Mapping[str, Any]:
        """The library's defaults for sizes of the vision encoder that a config.json omits."""

    @abstractmethod
    def encoder_sizes(self, vision: Mapping[str, Any]) -> EncoderSizes:
        """The sizes of the vision encoder, from those that a configuration states, with defaults for the others."""

    def rope(self, half: int) -> dict[str, Any]:
        """The rotary parameters of a published checkpoint whose heads have twice `half` channels."""
        return {"rope_theta": 1e6, "mrope_section": [half // 4, 3 * half // 8, 3 * half // 8]}

    def tokens_per_image(self, config: Any) -> int | None:
        return None

    def grids(self, config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Grid]:
        return self.grids_of_thw(config, inputs.get("image_grid_thw"))

    def grids_of_thw(self, config: Any, thw: Any) -> list[Grid]:
        merge = config.vision_config.spatial_merge_size
        return [] if thw is None else [(rows // merge, columns // merge) for _, rows, columns in thw.tolist()]

    def encoder(self, multimodal: Any) -> Any:
        return multimodal.visual

    def encoder_blocks(self, encoder: Any) -> Any:
        return encoder.blocks

    def last_of_vision(self, multimodal: Any) -> Any:
        return multimodal.visual

    def encoder_shape(self, config: Any) -> EncoderShape:
        vision = config.vision_config
        patches = vision.spatial_merge_size**2
        return EncoderShape(vision.depth, vision.depth - 1, 0, patches, is_clip=False, projects_after=False)

    def encoder_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        return args[0] if args else kwargs["hidden_states"], args[1] if len(args) > 1 else kwargs.get("grid_thw")

    def signals_class(self) -> Any:
        from lmms_prune.models.qwen_encoder import QwenEncoder

        return QwenEncoder

    def rotary_table(self, decoder: Any, table: Any) -> Any:
        # Older library versions return tables with three channels; newer ones have already merged them.
        if table.dim() == 3:
            return table
        sections = decoder.config.rope_parameters["mrope_section"] * 2
        parts = [part[i % 3] for i, part in enumerate(table.split(sections, dim=-1))]
        import torch

        return torch.cat(parts, dim=-1)

    def extra_inputs(self, config: Any, ids: Any) -> dict[str, Any]:
        return {"mm_token_type_ids": (ids == config.image_token_id).int()}

    def only_grid(self, config: Any) -> Grid | None:
        return None

    def image_inputs(self, config: Any, grid: Grid, noise: Any) -> dict[str, Any]:
        vision = config.vision_config
        rows, columns = (vision.spatial_merge_size * side for side in grid)
        pixels = noise((rows * columns, 3 * vision.temporal_patch_size * vision.patch_size**2))
        return {"pixel_values": pixels, "image_grid_thw": pixels.new_tensor([[1, rows, columns]]).long()}

    def pixel_side(self, config: Any) -> int:
        return int(config.vision_config.patch_size * config.vision_config.spatial_merge_size)

    def markers(self, config: Any) -> tuple[list[int], list[int]]:
        return [config.vision_start_token_id], [config.vision_end_token_id]

    def processor_options(self, arguments: Any) -> dict[str, Any]:
        return {"size": {"shortest_edge": arguments.min_pixels, "longest_edge": arguments.max_pixels}}

    def processed(
        self, processor: Any, prompts: list[str], messages: list[list[dict[str, Any]]], arguments: Any
    ) -> Any:
        from qwen_vl_utils import process_vision_info

        images, _ = process_vision_info(messages)
        return processor(text=prompts, images=images, padding=True, return_tensors="pt")

    def decoded(self, tokenizer: Any, ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def architecture(self, config: Mapping[str, Any], name: str) -> Architecture:
        # Older checkpoints have the decoder's sizes at the top level, newer ones in a text_config.
        stated = config.get("text_config") or {key: config[key] for key in self.text_defaults if key in config}
        text = stated_sizes(self.text_defaults, stated, f"{name}: text_config")
        vision = stated_sizes(self.vision_defaults, config.get("vision_config", {}), f"{name}: vision_config")
        return decoder_sizes(self, text, name, self.encoder_sizes(vision), None, bytes_per_number(config))

    def random_config(self, published: str, layers: int | None) -> Any:
        from transformers import AutoConfig

        sizes = self.published[published]
        text = {**self.text_defaults, **sizes["text_config"]}
        if layers is not None:
            text["num_hidden_layers"] = layers
        half = (text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]) // 2
        text["rope_parameters"] = {"rope_type": "default", **self.rope(half)}
        vision = {"depth": self.vision_defaults["depth"], **sizes["vision_config"]}
        tied = sizes.get("tie_word_embeddings", False)
        return AutoConfig.for_model(self.model_type, text_config=text, vision_config=vision, tie_word_embeddings=tied)
