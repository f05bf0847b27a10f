"""The vision tower: what a pruning method may read of it, recorded only where some stage asks.

Signals come out one row an image, on the raster of the visual tokens that the decoder is given: CLIP's class token is
left out, and for Qwen2.5-VL the window order and the 2×2 merge of patches are undone. Dimension letters: B images of
the view, N original visual tokens (padded with zeros to the batch's longest), P patches, H heads, C width of the tower.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models.families import ModelParts, device_of, rotated

# Attention weights that exist at once: 256 MiB in float32.
_MOST = 2**26

Grid = tuple[int, int]
"""Rows and columns of an image's visual tokens."""


@dataclass(frozen=True)
class TowerShape:
    """What a method must know of a tower to say which blocks it reads.

    Args:
        depth: number of blocks.
        selected: the 0-based block whose output the decoder is given (by way of projector or merger).
        has_class_token: whether a class token gathers from the patches (CLIP).
    """

    depth: int
    selected: int
    has_class_token: bool

    def scaled(self, block: int, of: int) -> int:
        """The block at the same relative depth as 0-based `block` of a tower with `of` blocks; the same if as deep."""
        return block * self.depth // of


@dataclass(frozen=True)
class Asks:
    """What a method wants recorded of the tower.

    Args:
        attention: blocks whose attention or keys it reads.
        outputs: blocks whose output it reads.
        features: whether it reads the tokens before the projector (LLaVA) or after the merger (Qwen2.5-VL).
        pixels: whether it reads the image itself.
        grids: whether it must know how many rows and columns of visual tokens an image has.
    """

    attention: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()
    features: bool = False
    pixels: bool = False
    grids: bool = False

    def __or__(self, other: Asks) -> Asks:
        return Asks(
            self.attention | other.attention,
            self.outputs | other.outputs,
            self.features or other.features,
            self.pixels or other.pixels,
            self.grids or other.grids,
        )


@dataclass
class TowerRun:
    """What one run of the tower left: its input and what the hooks saw at the blocks that were asked for."""

    pixels: Tensor
    grids: Tensor | None
    inputs: dict[int, tuple[Tensor, dict[str, Any]]] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None


def tower_shape(parts: ModelParts) -> TowerShape:
    """The shape of a model's vision tower.

    Raises:
        UnsupportedModelError: a LLaVA whose features are not those of one block without the class token.
    """
    vision = parts.config.vision_config
    if parts.family.mrope:
        return TowerShape(vision.depth, vision.depth - 1, has_class_token=False)
    layer, strategy = parts.config.vision_feature_layer, parts.config.vision_feature_select_strategy
    if not isinstance(layer, int) or strategy != "default":
        message = (
            f"signals of the vision tower need one vision_feature_layer (is {layer}) and the strategy 'default' (is "
        )
        raise UnsupportedModelError(f"{message}'{strategy}').")
    depth = vision.num_hidden_layers
    # Hidden state 0 is the embedding, so state i is the output of block i - 1.
    return TowerShape(depth, (layer if layer >= 0 else depth + 1 + layer) - 1, has_class_token=True)


