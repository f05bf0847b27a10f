"""CLIP and similar models as vision encoders: a class token and a square grid of patches.

A visual token is one patch, or a square of patches if the features are shuffled into fewer tokens before they are
projected (``patches_per_token``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from math import isqrt
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from lmms_prune.compat.transformers import attend
from lmms_prune.models.encoder import MOST, Encoder, EncoderRun, cells, taken
from lmms_prune.models.mosaic import Tiles
from lmms_prune.models.parts import ModelParts, device_of
from lmms_prune.models.tensors import is_finite, to_device


class ClipEncoder(Encoder):
    """Reads a CLIP encoder, whose sequence is the class token followed by the patches in raster order."""

    def class_attention(self, block: int, *, one_head: bool = False) -> Float[Tensor, "B H N"]:
        query, key = self._queries_and_keys(block)
        scores = (query[:, :, :1] @ key.transpose(-1, -2)).squeeze(2)
        if one_head:
            # The queries are divided by the root of a head's width; the root of the common width is √H times that.
            scores = scores.sum(1, keepdim=True) * scores.shape[1] ** -0.5
        # Tokens are the second dimension of what `of_view` takes.
        return self.of_view(self._squares(scores.softmax(-1), 2).sum(-1).transpose(1, 2)).transpose(1, 2)

    def class_output(self, block: int) -> Float[Tensor, "B C"]:
        return self.of_images(self.run.outputs[block][:, 0])

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
        return {"pixel_values": self.of_images(self.run.pixels)}

    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        tokens: list[Tensor] = [torch.empty(0)] * len(images)
        # Images of one size run together.
        for shape in dict.fromkeys(image.shape for image in images):
            numbers = [i for i, image in enumerate(images) if image.shape == shape]
            batch = self.project(self.run_blocks(self.embed(torch.stack([images[i] for i in numbers])))[:, 1:])
            for i, image_tokens in zip(numbers, batch, strict=True):
                tokens[i] = image_tokens
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
    ) -> tuple[Float[Tensor, "b entries C"], Float[Tensor, "b H entries d"]]:
        """Run the attention half of `block`: the block's own operations, by the attention kernel that it runs with.

        Args:
            block: 0-based.
            x: the block's input.
            bias: added to the attention logits of each key, in the type of `x`. Kernels that take none are replaced by
                torch's own.

        Returns:
            the states between attention and MLP, and the keys.
        """
        module = self.parts.encoder_blocks[block]
        attention, normed = module.self_attn, module.layer_norm1(x)
        # Spelled out: launches inside a generator would not be counted as the block's own.
        projected = attention.q_proj(normed), attention.k_proj(normed), attention.v_proj(normed)
        query, key, value = (part.unflatten(-1, (self._heads, -1)).transpose(1, 2) for part in projected)
        mixed = attend(attention, query, key, value, None if bias is None else bias[:, None, None])
        return x + attention.out_proj(mixed.flatten(2)), key

    def class_row(
        self, block: int, x: Float[Tensor, "b entries C"], bias: Float[Tensor, "b entries"] | None = None
    ) -> Float[Tensor, "b entries"]:
        """The class token's attention to each entry in `block` (mean over heads); arguments as those of `attend`."""
        query, key = self._queries_and_keys(block, x)
        # With all queries: the product of a single row rounds differently from batch to batch, and so decides ties.
        scores = (query @ key.transpose(-1, -2))[:, :, 0]
        scores = scores if bias is None else scores + bias[:, None].to(scores.dtype)
        return scores.softmax(-1).mean(1)

    def feed(self, block: int, x: Float[Tensor, "b entries C"]) -> Float[Tensor, "b entries C"]:
        """Run the MLP half of `block`."""
        module = self.parts.encoder_blocks[block]
        return x + module.mlp(module.layer_norm2(x))

    @property
    def _heads(self) -> int:
        return self.parts.config.vision_config.num_attention_heads

    def _input(self, block: int) -> Tensor:
        return self.run.inputs[block][0]

    def _queries_and_keys(self, block: int, x: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Scaled queries and keys (images, H, entries, d) of `block`, in float32 or finer; `x` replaces its own input."""
        module = self.parts.encoder_blocks[block]
        normed = module.layer_norm1(self._input(block) if x is None else x)
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


class TiledClipEncoder(ClipEncoder):
    """Reads a CLIP encoder that saw each image in several tiles; a signal of a token is that of its patch in its tile.

    The images of the run are the tiles. Attention is normalised within a tile, and scores of different tiles are compared
    as they are. Where a method reads one vector of an image (its class token), it is that of the base, or of the region's
    own tile.

    Args:
        parts, run: as for `Encoder`.
        tiles: the images, and the rows of the view.
    """

    def __init__(self, parts: ModelParts, run: EncoderRun, tiles: Tiles):
        images = tiles.mosaics
        self._firsts = list(accumulate((image.encoded for image in images), initial=0))
        sources = [[images[image].sources[number] for number in region.raster] for image, region in tiles.rows]
        firsts = [self._firsts[image] for image, _ in tiles.rows]
        self._sources = [
            [(first + tile, cell) for tile, cell in row] for first, row in zip(firsts, sources, strict=True)
        ]
        owner = [row[0][0] for row in self._sources]
        super().__init__(
            parts, run, owner, [(image.side, image.side) for image in images for _ in range(image.encoded)]
        )
        self.tiles = tiles

    def of_view(self, x: Shaped[Tensor, "I P *C"]) -> Shaped[Tensor, "B N *C"]:
        return self.aligned(x.flatten(0, 1))

    def aligned(
        self, tokens: Shaped[Tensor, " n *C"], images: Sequence[int] | None = None, per: int = 1
    ) -> Shaped[Tensor, "B N *C"]:
        if images is not None:
            return super().aligned(tokens, images, per)
        key = ("regions", per, tokens.device)
        if key not in self._rows:
            square, part = self.sizes[0], torch.arange(per)
            numbers = [torch.tensor([tile * square + cell for tile, cell in row]) for row in self._sources]
            flat = [(per * row[:, None] + part).flatten() for row in numbers]
            table = torch.nn.utils.rnn.pad_sequence(flat, batch_first=True, padding_value=-1)
            rows = to_device(table, tokens.device)
            self._rows[key] = rows, rows < 0
        return taken(tokens, *self._rows[key])

    def finite(self) -> Bool[Tensor, " B"]:
        tensors = [states for states, _ in self.run.inputs.values()] + list(self.run.outputs.values())
        if not tensors:
            return torch.ones(len(self.owner), dtype=torch.bool, device=self.run.pixels.device)
        tiles = torch.stack([is_finite(x).flatten(1).all(1).to(tensors[0].device) for x in tensors]).all(0)
        # A region's own tiles, each at least once.
        own = [sorted({tile for tile, _ in row}) for row in self._sources]
        most = max(map(len, own))
        numbers = to_device([tiles_of + tiles_of[:1] * (most - len(tiles_of)) for tiles_of in own], tiles.device)
        return tiles[numbers].all(1)

    def inputs(self) -> dict[str, Tensor]:
        images, pixels = [self.tiles.mosaics[number] for number in self.tiles.encoded], self.run.pixels
        if self.tiles.encoded != list(range(len(self.tiles.mosaics))):
            firsts = [self._firsts[number] for number in self.tiles.encoded]
            tiles = [first + tile for first, image in zip(firsts, images, strict=True) for tile in range(image.encoded)]
            pixels = pixels[to_device(tiles, pixels.device)]
        # The model takes the tiles of all images one after another, too.
        sizes = to_device([image.size for image in images], pixels.device)
        return {"pixel_values": pixels, "image_sizes": sizes}
