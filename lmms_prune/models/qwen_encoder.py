"""The vision encoder of Qwen's models: no class token, four patches a visual token, blocks may attend in windows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lmms_prune.models.encoder import MOST, Encoder
from lmms_prune.models.parts import rotated
from lmms_prune.models.tensors import to_device


@dataclass(frozen=True)
class _EqualLengths:
    """The windows (or images) of a run in groups of one size.

    Args:
        sizes: of each group, how many windows it has and how many patches each of them.
        numbers: the raster numbers of the patches of all groups, window by window.
        rows: the queries of all groups, window by window and head by head, as rows of `QwenEncoder._rotated`.
    """

    sizes: tuple[tuple[int, int], ...]
    numbers: Int[Tensor, " P"]
    rows: Int[Tensor, " R"]


class QwenEncoder(Encoder):
    """Reads Qwen's encoder: four adjacent patches for each visual token, in window order if it has windows."""

    def attention_chunks(self, block: int) -> Iterator[tuple[Int[Tensor, "S q"], Int[Tensor, "S k"], Tensor]]:
        groups, states = self._groups(self.shape.in_windows(block)), self._rotated(block)
        heads, flat, start = states.shape[2], states.flatten(0, 2), 0
        # All at once, so that every group is a slice.
        query, key = flat[groups.rows], flat[groups.rows + heads]
        fine = torch.promote_types(states.dtype, torch.float32)
        query, key = (query * query.shape[-1] ** -0.5).to(fine), key.to(fine)
        for count, length in groups.sizes:
            stop = start + count * length
            members = groups.numbers[start:stop].unflatten(0, (count, length))
            queries, keys = (x[heads * start : heads * stop].unflatten(0, (count, heads, length)) for x in (query, key))
            start = stop
            at_once = max(1, MOST // (heads * length**2))
            piece = max(1, MOST // (heads * length)) if at_once == 1 else length
            for first in range(0, count, at_once):
                chosen = slice(first, first + at_once)
                owners = members[chosen]
                for low in range(0, length, piece):
                    part = queries[chosen, :, low : low + piece]
                    weights = (part @ keys[chosen].transpose(-1, -2)).softmax(-1)
                    yield owners[:, low : low + piece], owners, weights

    def keys(self, block: int, *, one_head: bool = False) -> Float[Tensor, "B N d"]:
        keys = self._rotated(block)[:, 1]
        return self._tokens(keys.flatten(1) if one_head else keys.mean(1))

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

    def token_pixels(self) -> Float[Tensor, "n 3 p"]:
        vision = self.parts.config.vision_config
        shape = (self._patches, -1, vision.temporal_patch_size, vision.patch_size**2)
        # A token's patches come one after the other; of their equal frames the first is read.
        return (
            self.run.pixels.unflatten(0, (-1, self._patches))
            .unflatten(2, shape[1:])[:, :, :, 0]
            .transpose(1, 2)
            .flatten(2)
        )

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
    def _host_raster(self) -> Int[Tensor, " P"]:
        """For each patch in the encoder's window order, its number when visual tokens are in raster order."""
        starts = accumulate(self.sizes, initial=0)
        tokens = torch.cat(
            [start + window.argsort(stable=True) for start, window in zip(starts, self._windows, strict=False)]
        )
        return (tokens[:, None] * self._patches + torch.arange(self._patches)).flatten()

    @property
    def _device(self) -> torch.device:
        records = [states for states, _ in self.run.inputs.values()] + list(self.run.outputs.values())
        return records[0].device if records else torch.device("cpu")

    @cached_property
    def _raster(self) -> Int[Tensor, " P"]:
        """`_host_raster` on the device of the records."""
        return to_device(self._host_raster, self._device)

    def _groups(self, in_windows: bool) -> _EqualLengths:
        """The windows (or images) of the run, those of one size together."""
        if in_windows not in self._grouped:
            lengths = self._window_lengths if in_windows else self.entries
            starts, heads = [0, *accumulate(lengths)], self.parts.config.vision_config.num_heads
            places, rows, sizes = [], [], []
            for length in dict.fromkeys(lengths):
                lows = torch.tensor([low for low, n in zip(starts, lengths, strict=False) if n == length])
                patches = lows[:, None] + torch.arange(length)
                places.append(patches.flatten())
                rows.append((2 * heads * patches[:, None] + torch.arange(heads)[:, None]).flatten())
                sizes.append((len(lows), length))
            numbers = self._host_raster[torch.cat(places)]
            both = to_device(torch.cat([numbers, *rows]), self._device)
            self._grouped[in_windows] = _EqualLengths(tuple(sizes), both[: len(numbers)], both[len(numbers) :])
        return self._grouped[in_windows]

    @cached_property
    def _grouped(self) -> dict[bool, _EqualLengths]:
        return {}

    @cached_property
    def _computed(self) -> dict[int, Tensor]:
        return {}

    def _rotated(self, block: int) -> Float[Tensor, "P 2 H d"]:
        """Queries (not scaled) and keys of `block` after rotation, in the encoder's order; computed once."""
        if block not in self._computed:
            x, kwargs = self.run.inputs[block]
            module = self.parts.encoder_blocks[block]
            heads = self.parts.config.vision_config.num_heads
            states = module.attn.qkv(module.norm1(x)).unflatten(-1, (3, heads, -1))[:, :2]
            fine = torch.promote_types(x.dtype, torch.float32)
            cos, sin = (table[:, None, None].to(fine) for table in kwargs["position_embeddings"])
            self._computed[block] = rotated(states.to(fine), cos, sin)
        return self._computed[block]

    def _tokens(self, patches: Float[Tensor, "P C"]) -> Float[Tensor, "B N C"]:
        """Patches in the encoder's order as visual tokens, each the mean over its patches."""
        raster = torch.empty_like(patches)
        raster[self._raster.to(patches.device)] = patches
        return self.aligned(self.of_tokens(raster).mean(1))
