"""Signals of the vision encoder that a pruning method may read; recorded only if a stage needs them.

Signals have one row per image, on the raster of the visual tokens that the decoder is given: CLIP's class token is
omitted, and for Qwen's models the window order and the 2×2 merge of patches are undone. Dimension letters: B images of
the view, N original visual tokens (padded with zeros to the batch's longest), P patches, H heads, C width of the encoder.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.models.family import Grid
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.tensors import is_finite, to_device

MOST = 2**26
"""How many attention weights are computed at a time: 256 MiB in float32."""


@dataclass(frozen=True)
class Signals:
    """The signals of the encoder that a method needs recorded.

    Args:
        attention: blocks whose attention or keys it reads.
        outputs: blocks whose output it reads.
        features: whether it reads the tokens before the projector (LLaVA) or after the merger (Qwen).
        pixels: whether it reads the image itself.
        grids: whether it needs the rows and columns of an image's visual tokens.
    """

    attention: frozenset[int] = frozenset()
    outputs: frozenset[int] = frozenset()
    features: bool = False
    pixels: bool = False
    grids: bool = False

    def __or__(self, other: Signals) -> Signals:
        return Signals(
            self.attention | other.attention,
            self.outputs | other.outputs,
            self.features or other.features,
            self.pixels or other.pixels,
            self.grids or other.grids,
        )


@dataclass
class EncoderRun:
    """The records of one run of the encoder: its input, and the tensors of the blocks that some method reads."""

    pixels: Tensor
    grids: Tensor | None
    inputs: dict[int, tuple[Tensor, dict[str, Any]]] = field(default_factory=dict)
    outputs: dict[int, Tensor] = field(default_factory=dict)
    features: Tensor | None = None

    def shapes(self) -> tuple[torch.Size, ...]:
        """The shapes of all records."""
        tensors = [self.pixels, *(states for states, _ in self.inputs.values()), *self.outputs.values()]
        return tuple(x.shape for x in tensors)


class EncoderRecorder:
    """The hooks on the encoder; `run` holds the records of its last run."""

    def __init__(self, parts: ModelParts, signals: Signals):
        self.parts, self.signals = parts, signals
        self.run: EncoderRun | None = None
        self.paused = False
        self._recording = False

    def register(self) -> Iterator[Any]:
        """Register the hooks, yielding each handle at once."""
        if self.signals == Signals():
            return
        outputs, shape = set(self.signals.outputs), self.parts.encoder_shape
        if self.signals.features and shape.projects_after:
            outputs.add(shape.selected)
        yield self.parts.encoder.register_forward_pre_hook(self._begin, with_kwargs=True)
        for number, block in enumerate(self.parts.encoder_blocks):
            if number in self.signals.attention:
                yield block.register_forward_pre_hook(partial(self._before, number), with_kwargs=True)
            if number in outputs:
                yield block.register_forward_hook(partial(self._after, number))
        yield self.parts.encoder.register_forward_hook(self._end)

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.paused:
            return
        self.run = EncoderRun(*self.parts.family.encoder_inputs(args, kwargs))
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
        if self.signals.features and not self.parts.encoder_shape.projects_after:
            # Older libraries return the merged tokens alone.
            self.run.features = output if isinstance(output, Tensor) else output.pooler_output
        if not self.signals.pixels:
            self.run.pixels = self.run.pixels[:0]


class Encoder(ABC):
    """Signals of the vision encoder for the images of one view.

    Args:
        parts: the model.
        run: the records.
        owner: for each image of the view, its number in the run (an image is repeated for several answers).
        grids: rows and columns of visual tokens of each image of the run.
    """

    def __init__(self, parts: ModelParts, run: EncoderRun, owner: Sequence[int], grids: Sequence[Grid]):
        self.parts, self.run, self.owner, self.grids = parts, run, list(owner), list(grids)
        self.shape = parts.encoder_shape
        self._rows: dict[tuple, tuple[Tensor, Tensor]] = {}

    def finite(self) -> Bool[Tensor, " B"]:
        """Whether all records of each image are finite; stays on the device."""
        tensors = [states for states, _ in self.run.inputs.values()] + list(self.run.outputs.values())
        tensors += [] if self.run.features is None else [self.run.features]
        if not tensors:
            return torch.ones(len(self.owner), dtype=torch.bool, device=self.run.pixels.device)
        # Records differ in how many rows each image has in them.
        extremes: dict[int, list[Tensor]] = {}
        for tensor in tensors:
            # Both extremes of a row pass on what is infinite or NaN in it, in one launch.
            ends = [end.flatten().to(tensors[0].device) for end in tensor.aminmax(dim=-1)]
            extremes.setdefault(len(ends[0]), []).extend(ends)
        finite = [self._by_image(is_finite(torch.stack(ends)).all(0)).all(1) for ends in extremes.values()]
        return self.of_images(torch.stack(finite).all(0) if len(finite) > 1 else finite[0])

    @torch.no_grad()
    def saliency(self, block: int | None = None) -> Float[Tensor, "B N"]:
        """Attention of the encoder to each token in `block` (by default the selected one), mean over heads.

        CLIP: the class token's attention row. Qwen's has no class token: the attention that the token receives.
        """
        block = self.shape.selected if block is None else block
        return self.class_attention(block).mean(1) if self.shape.class_tokens else self.received(block)

    @torch.no_grad()
    def received(self, block: int) -> Float[Tensor, "B N"]:
        """Mean attention that each token receives in `block`, over heads and all query rows (of its window)."""
        if block not in self._received:
            self._received[block] = self._receive(block)
        return self._received[block]

    @cached_property
    def _received(self) -> dict[int, Tensor]:
        return {}

    def _receive(self, block: int) -> Float[Tensor, "B N"]:
        parts = []
        for _, keys, attention in self.attention_chunks(block):
            parts.append((keys, attention.sum(dim=(1, 2))))
            heads = attention.shape[1]
        received = self.of_keys(parts)
        rows = torch.tensor(self.entries)
        if len(set(self.entries)) == 1:
            mean = received / (heads * self.entries[0])
        else:
            mean = received / to_device(heads * rows.repeat_interleave(rows), received.device)
        return self.aligned(self.of_tokens(mean).mean(1))

    def of_keys(self, parts: Iterable[tuple[Int[Tensor, "S k"], Float[Tensor, "S k"]]]) -> Float[Tensor, " E"]:
        """What all pieces of `attention_chunks` give to each entry of the run: their keys, and a sum over their queries."""
        sums: list[Tensor] = []
        owners: list[Tensor] = []
        for keys, part in parts:
            if owners and owners[-1] is keys:
                sums[-1] = sums[-1] + part
            else:
                sums.append(part)
                owners.append(keys)
        flat, entries = (x[0].flatten() if len(x) == 1 else torch.cat([y.flatten() for y in x]) for x in (sums, owners))
        # Every entry is among the keys once, so that nothing is added here in any order.
        return torch.empty_like(flat).scatter_(0, entries, flat)

    def class_attention(self, block: int, *, one_head: bool = False) -> Float[Tensor, "B H N"]:
        """Attention of the class token to each token in `block`, normalised over all keys.

        Args:
            block: 0-based.
            one_head: as if all heads were one of their common width (H = 1): its logits are the heads' sum over √H.

        Raises:
            UnsupportedModelError: the encoder has no class token.
        """
        raise UnsupportedModelError(f"{self.parts.family.title}'s vision encoder has no class token.")

    def class_output(self, block: int) -> Float[Tensor, "B C"]:
        """The class token after `block`; raises as `class_attention`."""
        raise UnsupportedModelError(f"{self.parts.family.title}'s vision encoder has no class token.")

    @abstractmethod
    def attention_chunks(self, block: int) -> Iterator[tuple[Int[Tensor, "S q"], Int[Tensor, "S k"], Tensor]]:
        """Attention of `block`, in pieces that fit into memory.

        Yields:
            for S images or windows of equal size the entries of the queries, those of the keys, and the attention
            (S, H, q, k) between them. Every query comes once, with all keys that it sees; pieces of the same images
            follow one another, with one and the same tensor of keys. Entries are numbered through all images of the
            run, `entries` of each: CLIP's class token first, then patches in raster order; for Qwen patches, the four of
            a visual token together, tokens in raster order.
        """

    @abstractmethod
    def keys(self, block: int, *, one_head: bool = False) -> Float[Tensor, "B N d"]:
        """Attention keys of `block`, mean over heads; of a Qwen token after rotation, mean over its patches.

        Args:
            block: 0-based.
            one_head: all heads side by side instead of their mean.
        """

    @abstractmethod
    def output(self, block: int) -> Float[Tensor, "B N C"]:
        """Hidden states after `block`; of a Qwen token the mean over its patches."""

    @abstractmethod
    def features(self) -> Float[Tensor, "B N C"]:
        """The features that are projected: the selected block's output (LLaVA), or the merger's output (Qwen)."""

    @abstractmethod
    def project(self, features: Float[Tensor, "B n C"]) -> Float[Tensor, "B n D"]:
        """`features` in the form that the decoder is given; Qwen's have already passed the merger."""

    @abstractmethod
    def images(self) -> list[Tensor]:
        """The normalised pixels (3, height, width) of each image of the run, as the encoder's input."""

    @abstractmethod
    def token_pixels(self) -> Float[Tensor, "n 3 p"]:
        """The pixels of `images` that each visual token of the run covers, in some order, the same for each colour."""

    @abstractmethod
    def inputs(self) -> dict[str, Tensor]:
        """The view's images as a model's inputs: ``pixel_values``, and Qwen's ``image_grid_thw``."""

    @abstractmethod
    def encode(self, images: Sequence[Tensor]) -> list[Tensor]:
        """Run other images (3, height, width) through encoder and projector; sizes are multiples of a token's side.

        Returns:
            the visual tokens (n, D) of each image and, behind them, what the decoder adds to them between its layers.
        """

    def _by_image(self, rows: Bool[Tensor, " R"]) -> Bool[Tensor, "I r"]:
        """Flags of a record's rows, one line per image of the run, padded with True."""
        counts = self.entries if len(rows) == sum(self.entries) else self.sizes
        if len(set(counts)) == 1:
            return rows.unflatten(0, (len(counts), -1))
        return ~self.aligned(~rows, range(len(counts)), len(rows) // sum(self.sizes))

    @property
    def sizes(self) -> list[int]:
        """Visual tokens of each image of the run."""
        return [rows * columns for rows, columns in self.grids]

    @property
    def entries(self) -> list[int]:
        """Entries of each image of the run in the encoder: class tokens and patches."""
        return [self.shape.class_tokens + self.shape.patches_per_token * size for size in self.sizes]

    def of_tokens(self, entries: Shaped[Tensor, " E *C"]) -> Shaped[Tensor, "n p *C"]:
        """The entries of all images of the run as the patches of each visual token, without class tokens."""
        first, patches = self.shape.class_tokens, self.shape.patches_per_token
        if first:
            # Images with class tokens have one size.
            entries = entries.unflatten(0, (len(self.grids), -1))[:, first:].flatten(0, 1)
        return entries.unflatten(0, (-1, patches))

    def of_entries(self, tokens: Shaped[Tensor, " n"]) -> Shaped[Tensor, " E"]:
        """One value for each visual token of the run, given to all its patches; class tokens get 0."""
        patches = tokens[:, None].expand(-1, self.shape.patches_per_token).flatten()
        if self.shape.class_tokens:
            patches = pad(patches.unflatten(0, (len(self.grids), -1)), (self.shape.class_tokens, 0)).flatten()
        return patches

    def token_numbers(self, device: torch.device) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """The image in the run of each of its visual tokens, and the token's raster index."""
        sizes = torch.tensor(self.sizes)
        image = torch.arange(len(sizes)).repeat_interleave(sizes)
        number = torch.arange(len(image)) - (sizes.cumsum(0) - sizes)[image]
        image, number = to_device(torch.stack([image, number]), device)
        return image, number

    def padding(self, device: torch.device) -> Bool[Tensor, "I N"]:
        """Which entries of a row for each image of the run hold no visual token."""
        if device not in self._paddings:
            is_padding = torch.arange(max(self.sizes)) >= torch.tensor(self.sizes)[:, None]
            self._paddings[device] = to_device(is_padding, device)
        return self._paddings[device]

    @cached_property
    def _paddings(self) -> dict[torch.device, Tensor]:
        return {}

    def aligned(
        self, tokens: Shaped[Tensor, " n *C"], images: Sequence[int] | None = None, per: int = 1
    ) -> Shaped[Tensor, "B N *C"]:
        """The tokens of all images of the run, one after another, as one row for each image, padded with zeros.

        Args:
            tokens: of the run.
            images: numbers in the run of the images wanted; by default those of the view.
            per: rows of `tokens` for each visual token.
        """
        sizes, images = [per * size for size in self.sizes], self.owner if images is None else list(images)
        if images == list(range(len(sizes))) and len(set(sizes)) == 1:
            return tokens.unflatten(0, (len(sizes), -1))
        key = (tuple(images), per, tokens.device)
        if key not in self._rows:
            starts = [0, *accumulate(sizes)]
            column = torch.arange(max(sizes[i] for i in images))
            length, start = (torch.tensor([values[i] for i in images])[:, None] for values in (sizes, starts))
            rows = to_device(torch.where(column < length, start + column, -1), tokens.device)
            self._rows[key] = rows, rows < 0
        return taken(tokens, *self._rows[key])

    def of_view(self, x: Shaped[Tensor, "I N *C"]) -> Shaped[Tensor, "B N *C"]:
        """A signal of the tokens of the run's images for those of the view's images."""
        return self.of_images(x)

    def of_images(self, x: Shaped[Tensor, " I *C"]) -> Shaped[Tensor, " B *C"]:
        """One value for each of the run's images, for the images of the view."""
        return x if self.owner == list(range(len(x))) else x[self._owners(x.device)]

    def _owners(self, device: torch.device) -> Int[Tensor, " B"]:
        return to_device(self.owner, device)


def taken(
    tokens: Shaped[Tensor, " n *C"], rows: Int[Tensor, "B N"], is_padding: Bool[Tensor, "B N"]
) -> Shaped[Tensor, "B N *C"]:
    """Rows of `tokens` by number; zeros where there is padding, which has the number -1."""
    return tokens[rows].masked_fill_(is_padding.view(*rows.shape, *[1] * (tokens.dim() - 1)), 0)


def cells(images: Float[Tensor, "B 3 height width"], rows: int, columns: int) -> Float[Tensor, "B n 3 p"]:
    """The pixels of each cell of a grid over `images`; what lies beyond whole cells is left out."""
    high, wide = images.shape[2] // rows, images.shape[3] // columns
    inside = images[:, :, : rows * high, : columns * wide]
    # image, colour, cell row, pixel row, cell column, pixel column
    split = inside.unflatten(3, (columns, wide)).unflatten(2, (rows, high))
    return split.permute(0, 2, 4, 1, 3, 5).flatten(4).flatten(1, 2)


def resized(image: Float[Tensor, "3 height width"], rows: int, columns: int, side: int) -> Tensor:
    """`image` at `rows` × `columns` tokens of `side` pixels: bicubic with antialiasing, as the processors resize."""
    fine = torch.promote_types(image.dtype, torch.float32)
    size = (rows * side, columns * side)
    return interpolate(image[None].to(fine), size=size, mode="bicubic", antialias=True, align_corners=False)[0]
