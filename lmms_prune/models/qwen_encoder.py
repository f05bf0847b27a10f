"""Qwen2.5-VL's vision encoder: no class token, four patches a visual token, most blocks attend in windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmms_prune.models.encoder import MOST, Encoder
from lmms_prune.models.parts import rotated


class QwenEncoder(Encoder):
    """Reads Qwen2.5-VL's encoder, whose patches are in window order, four adjacent ones for each visual token."""

    def attention_chunks(self, block: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        query, key = self._queries_and_keys(block)
        fine = torch.promote_types(query.dtype, torch.float32)
        bounds, starts = self.run.inputs[block][1]["cu_seqlens"].tolist(), self._starts
        image = 0
        for low, high in pairwise(bounds):
            while low >= starts[image + 1]:
                image += 1
            entry = self._raster[low:high] - starts[image]
            keys = key[:, low:high].to(fine).transpose(-1, -2)
            rows = max(1, MOST // (keys.shape[0] * (high - low)))
            for first in range(low, high, rows):
                last = min(first + rows, high)
                attention = (query[:, first:last].to(fine) @ keys).softmax(-1)
                yield image, entry[first - low : last - low], entry, attention

    def keys(self, block: int) -> Float[Tensor, "B N d"]:
        return self._tokens(self._queries_and_keys(block)[1].mean(0))

    def output(self, block: int) -> Float[Tensor, "B N C"]:
        return self._tokens(self.run.outputs[block])

    def features(self) -> Float[Tensor, "B N C"]:
        assert self.run.features is not None, "the method's signals do not include features"
        return self._align(self.run.features.split([h * w for h, w in self.grids]))

    def project(self, features: Float[Tensor, "B n C"]) -> Float[Tensor, "B n D"]:
        return features

    def images(self) -> list[Tensor]:
        """The pixels of each image; a patch consists of two equal frames, of which the first is read."""
        vision = self.parts.config.vision_config
        side, merge = vision.patch_size, vision.spatial_merge_size
        pictures, start = [], 0
        for rows, columns in self.grids:
            count = rows * columns * merge**2
            patches = self.run.pixels[start : start + count]
            shape = (rows, columns, merge, merge, -1, vision.temporal_patch_size, side, side)
            # token row, token column, patch row, patch column, colour, frame, pixel row, pixel column
            picture = patches.reshape(shape)[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6)
            pictures.append(picture.reshape(-1, rows * merge * side, columns * merge * side))
            start += count
        return pictures

    def inputs(self) -> dict[str, Tensor]:
        assert self.run.grids is not None
        patches = self.run.pixels.split([self._patches * rows * columns for rows, columns in self.grids])
        return {
            "pixel_values": torch.cat([patches[i] for i in self.owner]),
            "image_grid_thw": self.run.grids[self.owner],
        }

    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        vision = self.parts.config.vision_config
        side, merge, frames = vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size
        patches, grids = [], []
        for image in images:
            rows, columns = image.shape[1] // side, image.shape[2] // side
            shape = (-1, rows // merge, merge, side, columns // merge, merge, side)
            parts = image.reshape(shape).permute(1, 4, 2, 5, 0, 3, 6)[:, :, :, :, :, None]
            parts = parts.expand(*parts.shape[:5], frames, side, side)
            patches.append(parts.reshape(rows * columns, -1))
            grids.append([1, rows, columns])
        encoder = self.parts.encoder
        pixels = torch.cat(patches).to(encoder.patch_embed.proj.weight.device, encoder.patch_embed.proj.weight.dtype)
        output = encoder(pixels, grid_thw=torch.tensor(grids, device=pixels.device))
        merged = output if isinstance(output, Tensor) else output.pooler_output
        return list(merged.split([rows * columns // merge**2 for _, rows, columns in grids]))

    @property
    def _patches(self) -> int:
        return self.shape.patches_per_token

    @cached_property
    def _starts(self) -> list[int]:
        """The first patch of each image, and the number of all patches."""
        starts = [0]
        for rows, columns in self.grids:
            starts.append(starts[-1] + self._patches * rows * columns)
        return starts

    @cached_property
    def _raster(self) -> Int[Tensor, " P"]:
        """For each patch in the encoder's window order, its number when visual tokens are in raster order."""
        vision = self.parts.config.vision_config
        side, merge = vision.window_size // vision.patch_size // vision.spatial_merge_size, vision.spatial_merge_size**2
        orders, start = [], 0
        for rows, columns in self.grids:
            row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            window = (row // side) * columns + column // side
            orders.append(start + window.flatten().argsort(stable=True))
            start += rows * columns
        tokens = torch.cat(orders)
        patches = tokens[:, None] * merge + torch.arange(merge)
        return patches.flatten().to(next(iter(self.run.inputs.values()))[0].device if self.run.inputs else "cpu")

    def _queries_and_keys(self, block: int) -> tuple[Tensor, Tensor]:
        """Scaled queries and keys (H, P, d) of `block` after rotation, in the encoder's order."""
        x, kwargs = self.run.inputs[block]
        module = self.parts.encoder_blocks[block]
        heads = self.parts.config.vision_config.num_heads
        query, key, _ = module.attn.qkv(module.norm1(x)).unflatten(-1, (3, heads, -1)).unbind(1)
        cos, sin = (
            table[:, None].to(torch.promote_types(x.dtype, torch.float32)) for table in kwargs["position_embeddings"]
        )
        query, key = (rotated(states.to(cos.dtype), cos, sin).transpose(0, 1) for states in (query, key))
        return query * query.shape[-1] ** -0.5, key

    def _by_image(self, recorded: Tensor) -> Sequence[Tensor]:
        # The record holds patches, in windows of one image each, or merged tokens.
        tokens = [rows * columns for rows, columns in self.grids]
        return recorded.split([count * (len(recorded) // sum(tokens)) for count in tokens])

    def _tokens(self, patches: Float[Tensor, "P C"]) -> Float[Tensor, "B N C"]:
        """Patches in the encoder's order as visual tokens, each the mean over its patches."""
        raster = torch.empty_like(patches)
        raster[self._raster.to(patches.device)] = patches
        return self._align(
            [self._pool(x) for x in raster.split([self._patches * rows * columns for rows, columns in self.grids])]
        )

    def _sums(self) -> list[Tensor]:
        x = next(iter(self.run.inputs.values()))[0]
        fine = torch.promote_types(x.dtype, torch.float32)
        return [
            torch.zeros(self._patches * rows * columns, dtype=fine, device=x.device) for rows, columns in self.grids
        ]

    def _pool(self, entries: Tensor) -> Tensor:
        return entries.unflatten(0, (-1, self._patches)).mean(1)
