"""The estimated cost of a schedule on a model, before it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isqrt

from lmms_prune.efficiency.cost import Number, encoder_flops, kv_bytes, prefill_flops
from lmms_prune.efficiency.roofline import (
    GPUS,
    NEW_TOKENS,
    Gpu,
    Roofline,
    encoder_seconds,
    layer_seconds,
    output_seconds,
    roofline,
)
from lmms_prune.models.sizes import Architecture
from lmms_prune.schedule import PromptSizes, Schedule

TEXT_TOKENS = 64
"""Text tokens of a prompt in estimates, if no other number is given."""


@dataclass(frozen=True)
class Estimate:
    """The cost of one prompt with one image.

    Args:
        visual: visual tokens in each decoder layer.
        flops: of the decoder's prefill, with the output matrix at the last position.
        encoder_flops: of the vision encoder and the projector, which no schedule changes. Where images differ in size, the
            image is as near to a square as its number of tokens allows; its shape decides Qwen2.5-VL's windows.
        kv_bytes: of the cache at the prefill's end.
    """

    visual: tuple[int, ...]
    flops: Number
    encoder_flops: int
    kv_bytes: Number

    @property
    def total_flops(self) -> Number:
        """FLOPs until the first token: vision encoder and prefill."""
        return self.encoder_flops + self.flops


def estimate(model: Architecture, schedule: Schedule, visual_tokens: int, text_tokens: Number) -> Estimate:
    """The cost of `schedule`, every ``?`` solved, on a prompt of `text_tokens` and one image of `visual_tokens`.

    Text tokens may be an average, such as 116.4. Not included: the FLOPs of the methods, of a guide, and of a second pass
    through the encoder.
    """
    tiles = prompt_sizes(model, visual_tokens).tiles(visual_tokens)
    visual = schedule.layer_counts(model.layers, [visual_tokens], tiles)
    lengths = [n + text_tokens for n in visual]
    cached = [n + text_tokens for n in schedule.cached_counts(model.layers, [visual_tokens], tiles)]
    encoder = encoder_flops(model.encoder, grid_of(visual_tokens))
    return Estimate(tuple(visual), prefill_flops(model, lengths), encoder, sum(kv_bytes(model, cached)))


def prompt_sizes(
    model: Architecture, visual_tokens: int | None = None, text_tokens: Number = TEXT_TOKENS
) -> PromptSizes:
    """The sizes on which budgets of any kind are solved, for one image in a prompt of `text_tokens`.

    Args:
        model: sizes of the model.
        visual_tokens: of the image; by default those of every image, or of the family's example where images differ in
            size: then solutions are ratios.
        text_tokens: of the prompt.
    """

    def flops(counts: Sequence[int]) -> Number:
        return prefill_flops(model, [n + text_tokens for n in counts], logits=int(len(counts) == model.layers))

    def kv(counts: Sequence[int]) -> Number:
        return sum(kv_bytes(model, [n + text_tokens for n in counts]))

    def first_token(gpu: Gpu) -> Callable[[Sequence[int]], Number]:
        # The cards' peaks are of 16-bit products, whatever a CPU loads the model in.
        halved = model.in_dtype("bfloat16")
        before = encoder_seconds(halved, gpu, encoder_flops(model.encoder, grid_of(fixed or model.example_tokens)))

        def seconds(counts: Sequence[int]) -> Number:
            after = output_seconds(halved, gpu) if len(counts) == model.layers else 0.0
            return before + sum(layer_seconds(halved, gpu, n + text_tokens) for n in counts) + after

        return seconds

    fixed = visual_tokens or model.tokens_per_image
    costs: dict[str, Callable[[Sequence[int]], Number]] = {"flops": flops, "kv": kv}
    costs |= {f"ttft@{name}": first_token(gpu) for name, gpu in GPUS.items()}
    return PromptSizes(model.layers, fixed, fixed or model.example_tokens, costs, model.encoder.tile**2)


def on_gpu(
    model: Architecture,
    schedule: Schedule,
    visual_tokens: int,
    text_tokens: Number,
    gpu: Gpu,
    batch: int = 1,
    new_tokens: int = NEW_TOKENS,
) -> Roofline:
    """The least times and the memory of `schedule` on a card, for prompts as in `estimate`; see `roofline`."""
    tiles = prompt_sizes(model, visual_tokens).tiles(visual_tokens)
    lengths = [n + text_tokens for n in schedule.layer_counts(model.layers, [visual_tokens], tiles)]
    cached = [n + text_tokens for n in schedule.cached_counts(model.layers, [visual_tokens], tiles)]
    flops = encoder_flops(model.encoder, grid_of(visual_tokens))
    return roofline(model, gpu, lengths, cached, flops, batch, new_tokens)


def grid_of(tokens: int) -> tuple[int, int]:
    """The rows and columns nearest to a square that have `tokens` in all."""
    rows = next(rows for rows in range(isqrt(tokens), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows
