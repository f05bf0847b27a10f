"""TokenView: all that a pruning method may read at one stage.

A view's rows are *images*: a sample with two images gives two rows, so that every method treats every image by
itself, whatever the batch. Dimension letters: B images, V visual tokens (padded to the batch's longest), T text tokens,
L sequence, H attention heads, D hidden.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from lmms_prune.families import ModelParts


@dataclass(frozen=True)
class Tokens:
    """A set of tokens of each image: `slots` are their columns in the sequence, padding on the right."""

    slots: Int[Tensor, "B N"]
    valid: Bool[Tensor, "B N"]


@dataclass(frozen=True)
class LayerInput:
    """The input of one decoder layer: hidden states and rotary tables of the whole batch."""

    layer: int
    hidden: Float[Tensor, "R L D"]
    rotary: tuple[Tensor, Tensor]


@dataclass
class TokenView:
    """What a method sees when it acts at the input of decoder layer `layer`.

    Args:
        layer: 0-based decoder layer.
        rows: the batch row of each image.
        visual: the visual tokens still present, in raster order.
        text: all text tokens after the image: the question and the assistant's header.
        index: raster index of each visual token in its image; arbitrary where padding.
        counts: visual tokens present in each image, known on the host.
        seeds: one text an image; random draws are made from it alone.
        memory: lives for one prefill; carries state from stage to stage.
        parts: the model (private to the view).
        state: the input of this layer (private to the view).
        before: the input of the layer before, where a method reads attention or keys (private to the view).
        present: whether each column of the sequence holds a token (private to the view).
    """

    layer: int
    rows: Int[Tensor, " B"]
    visual: Tokens
    text: Tokens
    index: Int[Tensor, "B V"]
    counts: Sequence[int]
    seeds: Sequence[str]
    parts: ModelParts
    state: LayerInput
    before: LayerInput | None
    present: Bool[Tensor, "R L"]
    memory: dict[str, object] = field(default_factory=dict)

    @property
    def valid(self) -> Bool[Tensor, "B V"]:
        """Which entries of the V dimension are tokens; the rest is padding."""
        return self.visual.valid

    @property
    def first_column(self) -> Int[Tensor, " B"]:
        """The column at which each image's row begins, after its padding."""
        return (~self.present).sum(1)[self.rows]

    @cached_property
    def hidden(self) -> Float[Tensor, "B V D"]:
        """Hidden states of the visual tokens at the input of this layer; at layer 0 the projector's output."""
        return self._of(self.state.hidden, self.visual)

    def normed(self, tokens: Tokens) -> Float[Tensor, "B N D"]:
        """The decoder's final norm applied to this layer's input of `tokens`."""
        return self.parts.final_norm(self._of(self.state.hidden, tokens))

    def keys(self, tokens: Tokens) -> Float[Tensor, "B N K"]:
        """Keys of `tokens` in the layer before, after rotation, its KV heads side by side."""
        return self._of(self._keys.transpose(1, 2).flatten(2), tokens)

    def attention(self) -> Float[Tensor, "B H V"]:
        """Attention of the row's last token to each visual token in the layer before, normalised over all keys.

        Recomputed for that one query, so that any attention kernel may run the layer itself; in float32 or finer.
        """
        before, keys = self._before, self._keys
        cos, sin = (table[..., -1:, :] for table in before.rotary)
        query = self.parts.queries(before.layer, before.hidden[:, -1:], (cos, sin))
        keys = keys.to(_fine(keys)).repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
        scale = self.parts.layers[before.layer].self_attn.scaling
        scores = (query.to(keys.dtype) @ keys.transpose(-1, -2)).squeeze(2) * scale
        scores = scores.masked_fill(~self.present[:, None].to(scores.device), -torch.inf).softmax(-1)
        scores = scores.to(self.valid.device)
        return scores[self.rows].gather(-1, self.visual.slots[:, None].expand(-1, scores.shape[1], -1))

    def uniform(self) -> Float[Tensor, "B V"]:
        """Independent uniform draws, one a token, from each image's own seed.

        Drawn on the CPU, one generator an image, so that neither the batch, the order nor the device matters.
        """
        draws = torch.zeros(self.valid.shape, dtype=torch.float64)
        for row, (seed, count) in enumerate(zip(self.seeds, self.counts, strict=True)):
            digest = hashlib.blake2b(seed.encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            draws[row, :count] = torch.rand(count, generator=generator, dtype=torch.float64)
        device = self.valid.device
        # Apple GPUs have no float64; there a tie, one in thousands of images, goes to the lower index.
        return draws.to(device, dtype=torch.float32 if device.type == "mps" else torch.float64)

    @cached_property
    def _keys(self) -> Float[Tensor, "R H L d"]:
        before = self._before
        return self.parts.keys(before.layer, before.hidden, before.rotary)

    @property
    def _before(self) -> LayerInput:
        assert self.before is not None, "the method's row in METHODS does not say that it reads the layer before"
        return self.before

    def _of(self, sequence: Shaped[Tensor, "R L *D"], tokens: Tokens) -> Shaped[Tensor, "B N *D"]:
        return sequence.to(self.valid.device)[self.rows[:, None], tokens.slots]


def _fine(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
