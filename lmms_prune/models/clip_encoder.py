"""CLIP and similar models as vision encoders: a class token and a square grid of patches.

A visual token is one patch, or a square of patches if the features are shuffled into fewer tokens before they are
projected (``patches_per_token``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import isqrt
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmms_prune.models.encoder import MOST, Encoder, cells
from lmms_prune.models.parts import device_of
from lmms_prune.models.tensors import to_device


class ClipEncoder(Encoder):
    """Reads a CLIP encoder, whose sequence is the class token followed by the patches in raster order."""

    def class_attention(self, block: int, *, one_head: bool = False) -> Float[Tensor, "B H N"]:
        query, key = self._queries_and_keys(block)
        scores = (query[:, :, :1] @ key.transpose(-1, -2)).squeeze(2)
        if one_head:
            # The queries are divided by the root of a head's width; the root of the common width is √H times that.
            scores = scores.sum(1, keepdim=True) * scores.shape[1] ** -0.5
        return self.of_view(self._squares(scores.softmax(-1), 2).sum(-1))

    def class_output(self, block: int) -> Float[Tensor, "B C"]:
        return self.of_view(self.run.outputs[block][:, 0])

    def attention_chunks(self, block: int) -> Iterator[tuple[Int[Tensor, "S q"], Int[Tensor, "S k"], Tensor]]:
        query, key = self._queries_and_keys(block)
        images, heads, count, _ = query.shape
        entries = torch.arange(images)[:, None] * count + self._entry_numbers(count)
        entries = to_device(entries, query.device)
        at_once = max(1, MOST // (heads * count**2))
        for first in range(0, images, at_once):
            chunk = slice(first, first + at_once)
            yield entries[chunk], entries[chunk], (query[chunk] @ key[chunk].transpose(-1, -2)).softmax(-1)

    def keys(self, block: int, *, one_head: bool = False) -> Float[Tensor, "B N d"]:
        x, module = self._input(block), self.parts.encoder_blocks[block]
        keys = module.self_attn.k_proj(module.layer_norm1(x))
        keys = keys.to(torch.promote_types(keys.dtype, torch.float32))
        keys = keys if one_head else keys.unflatten(-1, (self._heads, -1)).mean(2)
        return self.of_view(self._squares(keys, 1).mean(2))

    def output(self, block: int) -> Float[Tensor, "B N C"]:
        return self.of_view(self._squares(self.run.outputs[block], 1).mean(2))

    def features(self) -> Float[Tensor, "B N C"]:
        return self.output(self.shape.selected)

    def project(self, features: Float[Tensor, "B n C"]) -> Float[Tensor, "B n D"]:
        projector = self.parts.multimodal.multi_modal_projector
        # The encoder's dtype, not that of the projector's weights: quantised weights are integers.
        return projector(features.to(device_of(projector, features.device), self._patch_weight.dtype))

    def images(self) -> list[Tensor]:
        return list(self.run.pixels)

    def token_pixels(self) -> Float[Tensor, "n 3 p"]:
        # Images with class tokens have one size.
        return cells(torch.stack(self.images()), *self.grids[0]).flatten(0, 1)

    def inputs(self) -> dict[str, Tensor]:
        return {"pixel_values": self.of_view(self.run.pixels)}

    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        tokens: list[Tensor] = [torch.empty(0)] * len(images)
        # Images of one size run together.
        for shape in dict.fromkeys(image.shape for image in images):
            numbers = [i for i, image in enumerate(images) if image.shape == shape]
            batch = self.project(self.run_blocks(self.embed(torch.stack([images[i] for i in numbers])))[:, 1:])
            for i, found in zip(numbers, batch, strict=True):
                tokens[i] = found
        return tokens

    # -- the encoder in steps, for methods that merge inside it ------------------------------------------------------

    def embed(self, pixels: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b entries C"]:
        """Class token and patches as they enter block 0; positions are interpolated for images of another size."""
        encoder, weight = self._clip, self._patch_weight
        pixels = pixels.to(weight.device, weight.dtype)
        return encoder.pre_layrnorm(encoder.embeddings(pixels, interpolate_pos_encoding=True))

    @property
    def _clip(self) -> Any:
        return getattr(self.parts.encoder, "vision_model", self.parts.encoder)

    @property
    def _patch_weight(self) -> Tensor:
        """The weight of the patch convolution; quantisation does not pack convolutions, so its dtype can be trusted."""
        return self._clip.embeddings.patch_embedding.weight

    def run_blocks(self, x: Float[Tensor, "b entries C"], first: int = 0) -> Float[Tensor, "b entries C"]:
        """Run `x` through the blocks from `first` to the selected one."""
        for module in list(self.parts.encoder_blocks)[first : self.shape.selected + 1]:
            x = module(x, None)
            x = x[0] if isinstance(x, tuple) else x
        return x

    def attend(
        self, block: int, x: Float[Tensor, "b entries C"], bias: Float[Tensor, "b entries"] | None = None
    ) -> tuple[Float[Tensor, "b entries C"], Float[Tensor, "b entries d"], Float[Tensor, "b H entries entries"]]:
        """Run the attention half of `block`.

        Args:
            block: 0-based.
            x: the block's input.
            bias: added to the attention logits of each key.

        Returns:
            the states between attention and MLP, the keys (mean over heads) and the attention.
        """
        module = self.parts.encoder_blocks[block]
        attention, normed = module.self_attn, module.layer_norm1(x)
        query, key, value = (
            projection(normed).unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
        if bias is not None:
            scores = scores + bias[:, None, None].to(scores.dtype)
        weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))
        mixed = (weights.to(value.dtype) @ value).transpose(1, 2).flatten(2)
        return x + attention.out_proj(mixed), key.to(weights.dtype).mean(1), weights

    def feed(self, block: int, x: Float[Tensor, "b entries C"]) -> Float[Tensor, "b entries C"]:
        """Run the MLP half of `block`."""
        module = self.parts.encoder_blocks[block]
        return x + module.mlp(module.layer_norm2(x))

    @property
    def _heads(self) -> int:
        return self.parts.config.vision_config.num_attention_heads

    def _input(self, block: int) -> Tensor:
        return self.run.inputs[block][0]

    def _queries_and_keys(self, block: int) -> tuple[Tensor, Tensor]:
        """Scaled queries and keys (images, H, entries, d) of `block`, in float32 or finer."""
        module = self.parts.encoder_blocks[block]
        normed = module.layer_norm1(self._input(block))
        query, key = (
            projection(normed).unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for projection in (module.self_attn.q_proj, module.self_attn.k_proj)
        )
        fine = torch.promote_types(query.dtype, torch.float32)
        return query.to(fine) * query.shape[-1] ** -0.5, key.to(fine)

    def _entry_numbers(self, count: int) -> Int[Tensor, " entries"]:
        """For each entry of the encoder its number in the order in which the patches of a visual token are adjacent."""
        first, numbers = self.shape.class_tokens, torch.arange(count)
        grouped = self._squares(torch.arange(count), 0).flatten()
        numbers[grouped] = torch.arange(first, count)
        return numbers

    def _squares(self, entries: Tensor, dim: int) -> Tensor:
        """Entries along `dim` as two dimensions: visual tokens, and the patches of each; without the class token."""
        patches = entries.narrow(dim, self.shape.class_tokens, entries.shape[dim] - self.shape.class_tokens)
        merge, side = isqrt(self.shape.patches_per_token), isqrt(patches.shape[dim])
        grid = patches.unflatten(dim, (side // merge, merge, side // merge, merge)).transpose(dim + 1, dim + 2)
        return grid.flatten(dim + 2, dim + 3).flatten(dim, dim + 1)
