"""ToMe: merge the most similar pairs of tokens into one token each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import pad

from lmms_prune.errors import UnsupportedModelError
from lmms_prune.methods.base import Method
from lmms_prune.methods.shared.merging import (
    Bag,
    Merged,
    inside_encoder,
    matched,
    no_clip,
)
from lmms_prune.methods.shared.tensors import gather
from lmms_prune.methods.view import TokenView
from lmms_prune.models.clip_encoder import ClipEncoder
from lmms_prune.models.encoder import Signals
from lmms_prune.models.parts import ModelParts
from lmms_prune.models.shape import EncoderShape
from lmms_prune.models.tensors import to_device

_NO_KEYS = "metric=keys reads the layer before, so it cannot act at layer 0; use metric=hidden, or a deeper layer."


@dataclass(frozen=True)
class _Sizes:
    """How many tokens the token at each raster index stands for after a stage."""

    tokens: Float[Tensor, "B N"]


@dataclass(frozen=True)
class ToMe(Method):
    """Merges tokens into their most similar neighbours until N remain.

    A pass splits the tokens, in their order, into those of even and odd rank. Every even token finds the odd one with
    the highest cosine, and the r most similar even tokens are merged into theirs: the mean, weighted by how many tokens
    each stands for, at the odd token's position. Passes with r = min(⌊n/2⌋, n-N) follow one another until N remain, in
    raster order. How many tokens each stands for is remembered from stage to stage.

    Args:
        metric: the states that are compared at a stage: the layer's input ("hidden"), or the head mean of the keys of the
            layer before ("keys"; layer 1 and deeper), averaged when tokens merge.
        place: "stage" merges the decoder layer's input. "encoder" is the published form, for LLaVA at layer 0: CLIP runs
            again with one pass between attention and MLP of every block up to the selected one, on the head mean of its
            keys; the class token is never merged, attention logits get the log of the numbers of tokens, the unmerged
            even tokens come before the odd ones in the next block, and the remaining tokens are projected, in raster
            order.

    Paper: https://arxiv.org/abs/2210.09461.
    Differs from the reference:
        - merging the decoder's input is this project's
        - in the encoder every block merges as many tokens as the others (earlier ones one more, at most half of the
          remaining tokens), so that exactly N remain, where a constant r leaves any number
        - an encoder too shallow for that repeats passes in the selected block
        - cosines in float64, means in float32.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2210.09461"
    metric: Literal["hidden", "keys"] = "hidden"
    place: Literal["stage", "encoder"] = "stage"

    def prepare(self, parts: ModelParts) -> None:
        if self.place == "encoder" and not parts.encoder_shape.is_clip:
            raise UnsupportedModelError(no_clip("place=encoder"))

    def signals(self, encoder: EncoderShape) -> Signals:
        return Signals(pixels=self.place == "encoder")

    def select(self, view: TokenView, budget: Int[Tensor, " B"]) -> Bool[Tensor, "B V"]:
        if self.place == "encoder":
            result = inside_encoder(view, budget, "place=encoder", _encoder_tokens)
            view.carry = result
            return result.keep
        result = self._at_stage(view, budget)
        view.carry = result
        # At a stage one token remains even of an image that is to keep none.
        return result.keep & to_device(budget > 0, result.keep.device)[:, None]

    def rewrite(self, view: TokenView, keep: Bool[Tensor, "B V"]) -> tuple[Float[Tensor, "B V E"], Int[Tensor, "B V"]]:
        result = view.carried(Merged)
        sizes = _sizes(view)
        # Entries that are not kept write to a spare last column.
        target = torch.where(keep, result.index, sizes.shape[1])
        view.remember(_Sizes(pad(sizes, (0, 1)).scatter(1, target, result.size.to(sizes.dtype))[:, :-1]))
        return result.hidden, result.index

    def _at_stage(self, view: TokenView, budget: Int[Tensor, " B"]) -> Merged:
        fine = torch.promote_types(view.hidden.dtype, torch.float32)
        metric = None
        if self.metric == "keys":
            if view.layer == 0:
                raise UnsupportedModelError(_NO_KEYS)
            metric = view.keys(view.visual, head_mean=True).to(fine)
        slot = torch.arange(view.valid.shape[1], device=view.valid.device).expand_as(view.valid)
        sizes = view.of_image(_sizes(view)).to(fine)
        states = view.with_additions(view.hidden).to(fine)
        tokens = Bag(states, view.hidden.shape[2], metric, sizes, slot, tuple(view.counts))
        goal = [max(1, n) for n in budget.tolist()]
        while any(n > most for n, most in zip(tokens.counts, goal, strict=True)):
            pairs = zip(tokens.counts, goal, strict=True)
            tokens = tokens.merge([max(0, min(n // 2, n - most)) for n, most in pairs])
        return tokens.in_view(view)


def rates(tokens: int, keep: int, blocks: int) -> list[list[int]]:
    """How many of `tokens` each pass of each block merges, so that `keep` remain: as evenly as halving allows."""
    for total in range(tokens - keep, tokens * blocks + 1):
        remaining, plan = tokens, []
        for block in range(blocks):
            rate = total // blocks + (block < total % blocks)
            plan.append([min(rate, remaining // 2, remaining - keep)])
            remaining -= plan[-1][0]
        if remaining == keep:
            break
    # Too shallow an encoder: further passes in the last block.
    while remaining > keep:
        plan[-1].append(min(remaining // 2, remaining - keep))
        remaining -= plan[-1][-1]
    return plan


def _encoder_tokens(encoder: ClipEncoder, images: Int[Tensor, " b"], count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run CLIP with merging until `count` tokens remain; returns states, sizes and raster indices, in raster order."""
    pixels = encoder.inputs()["pixel_values"]
    x = encoder.embed(pixels[images.to(pixels.device)])
    fine, n = torch.promote_types(x.dtype, torch.float32), x.shape[1] - 1
    size = torch.ones(x.shape[:2], dtype=fine, device=x.device)
    index = torch.arange(-1, n, device=x.device).expand(len(x), -1)
    for block, passes in enumerate(rates(n, count, encoder.shape.selected + 1)):
        bias = torch.log(size, out=torch.empty_like(size, dtype=x.dtype)) if block else None
        x, key = encoder.attend(block, x, bias)
        keys = key.mean(1, dtype=fine)
        for number, rate in enumerate(passes, start=1):
            step = matched(keys, [x.shape[1]] * len(x), [rate] * len(x), evens_first=True, protected=1)
            if number < len(passes):
                keys, _, _ = step.merge(keys, size, index)
            x, size, index = step.merge(x, size, index)
        x = encoder.feed(block, x)
    order = index.argsort(dim=1)[:, 1:]
    return encoder.project(gather(x, order)), gather(size, order), gather(index, order)


def _sizes(view: TokenView) -> Float[Tensor, "B N"]:
    """How many tokens the token at each raster index stands for before this stage."""
    if (earlier := view.remembered(_Sizes)) is not None:
        return earlier.tokens.to(view.valid.device)
    return torch.ones(len(view.sizes), max(view.sizes, default=0), device=view.valid.device)
