"""The vision encoder of Qwen's models: no class token, four patches a visual token, blocks may attend in windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.models.encoder import MOST, Encoder
from lmms_prune.models.parts import rotated
from lmms_prune.models.tensors import is_finite, to_device


class QwenEncoder(Encoder):
    """Reads Qwen's encoder: four adjacent patches for each visual token, in window order if it has windows."""

    def attention_chunks(self, block: int) -> Iterator[tuple[Int[Tensor, "S q"], Int[Tensor, "S k"], Tensor]]:
        query, key = self._queries_and_keys(block)
        fine = torch.promote_types(query.dtype, torch.float32)
        query, key = query.to(fine), key.to(fine)
        in_windows = self.shape.in_windows(block)
        lengths = self._window_lengths if in_windows else [self._patches * size for size in self.sizes]
        starts = [0, *accumulate(lengths)]
        for length in dict.fromkeys(lengths):
            # All windows (or images) of one size at once.
            lows = torch.tensor([low for low, n in zip(starts, lengths, strict=False) if n == length])
            places = to_device(lows[:, None] + torch.arange(length), query.device)
            numbers = self._raster[places]
            heads = len(query)
            at_once = max(1, MOST // (heads * length**2))
            rows = max(1, MOST // (heads * length)) if at_once == 1 else length
            for group in range(0, len(lows), at_once):
                chosen = slice(group, group + at_once)
                keys = key[:, places[chosen]].transpose(0, 1).transpose(-1, -2)
                for first in range(0, length, rows):
                    piece = slice(first, first + rows)
                    some = query[:, places[chosen, piece]].transpose(0, 1)
                    yield numbers[chosen, piece], numbers[chosen], (some @ keys).softmax(-1)

    def keys(self, block: int, *, one_head: bool = False) -> Float[Tensor, "B N d"]:
        keys = self._queries_and_keys(block)[1]
        return self._tokens(keys.transpose(0, 1).flatten(1) if one_head else keys.mean(0))

    def output(self, block: int) -> Float[Tensor, "B N C"]:
        return self._tokens(self.run.outputs[block])

    def features(self) -> Float[Tensor, "B N C"]:
        assert self.run.features is not None, "the method's signals do not include features"
        return self.aligned(self.run.features)

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
        patches = self.run.pixels.split(self.entries)
        return {
            "pixel_values": torch.cat([patches[i] for i in self.owner]),
            "image_grid_thw": self.of_view(self.run.grids),
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
        output = encoder(pixels, grid_thw=to_device(grids, pixels.device))
        merged = output if isinstance(output, Tensor) else output.pooler_output
        merged = torch.cat([merged, *self.parts.family.additions(output)], dim=-1)
        return list(merged.split([rows * columns // merge**2 for _, rows, columns in grids]))

    @property
    def _patches(self) -> int:
        return self.shape.patches_per_token

    @cached_property
    def _windows(self) -> list[Int[Tensor, " n"]]:
        """The window of each visual token in raster order, for each image of the run (host): one if there are none."""
        windows = []
        for rows, columns in self.grids:
            side = self.shape.window or max(rows, columns)
            row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            windows.append(((row // side) * columns + column // side).flatten())
        return windows

    @property
    def _window_lengths(self) -> list[int]:
        """The patches of each window, in the encoder's order."""
        return [int(n) * self._patches for window in self._windows for n in window.unique(return_counts=True)[1]]

    @cached_property
    def _raster(self) -> Int[Tensor, " P"]:
        """For each patch in the encoder's window order, its number when visual tokens are in raster order."""
        starts = accumulate(self.sizes, initial=0)
        tokens = torch.cat(
            [start + window.argsort(stable=True) for start, window in zip(starts, self._windows, strict=False)]
        )
        patches = (tokens[:, None] * self._patches + torch.arange(self._patches)).flatten()
        records = [states for states, _ in self.run.inputs.values()] + list(self.run.outputs.values())
        return to_device(patches, records[0].device) if records else patches

    @cached_property
    def _computed(self) -> dict[int, tuple[Tensor, Tensor]]:
        return {}

    def _queries_and_keys(self, block: int) -> tuple[Tensor, Tensor]:
        """Scaled queries and keys (H, P, d) of `block` after rotation, in the encoder's order; computed once."""
        if block not in self._computed:
            self._computed[block] = self._project(block)
        return self._computed[block]

    def _project(self, block: int) -> tuple[Tensor, Tensor]:
        x, kwargs = self.run.inputs[block]
        module = self.parts.encoder_blocks[block]
        heads = self.parts.config.vision_config.num_heads
        query, key, _ = module.attn.qkv(module.norm1(x)).unflatten(-1, (3, heads, -1)).unbind(1)
        cos, sin = (
            table[:, None].to(torch.promote_types(x.dtype, torch.float32)) for table in kwargs["position_embeddings"]
        )
        query, key = (rotated(states.to(cos.dtype), cos, sin).transpose(0, 1) for states in (query, key))
        return query * query.shape[-1] ** -0.5, key

    def _finite_rows(self, recorded: Tensor) -> Bool[Tensor, " R"]:
        # The record holds patches, in windows of one image each, or merged tokens.
        return is_finite(recorded).all(-1)

    def _tokens(self, patches: Float[Tensor, "P C"]) -> Float[Tensor, "B N C"]:
        """Patches in the encoder's order as visual tokens, each the mean over its patches."""
        raster = torch.empty_like(patches)
        raster[self._raster.to(patches.device)] = patches
        return self.aligned(self.of_tokens(raster).mean(1))
