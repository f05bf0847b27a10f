"""FOLDER: merge tokens of even rank into tokens of odd rank, again and again, until few remain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods.base import Method
from lmms_prune.methods.shared.merging import (
    Bag,
    Merged,
    inside_encoder,
    matched,
    no_clip,
)
from lmms_prune.methods.view import TokenView
from lmms_prune.models.clip_encoder import ClipEncoder
from lmms_prune.models.encoder import Signals
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device

# Weight of the class token's attention (α = 5) relative to a cosine.
_ATTENTION = 100 * 5


@dataclass(frozen=True)
class Folder(Method):
    """Merges every other token into its most similar neighbour, again and again, until N remain.

    A fold is a ToMe pass (even ranks into odd ones, the most similar first, means weighted by numbers of tokens) that
    removes min(⌊(n-1)/2⌋, n-N) of n tokens.

    Args:
        variant: "simplified" folds the layer's input by its own cosines, in raster order, and scales the remaining tokens
            by 1 + log of how many tokens each stands for; if one fold was enough, only where fewer tokens were removed
            than half of those that remain. "full", for LLaVA at layer 0, folds between attention and MLP of the CLIP
            block that the projector reads: on the head mean of its keys, with 500 times the class token's attention to a
            token subtracted from its cosine (merged tokens get the plain mean of it); even ranks come before odd ones in
            the next fold and in the end, nothing is scaled, and the block's MLP and the projector follow.

    Paper: https://arxiv.org/abs/2501.02430.
    Differs from the reference:
        - the simplified variant does not protect the first token, as visual tokens hold no class token; it restores the
          order after every fold, and may act at any layer
        - the full variant also folds fewer than 40 tokens, as N must be met
        - two tokens fold into one
        - cosines in float64, means in float32.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2501.02430"
    variant: Literal["simplified", "full"] = "simplified"

    def prepare(self, parts: ModelParts) -> None:
        if self.variant == "full" and not parts.encoder_shape.is_clip:
            raise UnsupportedModelError(no_clip("variant=full"))

    def signals(self, encoder: EncoderShape) -> Signals:
        if self.variant == "simplified":
            return Signals()
        before = encoder.selected - 1
        return Signals(outputs=frozenset({before})) if encoder.selected else Signals(pixels=True)

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        if self.variant == "full":
            folded = inside_encoder(view, budget, "variant=full", _folded)
        else:
            folded = self._simplified(view, budget)
        view.carry = folded
        return folded.keep & to_device(budget > 0, folded.keep.device)[:, None]

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        folded = view.carried(Merged)
        return folded.hidden, folded.index

    @staticmethod
    def _simplified(view: TokenView, budget: Int[Tensor, " B"]) -> Merged:
        fine = torch.promote_types(view.hidden.dtype, torch.float32)
        slot = torch.arange(view.valid.shape[1], device=view.valid.device).expand_as(view.valid)
        states, sizes = view.with_additions(view.hidden).to(fine), torch.ones_like(slot, dtype=fine)
        tokens = Bag(states, view.hidden.shape[2], None, sizes, slot, tuple(view.counts))
        goal = [max(1, n) for n in budget.tolist()]
        # As published: tokens are scaled after several folds, or after one that removed few tokens.
        scales = [(n - most > _fold(n)) or 2 * (n - most) < most for n, most in zip(view.counts, goal, strict=True)]
        while any(n > most for n, most in zip(tokens.counts, goal, strict=True)):
            tokens = tokens.merge([max(0, min(_fold(n), n - m)) for n, m in zip(tokens.counts, goal, strict=True)])
        factor = torch.where(to_device(scales, slot.device)[:, None], 1 + tokens.size.log(), 1.0)
        return replace(tokens, states=tokens.states * factor[..., None].to(fine)).in_view(view)


def _fold(tokens: int) -> int:
    """How many of `tokens` tokens one fold can remove."""
    return max((tokens - 1) // 2, int(tokens == 2))


def _entering(encoder: ClipEncoder) -> Float[Tensor, "B entries C"]:
    """The selected block's input: the class token, then the patches."""
    before = encoder.shape.selected - 1
    if before < 0:
        return encoder.embed(encoder.inputs()["pixel_values"])
    return torch.cat([encoder.class_output(before)[:, None], encoder.output(before)], dim=1)


def _folded(encoder: ClipEncoder, images: Int[Tensor, " b"], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Fold inside the selected block until `count` tokens remain; returns their states, sizes and raster indices."""
    entering, block = _entering(encoder), encoder.shape.selected
    entering = entering[images.to(entering.device)]
    salience, (x, key) = encoder.class_row(block, entering), encoder.attend(block, entering)
    coarse, fine = x.dtype, torch.promote_types(x.dtype, torch.float32)
    x, keys = x.to(fine), key.to(fine).mean(1)
    size = torch.ones_like(salience)
    index = torch.arange(-1, x.shape[1] - 1, device=x.device).expand(len(x), -1)
    while (excess := x.shape[1] - 1 - count) > 0:
        rate = min((x.shape[1] - 1) // 2, excess)
        step = matched(
            keys,
            [x.shape[1]] * len(x),
            [rate] * len(x),
            evens_first=True,
            penalty=_ATTENTION * salience,
            protected=1,
        )
        # As published, the attention of merged tokens is a plain mean, that of states and keys is weighted.
        salience = step.merge(salience[..., None], torch.ones_like(size), index)[0].squeeze(-1)
        keys, _, _ = step.merge(keys, size, index)
        x, size, index = step.merge(x, size, index)
    return encoder.project(encoder.feed(block, x.to(coarse))[:, 1:]), size[:, 1:], index[:, 1:]