class TowerRecorder:
    """The hooks on the tower; `run` is what its last run left."""

    def __init__(self, parts: ModelParts, asks: Asks):
        self.parts, self.asks = parts, asks
        self.run: TowerRun | None = None
        self.paused = False
        self._recording = False

    def register(self) -> Iterator[Any]:
        """Put the hooks on, one by one."""
        if self.asks == Asks():
            return
        outputs = set(self.asks.outputs)
        if self.asks.features and not self.parts.family.mrope:
            outputs.add(tower_shape(self.parts).selected)
        yield self.parts.tower.register_forward_pre_hook(self._begin, with_kwargs=True)
        for number, block in enumerate(self.parts.tower_blocks):
            if number in self.asks.attention:
                yield block.register_forward_pre_hook(partial(self._before, number), with_kwargs=True)
            if number in outputs:
                yield block.register_forward_hook(partial(self._after, number))
        yield self.parts.tower.register_forward_hook(self._end)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.paused:
            return
        pixels = args[0] if args else kwargs["hidden_states" if self.parts.family.mrope else "pixel_values"]
        self.run = TowerRun(pixels, args[1] if len(args) > 1 else kwargs.get("grid_thw"))
        self._recording = True

    def _before(self, number: int, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self._recording and self.run is not None:
            self.run.inputs[number] = (args[0] if args else kwargs["hidden_states"], kwargs)

    def _after(self, number: int, module: nn.Module, args: tuple, output: Any) -> None:
        if self._recording and self.run is not None:
            self.run.outputs[number] = output[0] if isinstance(output, tuple) else output

    def _end(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not self._recording or self.run is None:
            return
        self._recording = False
        if self.asks.features and self.parts.family.mrope:
            # Older libraries return the merged tokens alone.
            self.run.features = output if isinstance(output, Tensor) else output.pooler_output
        if not self.asks.pixels:
            self.run.pixels = self.run.pixels[:0]


class Tower(ABC):
    """Signals of the vision tower for the images of one view.

    Args:
        parts: the model.
        run: what was recorded.
        owner: for each image of the view, its number in the run (an image is repeated for several answers).
        grids: rows and columns of visual tokens of each image of the run.
    """

    def __init__(self, parts: ModelParts, run: TowerRun, owner: Sequence[int], grids: Sequence[Grid]):
        self.parts, self.run, self.owner, self.grids = parts, run, list(owner), list(grids)
        self.shape = tower_shape(parts)

    def finite(self) -> Bool[Tensor, " B"]:
        """Whether all that was recorded of each image is finite; stays on the device."""
        tensors = [states for states, _ in self.run.inputs.values()] + list(self.run.outputs.values())
        tensors += [] if self.run.features is None else [self.run.features]
        if not tensors:
            return torch.ones(len(self.owner), dtype=torch.bool)
        flags = [torch.stack([part.isfinite().all() for part in self._by_image(tensor)]) for tensor in tensors]
        whole = torch.stack([flag.to(flags[0].device) for flag in flags]).all(0)
        repeated = self.owner != list(range(len(whole)))
        return whole[torch.tensor(self.owner, device=whole.device)] if repeated else whole

    @torch.no_grad()
    def saliency(self) -> Float[Tensor, "B N"]:
        """How much the tower itself attends to each token in the selected block, mean over heads.

        CLIP: the class token's attention row. Qwen2.5-VL, which has none: the attention that the token receives.
        """
        block = self.shape.selected
        return self.class_attention(block).mean(1) if self.shape.has_class_token else self.received(block)

    @torch.no_grad()
    def received(self, block: int) -> Float[Tensor, "B N"]:
        """Mean attention that each token receives in `block`, over heads and all query rows (windows as they are)."""
        sums, rows = self._sums(), [0] * len(self.grids)
        for image, queries, keys, attention in self.attention_chunks(block):
            sums[image][keys] += attention.sum(dim=(0, 1)) / len(attention)
            rows[image] += len(queries)
        return self._align([self._pool(total / count) for total, count in zip(sums, rows, strict=True)])

    @abstractmethod
    def class_attention(self, block: int) -> Float[Tensor, "B H N"]:
        """Attention of the class token to each token in `block`, normalised over all keys.

        Raises:
            UnsupportedModelError: the tower has no class token.
        """

    @abstractmethod
    def class_output(self, block: int) -> Float[Tensor, "B C"]:
        """The class token after `block`; raises as `class_attention`."""

    @abstractmethod
    def attention_chunks(self, block: int) -> Iterator[tuple[int, Int[Tensor, " q"], Int[Tensor, " k"], Tensor]]:
        """Attention of `block`, in pieces that fit into memory.

        Yields:
            the image of the run, the entries of the queries and of the keys, and the attention (H, q, k) between them.
            Every query comes once, with all keys that it sees. Entries count CLIP's class token first, then patches in
            raster order; for Qwen2.5-VL patches, the four of a visual token together, tokens in raster order.
        """

    @abstractmethod
    def keys(self, block: int) -> Float[Tensor, "B N d"]:
        """Attention keys of `block`, mean over heads; of a Qwen2.5-VL token after rotation, mean over its patches."""

    @abstractmethod
    def output(self, block: int) -> Float[Tensor, "B N C"]:
        """Hidden states after `block`; of a Qwen2.5-VL token the mean over its patches."""

    @abstractmethod
    def features(self) -> Float[Tensor, "B N C"]:
        """What is projected: the selected block's output (LLaVA), or the merger's output (Qwen2.5-VL)."""

    @abstractmethod
    def project(self, features: Float[Tensor, "B n C"]) -> Float[Tensor, "B n D"]:
        """`features` as the decoder is given them; Qwen2.5-VL's have passed the merger already."""

    @abstractmethod
    def images(self) -> list[Tensor]:
        """The normalised pixels (3, height, width) of each image of the run, as the tower was given them."""

    @abstractmethod
    def inputs(self) -> dict[str, Tensor]:
        """The view's images as a model's inputs: ``pixel_values``, and Qwen2.5-VL's ``image_grid_thw``."""

    @abstractmethod
    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Other images (3, height, width) through tower and projector: (n, D) each; sizes are multiples of a token's side."""

    @abstractmethod
    def _by_image(self, recorded: Tensor) -> Sequence[Tensor]:
        """What was recorded of each image of the run."""

    @abstractmethod
    def _sums(self) -> list[Tensor]:
        """A zero for every entry of each image of the run."""

    @abstractmethod
    def _pool(self, entries: Tensor) -> Tensor:
        """Entries (P, …) as visual tokens (n, …)."""

    def _align(self, images: Sequence[Tensor]) -> Tensor:
        """Per-image tensors (n, …) of the run as one (B, N, …), padded with zeros."""
        longest = max(len(images[i]) for i in self.owner)
        chosen = [images[i] for i in self.owner]
        return torch.stack([pad(x, (0, 0) * (x.dim() - 1) + (0, longest - len(x))) for x in chosen])


class ClipTower(Tower):
    """LLaVA's tower: a class token and a square grid of patches, one visual token each."""

    def class_attention(self, block: int) -> Float[Tensor, "B H N"]:
        query, key = self._queries_and_keys(block)
        scores = (query[:, :, :1] @ key.transpose(-1, -2)).squeeze(2)
        return self._owned(scores.softmax(-1)[..., 1:])

    def class_output(self, block: int) -> Float[Tensor, "B C"]:
        return self._owned(self.run.outputs[block][:, 0])

    def attention_chunks(self, block: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        query, key = self._queries_and_keys(block)
        entries = torch.arange(query.shape[2], device=query.device)
        for image in range(len(query)):
            yield image, entries, entries, (query[image] @ key[image].transpose(-1, -2)).softmax(-1)

    def keys(self, block: int) -> Float[Tensor, "B N d"]:
        x, module = self._input(block), self.parts.tower_blocks[block]
        keys = module.self_attn.k_proj(module.layer_norm1(x)).unflatten(-1, (self._heads, -1))
        return self._owned(keys.to(torch.promote_types(keys.dtype, torch.float32)).mean(2)[:, 1:])

    def output(self, block: int) -> Float[Tensor, "B N C"]:
        return self._owned(self.run.outputs[block][:, 1:])

    def features(self) -> Float[Tensor, "B N C"]:
        return self.output(self.shape.selected)

    def project(self, features: Float[Tensor, "B n C"]) -> Float[Tensor, "B n D"]:
        projector = self.parts.multimodal.multi_modal_projector
        # The encoder's type, not that of the projector's weights: quantised ones are integers.
        return projector(features.to(device_of(projector, features.device), self._patch_weight.dtype))

    def images(self) -> list[Tensor]:
        return list(self.run.pixels)

    def inputs(self) -> dict[str, Tensor]:
        return {"pixel_values": self._owned(self.run.pixels)}

    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        return [self.project(self.run_blocks(self.embed(image[None]))[:, 1:])[0] for image in images]

    # -- the tower in steps, for methods that merge inside it ------------------------------------------------------

    def embed(self, pixels: Float[Tensor, "b 3 height width"]) -> Float[Tensor, "b entries C"]:
        """Class token and patches as they enter block 0; positions are interpolated for images of another size."""
        tower, weight = self._clip, self._patch_weight
        pixels = pixels.to(weight.device, weight.dtype)
        return tower.pre_layrnorm(tower.embeddings(pixels, interpolate_pos_encoding=True))

    @property
    def _clip(self) -> Any:
        return getattr(self.parts.tower, "vision_model", self.parts.tower)

    @property
    def _patch_weight(self) -> Tensor:
        """Of the convolution, which no quantisation packs."""
        return self._clip.embeddings.patch_embedding.weight

    def run_blocks(self, x: Float[Tensor, "b entries C"], first: int = 0) -> Float[Tensor, "b entries C"]:
        """`x` through the blocks from `first` to the selected one."""
        for module in list(self.parts.tower_blocks)[first : self.shape.selected + 1]:
            x = module(x, None)
            x = x[0] if isinstance(x, tuple) else x
        return x

    def attend(
        self, block: int, x: Float[Tensor, "b entries C"], bias: Float[Tensor, "b entries"] | None = None
    ) -> tuple[Float[Tensor, "b entries C"], Float[Tensor, "b entries d"], Float[Tensor, "b H entries entries"]]:
        """The attention half of `block`.

        Args:
            block: 0-based.
            x: the block's input.
            bias: added to the attention logits of each key.

        Returns:
            the states between attention and MLP, the keys (mean over heads) and the attention.
        """
        module = self.parts.tower_blocks[block]
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
        """The MLP half of `block`."""
        module = self.parts.tower_blocks[block]
        return x + module.mlp(module.layer_norm2(x))

    @property
    def _heads(self) -> int:
        return self.parts.config.vision_config.num_attention_heads

    def _input(self, block: int) -> Tensor:
        return self.run.inputs[block][0]

    def _queries_and_keys(self, block: int) -> tuple[Tensor, Tensor]:
        """Scaled queries and keys (images, H, entries, d) of `block`, in float32 or finer."""
        module = self.parts.tower_blocks[block]
        normed = module.layer_norm1(self._input(block))
        query, key = (
            projection(normed).unflatten(-1, (self._heads, -1)).transpose(1, 2)
            for projection in (module.self_attn.q_proj, module.self_attn.k_proj)
        )
        fine = torch.promote_types(query.dtype, torch.float32)
        return query.to(fine) * query.shape[-1] ** -0.5, key.to(fine)

    def _by_image(self, recorded: Tensor) -> Sequence[Tensor]:
        return recorded.unbind()

    def _owned(self, x: Tensor) -> Tensor:
        return x[torch.tensor(self.owner, device=x.device)]

    def _sums(self) -> list[Tensor]:
        x = next(iter(self.run.inputs.values()))[0]
        fine = torch.promote_types(x.dtype, torch.float32)
        return [torch.zeros(x.shape[1], dtype=fine, device=x.device) for _ in x]

    def _pool(self, entries: Tensor) -> Tensor:
        return entries[1:]


class QwenTower(Tower):
    """Qwen2.5-VL's tower: no class token, four patches a visual token, most blocks attend in windows."""

    def class_attention(self, block: int) -> Float[Tensor, "B H N"]:
        raise UnsupportedModelError("Qwen2.5-VL's vision tower has no class token.")

    def class_output(self, block: int) -> Float[Tensor, "B C"]:
        raise UnsupportedModelError("Qwen2.5-VL's vision tower has no class token.")

    def attention_chunks(self, block: int) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        query, key = self._queries_and_keys(block)
        fine = torch.promote_types(query.dtype, torch.float32)
        bounds, starts = self.run.inputs[block][1]["cu_seqlens"].tolist(), self._starts
        image = 0
        for low, high in pairwise(bounds):
            while low >= starts[image + 1]:
                image += 1
            place = self._raster[low:high] - starts[image]
            keys = key[:, low:high].to(fine).transpose(-1, -2)
            rows = max(1, _MOST // (keys.shape[0] * (high - low)))
            for first in range(low, high, rows):
                last = min(first + rows, high)
                attention = (query[:, first:last].to(fine) @ keys).softmax(-1)
                yield image, place[first - low : last - low], place, attention

    def keys(self, block: int) -> Float[Tensor, "B N d"]:
        return self._tokens(self._queries_and_keys(block)[1].mean(0))

    def output(self, block: int) -> Float[Tensor, "B N C"]:
        return self._tokens(self.run.outputs[block])

    def features(self) -> Float[Tensor, "B N C"]:
        assert self.run.features is not None, "the method does not ask for features"
        return self._align(self.run.features.split([h * w for h, w in self.grids]))

    def project(self, features: Float[Tensor, "B n C"]) -> Float[Tensor, "B n D"]:
        return features

    def images(self) -> list[Tensor]:
        """The first of the two equal frames of which each patch is made."""
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
        patches = self.run.pixels.split([4 * rows * columns for rows, columns in self.grids])
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
        tower = self.parts.tower
        pixels = torch.cat(patches).to(tower.patch_embed.proj.weight.device, tower.patch_embed.proj.weight.dtype)
        output = tower(pixels, grid_thw=torch.tensor(grids, device=pixels.device))
        merged = output if isinstance(output, Tensor) else output.pooler_output
        return list(merged.split([rows * columns // merge**2 for _, rows, columns in grids]))

    @cached_property
    def _starts(self) -> list[int]:
        """The first patch of each image, and the number of all patches."""
        starts = [0]
        for rows, columns in self.grids:
            starts.append(starts[-1] + 4 * rows * columns)
        return starts

    @cached_property
    def _raster(self) -> Int[Tensor, " P"]:
        """For each patch in the tower's window order, its place when visual tokens stand in raster order."""
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
        """Scaled queries and keys (H, P, d) of `block` after rotation, in the tower's order."""
        x, kwargs = self.run.inputs[block]
        module = self.parts.tower_blocks[block]
        heads = self.parts.config.vision_config.num_heads
        query, key, _ = module.attn.qkv(module.norm1(x)).unflatten(-1, (3, heads, -1)).unbind(1)
        cos, sin = (
            table[:, None].to(torch.promote_types(x.dtype, torch.float32)) for table in kwargs["position_embeddings"]
        )
        query, key = (rotated(states.to(cos.dtype), cos, sin).transpose(0, 1) for states in (query, key))
        return query * query.shape[-1] ** -0.5, key

    def _by_image(self, recorded: Tensor) -> Sequence[Tensor]:
        # Patches, in windows of one image each, or merged tokens.
        tokens = [rows * columns for rows, columns in self.grids]
        return recorded.split([count * (len(recorded) // sum(tokens)) for count in tokens])

    def _tokens(self, patches: Float[Tensor, "P C"]) -> Float[Tensor, "B N C"]:
        """Patches in the tower's order as visual tokens, each the mean over its patches."""
        raster = torch.empty_like(patches)
        raster[self._raster.to(patches.device)] = patches
        return self._align([self._pool(x) for x in raster.split([4 * rows * columns for rows, columns in self.grids])])

    def _sums(self) -> list[Tensor]:
        x = next(iter(self.run.inputs.values()))[0]
        fine = torch.promote_types(x.dtype, torch.float32)
        return [torch.zeros(4 * rows * columns, dtype=fine, device=x.device) for rows, columns in self.grids]

    def _pool(self, entries: Tensor) -> Tensor:
        return entries.unflatten(0, (-1, 4)).mean(1)


def resized(image: Float[Tensor, "3 height width"], rows: int, columns: int, side: int) -> Tensor:
    """`image` at `rows` × `columns` tokens of `side` pixels: bicubic with antialiasing, as the processors resize."""
    fine = torch.promote_types(image.dtype, torch.float32)
    size = (rows * side, columns * side)
    return interpolate(image[None].to(fine), size=size, mode="bicubic", antialias=True, align_corners=False)[0]
