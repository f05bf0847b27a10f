"""What differs between the model families, and where things are in a loaded checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import chain, groupby
from math import isqrt
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lmms_prune.compat.versions import refuse_other_versions
from lmms_prune.errors import BrokenImageError, UnsupportedModelError
from lmms_prune.models.supported import SUPPORTED, Supported

# Whatever touches a model comes by here; schedules can be read, and an installation examined, beside any version.
refuse_other_versions()

MaskForm = Literal["sdpa", "eager", "flash"]
"""How an attention kernel takes its mask: boolean 4-D or none, additive 4-D, 2-D key mask or none."""

_FORMS: dict[str, MaskForm] = {
    "sdpa": "sdpa",
    "eager": "eager",
    "flash_attention_2": "flash",
    "flash_attention_3": "flash",
}


@dataclass(frozen=True)
class Family(Supported):
    """One model architecture: what is known of it, and how to find the visual tokens in a prompt."""

    def tokens_per_image(self, config: Any) -> int | None:
        """Visual tokens of every image, or None where images differ in size."""
        if self.mrope:
            return None
        vision = config.vision_config
        if getattr(vision, "model_type", None) != "clip_vision_model":
            message = f"a LLaVA with the vision tower '{getattr(vision, 'model_type', None)}' is not supported; only CLIP's is."
            raise UnsupportedModelError(message)
        patches = (vision.image_size // vision.patch_size) ** 2
        return patches + (config.vision_feature_select_strategy == "full")

    def image_spans(self, visual: list[bool], fixed: int | None, grids: list[int]) -> list[tuple[int, int]]:
        """Start and length of each image's visual tokens in one row.

        Args:
            visual: whether each token of the row is visual.
            fixed: visual tokens of an image where all images have the same, else None.
            grids: visual tokens of each of the row's images in order where they differ (taken from the front;
                may be empty, then every run of visual tokens is one image).

        Raises:
            BrokenImageError: the runs of visual tokens cannot be cut into whole images.
        """
        spans, start, sizes = [], 0, iter(grids)
        for is_visual, run in groupby(visual):
            length = len(list(run))
            while is_visual and length:
                size = fixed or next(sizes, length)
                if size > length:
                    raise BrokenImageError(f"a run of {length} visual tokens does not hold a whole image of {size}.")
                spans.append((start, size))
                start, length = start + size, length - size
            start += length
        return spans


FAMILIES: dict[str, Family] = {family.model_type: Family(**asdict(family)) for family in SUPPORTED}


def family_of(config: Any) -> Family:
    """The family of a checkpoint's configuration.

    Raises:
        UnsupportedModelError: no such family; names the ones there are.
    """
    model_type = getattr(config, "model_type", None)
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    known = ", ".join(f"{f.model_type} (--model {f.model_name})" for f in FAMILIES.values())
    what = "has no image input or" if not hasattr(config, "vision_config") else "is a vision-language model that"
    raise UnsupportedModelError(f"model type '{model_type}' {what} is not supported yet. Supported: {known}.")


def refuse_wrapper(model: Any) -> None:
    """Only the model itself: a wrapper hands on some attributes, but hooks and what stands in for `generate` go astray on it.

    Raises:
        UnsupportedModelError: `model` is a module around a supported one; says how to get at that.
    """
    if not isinstance(model, nn.Module):
        return
    own = [model, model._modules.get("model")]
    if any(isinstance(part, nn.Module) and "language_model" in part._modules for part in own):
        return
    configs = (getattr(module, "config", None) for module in model.modules() if module is not model)
    if any(getattr(config, "model_type", None) in FAMILIES for config in configs):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a wrapper around a model; give the model inside it (PEFT: get_base_model(), "
            "torch.compile: _orig_mod, or use model.compile(), DistributedDataParallel: module)."
        )


@dataclass(frozen=True)
class ModelParts:
    """Where things are in one loaded model.

    Args:
        family: its family.
        config: the checkpoint's configuration.
        multimodal: the module that sees ``input_ids`` and splices the images in.
        decoder: the language model; its inputs are embeddings, positions, mask and cache.
        layers: the decoder's layers.
        form: the mask form of the attention kernel in use.
    """

    family: Family
    config: Any
    multimodal: Any
    decoder: Any
    layers: Any
    form: MaskForm

    @classmethod
    def of(cls, model: Any) -> ModelParts:
        """Find the parts of `model`.

        Raises:
            UnsupportedModelError: another family, a wrapper, another attention kernel, or a decoder with sliding windows.
        """
        refuse_wrapper(model)
        config = getattr(model, "config", None)
        family = family_of(config)
        multimodal = model if hasattr(model, "language_model") else model.model
        decoder = multimodal.language_model
        kernel = decoder.config._attn_implementation
        if kernel not in _FORMS:
            raise UnsupportedModelError(
                f"attn_implementation '{kernel}' is not supported. Use one of {', '.join(_FORMS)}."
            )
        window = getattr(decoder.config, "sliding_window", None)
        kinds = set(
            getattr(decoder.config, "layer_types", None) or ["sliding_attention" if window else "full_attention"]
        )
        if kinds != {"full_attention"}:
            raise UnsupportedModelError(
                f"decoders with sliding windows are not supported (layer types: {', '.join(kinds)})."
            )
        return cls(family, config, multimodal, decoder, decoder.layers, _FORMS[kernel])

    @property
    def tower(self) -> Any:
        """The vision tower."""
        return self.multimodal.visual if self.family.mrope else self.multimodal.vision_tower

    @property
    def tower_blocks(self) -> Any:
        """The tower's transformer blocks."""
        if self.family.mrope:
            return self.tower.blocks
        # Older libraries wrap the tower once more.
        return getattr(self.tower, "vision_model", self.tower).encoder.layers

    def grids(self, inputs: dict[str, Any], sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Rows and columns of visual tokens of the batch's images, as far as sizes or inputs say them.

        Args:
            inputs: what the multimodal module was called with.
            sizes: visual tokens of each image; a LLaVA's are a square (and a class token, where it is not left out).
        """
        if not self.family.mrope:
            return [(isqrt(size), isqrt(size)) for size in sizes]
        grids = inputs.get("image_grid_thw")
        if grids is None:
            return []
        merge = self.config.vision_config.spatial_merge_size
        return [(rows // merge, columns // merge) for _, rows, columns in grids.tolist()]

    def grid_sizes(self, inputs: dict[str, Any]) -> list[int]:
        """Visual tokens of each image of the batch in order, where the inputs say so."""
        return [rows * columns for rows, columns in self.grids(inputs, ())]

    def queries(self, layer: int, hidden: Float[Tensor, "B L D"], rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated queries (B, H, L, d) that decoder layer `layer` computes from its input `hidden`."""
        attention = self.layers[layer].self_attn
        return self._project(layer, attention.q_proj, hidden, rotary)

    def keys(self, layer: int, hidden: Float[Tensor, "B L D"], rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated keys (B, H_kv, L, d) that decoder layer `layer` computes from its input `hidden`."""
        attention = self.layers[layer].self_attn
        return self._project(layer, attention.k_proj, hidden, rotary)

    def final_norm(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The decoder's last norm, wherever its weight lies."""
        norm = self.decoder.norm
        return norm(hidden.to(norm.weight.device)).to(hidden.device)

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables of `position_ids`, on the device and in the dtype of `hidden`."""
        cos, sin = self.decoder.rotary_emb(hidden, position_ids.to(hidden.device))
        return cos, sin

    def _project(self, layer: int, projection: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        module = self.layers[layer]
        hidden = hidden.to(device_of(projection, hidden.device))
        states = (
            projection(module.input_layernorm(hidden)).unflatten(-1, (-1, module.self_attn.head_dim)).transpose(1, 2)
        )
        cos, sin = (self._one_table(table)[:, None].to(states.device) for table in rotary)
        return rotated(states, cos, sin)

    def rotate(self, states: Float[Tensor, "B N d"], rotary: tuple[Tensor, Tensor]) -> Float[Tensor, "B N d"]:
        """One head's vectors rotated by the tables of their positions."""
        cos, sin = (self._one_table(table).to(states.device) for table in rotary)
        return rotated(states, cos, sin)

    def _one_table(self, table: Tensor) -> Tensor:
        """Older libraries hand over M-RoPE tables with three channels; newer ones have merged them already."""
        if table.dim() == 3:
            return table
        sections = self.decoder.config.rope_parameters["mrope_section"] * 2
        return torch.cat([part[i % 3] for i, part in enumerate(table.split(sections, dim=-1))], dim=-1)


def device_of(module: nn.Module, otherwise: torch.device) -> torch.device:
    """Where `module` computes; `otherwise` if it shows no tensor.

    Of no one weight: a quantised module has it under another name or packed, and so has one with an adapter around it.
    """
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), otherwise)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`states` (…, d) turned by rotary tables that broadcast to them."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin
