"""The parts of a loaded checkpoint: its decoder, its layers, its vision encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from lmms_prune.compat.versions import refuse_other_versions
from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models import FAMILIES, family_of
from lmms_prune.models.adapters import unwrapped
from lmms_prune.models.family import Family, Grid
from lmms_prune.models.kernels import KERNELS, MaskForm, how_to_get
from lmms_prune.models.mosaic import Mosaic
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import finest

# Everything that touches a model imports this module. Schedules and the examination of an installation do not, so they
# work with any version.
refuse_other_versions()


def refuse_wrapper(model: Any) -> None:
    """Refuse a wrapper around a model: it forwards some attributes, but hooks and a replaced `generate` do not work on it.

    Raises:
        UnsupportedModelError: `model` is a module around a supported one; says how to reach the inner model.
    """
    if not isinstance(model, nn.Module):
        return
    candidates = [model, dict(model.named_children()).get("model")]
    if any(isinstance(part, nn.Module) and "language_model" in dict(part.named_children()) for part in candidates):
        return
    configs = (getattr(module, "config", None) for module in model.modules() if module is not model)
    if any(getattr(config, "model_type", None) in FAMILIES for config in configs):
        raise UnsupportedModelError(
            f"{type(model).__name__} is a wrapper around a model; pass the model inside it (PEFT: get_base_model(), "
            "torch.compile: _orig_mod, or use model.compile(), DistributedDataParallel: module)."
        )


@dataclass(frozen=True)
class ModelParts:
    """The parts of one loaded model.

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
        """Find the parts of `model`, which may be inside a `peft.PeftModel`.

        Raises:
            UnsupportedModelError: another family, a wrapper, another attention kernel, or a decoder with sliding windows or experts.
        """
        model = unwrapped(model)
        refuse_wrapper(model)
        config = getattr(model, "config", None)
        family = family_of(config)
        multimodal = model if hasattr(model, "language_model") else model.model
        decoder = multimodal.language_model
        kernel = decoder.config._attn_implementation
        if kernel not in KERNELS:
            message = f"attn_implementation '{kernel}' is not supported. Use one of {', '.join(KERNELS)}."
            if str(kernel).startswith("kernels-community/"):
                # transformers falls back on a kernel of the hub, if the package `kernels` is installed.
                message += f" (If you asked for another, it is not installed: {how_to_get('flash_attention_2')})"
            raise UnsupportedModelError(message)
        return cls(family, config, multimodal, decoder, decoder.layers, KERNELS[kernel].form)

    @property
    def tokens_per_image(self) -> int | None:
        """Visual tokens of every image, or None where images differ in size."""
        return self.family.tokens_per_image(self.config)

    @property
    def tiled(self) -> bool:
        """Whether images are encoded in tiles, so that an image is no single rectangle of tokens."""
        return self.family.tiled

    @property
    def encoder(self) -> Any:
        """The vision encoder."""
        return self.family.encoder(self.multimodal)

    @property
    def encoder_blocks(self) -> Any:
        """Its transformer blocks."""
        return self.family.encoder_blocks(self.encoder)

    @property
    def encoder_shape(self) -> EncoderShape:
        """The encoder's shape; raises as `Family.encoder_shape`."""
        return self.family.encoder_shape(self.config)

    def grids(self, inputs: dict[str, Any], sizes: Sequence[int]) -> list[Grid]:
        """Rows and columns of visual tokens of the batch's images, if sizes or inputs determine them.

        Args:
            inputs: the multimodal module's arguments.
            sizes: visual tokens of each image.
        """
        return self.family.grids(self.config, inputs, sizes)

    def rectangles(self, inputs: dict[str, Any], sizes: Sequence[int]) -> list[tuple[Grid, ...]]:
        """The grids of each of the batch's images: one, or those of the base and the canvas of an image in tiles.

        Args:
            inputs, sizes: as for `grids`.
        """
        if self.tiled:
            return [mosaic.rectangles for mosaic in self.mosaics(inputs)]
        return [(grid,) for grid in self.grids(inputs, sizes)]

    def mosaics(self, inputs: dict[str, Any]) -> list[Mosaic]:
        """The tiles of the batch's images; empty where images are encoded whole."""
        return self.family.mosaics(self.config, inputs)

    def record_additions(self, additions: list[Tensor]) -> Any:
        """Let the decoder's next call fill `additions` with what it adds to visual tokens between its layers (DeepStack).

        Whoever runs the layers one by one must add them after each: `Family.between_layers`. Returns the hook's handle.
        """

        def record(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            additions[:] = self.family.between_layers(dict(kwargs))[1]

        return self.decoder.register_forward_pre_hook(record, with_kwargs=True)

    def spans(self, visual: Sequence[bool], inputs: dict[str, Any]) -> list[tuple[int, int]]:
        """Start and length of each image's visual tokens in the only row of a batch.

        Args:
            visual: whether each token of the row is visual.
            inputs: the multimodal module's arguments.

        Raises:
            BrokenImageError: the runs of visual tokens cannot be split into complete images.
        """
        return self.family.spans(visual, self.tokens_per_image, self.image_sizes(inputs))

    def image_sizes(self, inputs: dict[str, Any]) -> list[int]:
        """Visual tokens of each image of the batch in order, if the inputs determine them."""
        return self.family.image_sizes(self.config, inputs)

    def queries(self, layer: int, hidden: Float[Tensor, "B L D"], rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated queries (B, H, L, d) that decoder layer `layer` computes from its input `hidden`."""
        return self._project(layer, *self.family.query_projection(self.layers[layer]), hidden, rotary)

    def keys(self, layer: int, hidden: Float[Tensor, "B L D"], rotary: tuple[Tensor, Tensor]) -> Tensor:
        """Rotated keys (B, H_kv, L, d) that decoder layer `layer` computes from its input `hidden`."""
        return self._project(layer, *self.family.key_projection(self.layers[layer]), hidden, rotary)

    def values(self, layer: int, hidden: Float[Tensor, "B L D"]) -> Tensor:
        """Values (B, H_kv, L, d) that decoder layer `layer` computes from its input `hidden`."""
        module, projection = self.layers[layer], self.family.value_projection(self.layers[layer])
        states = projection(module.input_layernorm(hidden.to(device_of(projection, hidden.device))))
        return states.unflatten(-1, (-1, module.self_attn.head_dim)).transpose(1, 2)

    def rotary_means(self, position_ids: Int[Tensor, "*C B N"]) -> tuple[Tensor, Tensor]:
        """The mean over all frequencies of cosines and sines of positions, from float32 tables.

        Args:
            position_ids: (B, N), or (3, B, N) of a decoder that is called with three channels; each has its own mean.
        """
        flat = position_ids.flatten(0, -2)
        # All channels alike: a table of three channels then holds every frequency of one position.
        alike = flat.expand(3, -1, -1) if position_ids.dim() == 3 else flat
        tables = self.rotary(torch.zeros(1, device=flat.device), alike)
        cos, sin = (self.family.rotary_table(self.decoder, table) for table in tables)
        # Summed in the finest type, from where they are equal if the positions are.
        cos, sin = (table.to(finest(table.device)).mean(-1).view(position_ids.shape) for table in (cos, sin))
        return cos, sin

    def final_norm(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """The decoder's last norm, computed on the device of its weight."""
        norm = self.decoder.norm
        return norm(hidden.to(norm.weight.device)).to(hidden.device)

    def rotary(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine tables of `position_ids`, on the device and in the dtype of `hidden`."""
        cos, sin = self.decoder.rotary_emb(hidden, position_ids.to(hidden.device))
        return cos, sin

    def _project(self, layer: int, projection: Any, norm: Any, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        module = self.layers[layer]
        hidden = hidden.to(device_of(projection, hidden.device))
        states = projection(module.input_layernorm(hidden)).unflatten(-1, (-1, module.self_attn.head_dim))
        states = (states if norm is None else norm(states)).transpose(1, 2)
        cos, sin = (self.family.rotary_table(self.decoder, table)[:, None].to(states.device) for table in rotary)
        return rotated(states, cos, sin)

    def rotate(self, states: Float[Tensor, "B N d"], rotary: tuple[Tensor, Tensor]) -> Float[Tensor, "B N d"]:
        """One head's vectors rotated by the tables of their positions."""
        cos, sin = (self.family.rotary_table(self.decoder, table).to(states.device) for table in rotary)
        return rotated(states, cos, sin)


def device_of(module: nn.Module, otherwise: torch.device) -> torch.device:
    """The device of `module`; `otherwise` if it has no parameter or buffer.

    Any tensor is used rather than `weight`: quantised modules and adapters rename or pack their weights.
    """
    return next((tensor.device for tensor in chain(module.parameters(), module.buffers())), otherwise)


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`states` (…, d) turned by rotary tables that broadcast to them."""
    first, second = states.chunk(2, dim=-1)
    return states * cos + torch.cat((-second, first), dim=-1) * sin
