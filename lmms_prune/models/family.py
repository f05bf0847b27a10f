"""The contract of a model family: one object with everything that differs between architectures. Free of torch.

A new family is a subclass in a file of its own in this folder, with its vision encoder, and a row in `FAMILIES`.
Dimension letters: B rows, L sequence, d rotary channels, I images of a batch, P patches.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lmms_prune.errors import BrokenImageError

if TYPE_CHECKING:
    from lmms_prune.models.mosaic import Mosaic
    from lmms_prune.models.shape import EncoderShape
    from lmms_prune.models.sizes import Architecture

Grid = tuple[int, int]
"""Rows and columns of an image's visual tokens."""


@dataclass(frozen=True)
class Family(ABC):
    """One model architecture.

    Args:
        model_type: the checkpoint's ``config.model_type``.
        model_name: the name under which lmms-eval finds this package's model.
        title: the name in papers.
        checkpoint: the checkpoint that is loaded if none is named.
        stock_model: lmms-eval's own model of the same checkpoints.
        renumbers: whether positions may be renumbered after a stage. With M-RoPE they may not: a token's height and
            width are channels of its position.
        example: rows and columns of the visual tokens of an example image, for estimates of cost.
        defaults: model arguments whose default depends on the family.
        refused: model arguments that have no meaning for this family.
        arguments: model arguments that have a meaning for families that name them alone.
        trims_answers: whether lmms-eval's own model strips its answers and ends them at a blank line too, which the harness
            fills in as the stop text of tasks that state none.
        image_arguments: arguments of ``forward`` about images beyond those that all families have.
        published: the parts of published checkpoints' ``config.json`` that decide sizes, by short names.
    """

    model_type: str
    model_name: str
    title: str
    checkpoint: str
    stock_model: str
    renumbers: bool
    example: Grid
    defaults: Mapping[str, Any] = field(default_factory=dict, hash=False, repr=False)
    refused: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    trims_answers: bool = False
    image_arguments: tuple[str, ...] = ()
    published: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False, repr=False)

    @property
    def published_default(self) -> str:
        """The name in `published` of the default checkpoint."""
        return next(name for name in self.published if name in self.checkpoint.lower())

    @property
    def tiled(self) -> bool:
        """Whether images are encoded in tiles, so that an image is no single rectangle of tokens."""
        return type(self).mosaics is not Family.mosaics

    # -- visual tokens in a prompt ---------------------------------------------------------------------------------

    @abstractmethod
    def tokens_per_image(self, config: Any) -> int | None:
        """Visual tokens of every image, or None where images differ in size.

        Raises:
            UnsupportedModelError: a checkpoint with another vision encoder.
        """

    @abstractmethod
    def grids(self, config: Any, inputs: Mapping[str, Any], sizes: Sequence[int]) -> list[Grid]:
        """The grid of each image of a batch, if `inputs` or `sizes` determine it; otherwise an empty list.

        Args:
            config: the checkpoint's configuration.
            inputs: the multimodal module's arguments.
            sizes: visual tokens of each image, if already known.
        """

    def image_sizes(self, config: Any, inputs: Mapping[str, Any]) -> list[int]:
        """Visual tokens of each image of a batch, if `inputs` determine them; otherwise an empty list.

        A family whose images have tokens outside the grid (newline tokens, thumbnails) counts them here.
        """
        return [rows * columns for rows, columns in self.grids(config, inputs, ())]

    def mosaics(self, config: Any, inputs: Mapping[str, Any]) -> list[Mosaic]:
        """Where the patches of each image of a batch are among its tokens, of a family that encodes images in tiles.

        An empty list where every image is one rectangle of tokens; otherwise `grids` returns none.
        """
        return []

    @abstractmethod
    def grids_of_thw(self, config: Any, thw: Any) -> list[Grid]:
        """The grids of the image sizes (I, 3) passed to the vision encoder; empty if the encoder takes no sizes."""

    def spans(self, visual: Sequence[bool], fixed: int | None, sizes: Sequence[int]) -> list[tuple[int, int]]:
        """Start and length of each image's visual tokens in one row.

        Args:
            visual: whether each token of the row is visual.
            fixed: visual tokens of an image where all images have the same, else None.
            sizes: visual tokens of each of the row's images in order where they differ (taken from the front; may be
                empty, then every run of visual tokens is one image).

        Raises:
            BrokenImageError: the runs of visual tokens cannot be split into complete images.
        """
        spans, start, remaining_sizes = [], 0, iter(sizes)
        for is_visual, run in groupby(visual):
            length = len(list(run))
            while is_visual and length:
                size = fixed or next(remaining_sizes, length)
                if size > length:
                    raise BrokenImageError(f"a run of {length} visual tokens does not hold a whole image of {size}.")
                spans.append((start, size))
                start, length = start + size, length - size
            start += length
        return spans

    # -- the vision encoder ----------------------------------------------------------------------------------------

    @abstractmethod
    def encoder(self, multimodal: Any) -> Any:
        """The module that encodes the images."""

    @abstractmethod
    def encoder_blocks(self, encoder: Any) -> Any:
        """Its transformer blocks, in order."""

    @abstractmethod
    def last_of_vision(self, multimodal: Any) -> Any:
        """The module whose output enters the decoder: the projector, or the encoder that holds it."""

    @abstractmethod
    def encoder_shape(self, config: Any) -> EncoderShape:
        """The encoder's shape, from which a method chooses the blocks that it reads.

        Raises:
            UnsupportedModelError: a checkpoint whose visual tokens are computed in another way.
        """

    @abstractmethod
    def encoder_inputs(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
        """The pixels and the images' sizes (or None) in a call of the encoder."""

    @abstractmethod
    def signals_class(self) -> Any:
        """The `lmms_prune.models.encoder.Encoder` subclass that reads the records of this family's encoder."""

    # -- the decoder -----------------------------------------------------------------------------------------------

    def query_projection(self, layer: Any) -> tuple[Any, Any]:
        """The module of a decoder layer that projects queries, and the norm that is applied to each head (or None)."""
        return layer.self_attn.q_proj, getattr(layer.self_attn, "q_norm", None)

    def key_projection(self, layer: Any) -> tuple[Any, Any]:
        """The module of a decoder layer that projects keys, and the norm that is applied to each head (or None)."""
        return layer.self_attn.k_proj, getattr(layer.self_attn, "k_norm", None)

    def value_projection(self, layer: Any) -> Any:
        """The module of a decoder layer that projects values."""
        return layer.self_attn.v_proj

    def rotary_table(self, decoder: Any, table: Any) -> Any:
        """A cosine or sine table (B or 1, L, d) as attention uses it, from the output of the decoder's rotary module."""
        return table

    @property
    def adds_between_layers(self) -> bool:
        """Whether the decoder adds tensors to visual tokens between its layers."""
        return type(self).between_layers is not Family.between_layers

    def between_layers(self, kwargs: dict[str, Any]) -> tuple[dict[str, Any], Sequence[Any]]:
        """The tensors that the decoder adds to visual tokens between its layers (DeepStack); by default none.

        Args:
            kwargs: the decoder's arguments.

        Returns:
            the decoder's arguments without these tensors, so that it adds nothing itself; and, for each layer from the
            first, one tensor (tokens, D) over the visual tokens of the batch, which is added to the layer's output.
            Pruning adds it instead, so that every kept token gets its own row.
        """
        return kwargs, ()

    def additions(self, encoded: Any) -> Sequence[Any]:
        """The same tensors, for the images of one call of the vision encoder, from its output; by default none."""
        return ()

    # -- what a forward needs --------------------------------------------------------------------------------------

    def extra_inputs(self, config: Any, ids: Any) -> dict[str, Any]:
        """Further inputs that a forward pass on token ids (B, L) needs, as the processor returns them."""
        return {}

    def tile_tokens(self, config: Any) -> int:
        """Visual tokens of a whole tile; 0 where an image is encoded whole."""
        return 0

    @abstractmethod
    def only_grid(self, config: Any) -> Grid | None:
        """The grid of every image, or None where images differ in size."""

    @abstractmethod
    def image_inputs(self, config: Any, grid: Grid, noise: Any) -> dict[str, Any]:
        """One image's inputs besides its tokens: pixels from `noise(shape)`, and their size if the model takes one."""

    def joined(self, images: Sequence[Mapping[str, Any]], dtype: Any) -> dict[str, Any]:
        """The inputs of several images (`image_inputs`) as those of one batch, pixels in `dtype`."""
        import torch

        inputs = {name: torch.cat([image[name] for image in images]) for name in (images[0] if images else ())}
        return {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}

    def pixel_side(self, config: Any) -> int:
        """Pixels along one side of a visual token."""
        return int(config.vision_config.patch_size)

    def markers(self, config: Any) -> tuple[list[int], list[int]]:
        """Token ids before and after an image in a prompt."""
        return [], []

    # -- prompts and answers ---------------------------------------------------------------------------------------

    def processor_options(self, arguments: Any) -> dict[str, Any]:
        """Options with which the checkpoint's processor is loaded."""
        return {}

    def processor_fault(self, processor: Any, config: Any) -> str:
        """What is missing in the checkpoint's processor, with the fix, where it would fail or miscount at every image; else ""."""
        return ""

    def prepare_model(self, model: Any, arguments: Any) -> None:  # noqa: B027  (most families need nothing)
        """Change a loaded model as the arguments with which it was loaded say; by default nothing."""

    def prepare_processor(self, processor: Any, arguments: Any) -> None:  # noqa: B027  (most families need nothing)
        """Change a loaded processor as its model is changed; by default nothing."""

    @abstractmethod
    def processed(
        self, processor: Any, prompts: list[str], messages: list[list[dict[str, Any]]], arguments: Any
    ) -> Any:
        """The processor's output for a batch, left-padded.

        Args:
            processor: the checkpoint's.
            prompts: the messages as texts, by the chat template.
            messages: with the images.
            arguments: the run's `lmms_prune.harness.arguments.ModelArguments`.
        """

    def decoded(self, tokenizer: Any, ids: list[int]) -> str:
        """The text of generated tokens, as lmms-eval's own model of the family decodes it."""
        return str(tokenizer.decode(ids, skip_special_tokens=True))

    def view_of(self, settings: Mapping[str, str]) -> str:
        """The part of an image that a run with these settings shows to the model: "crop", "pad", "whole" or "opaque".

        The last is the whole without transparency: what is transparent has the colour that lies below.
        """
        return "whole"

    # -- sizes -----------------------------------------------------------------------------------------------------

    @abstractmethod
    def architecture(self, config: Mapping[str, Any], name: str) -> Architecture:
        """The sizes that a ``config.json`` states, with the library's defaults for those that it omits.

        Raises:
            ArchitectureError: it states an invalid size.
        """

    @abstractmethod
    def random_config(self, published: str, layers: int | None) -> Any:
        """The configuration of a published checkpoint, with `layers` decoder layers if given.

        Raises:
            KeyError: no such name in `published`.
        """
