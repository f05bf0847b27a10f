"""What a schedule will cost on a model, before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

from lmms_prune.efficiency.cost import Number, encoder_flops, kv_bytes, prefill_flops
from lmms_prune.models.sizes import Architecture
from lmms_prune.schedule import PromptSizes, Schedule

TEXT_TOKENS = 64
"""Of a prompt whose cost is estimated where nobody says how long it is."""


@dataclass(frozen=True)
class Estimate:
    """One prompt with one image.

    Args:
        visual: visual tokens in each decoder layer.
        flops: of the decoder's prefill, with the output matrix at the last position.
        encoder_flops: of the vision encoder and the projector, which no schedule changes; where images differ in size, of
            one that is as near to a square as its tokens allow, which decides where Qwen2.5-VL's windows are cut.
        kv_bytes: of the cache at the prefill's end.
    """

    visual: tuple[int, ...]
    flops: Number
    encoder_flops: int
    kv_bytes: Number


def estimate(model: Architecture, schedule: Schedule, visual_tokens: int, text_tokens: Number) -> Estimate:
    """What `schedule`, every ``?`` solved, costs on a prompt of `text_tokens` and one image of `visual_tokens`.

    Text tokens may be an average, 116.4 for one. What a method itself computes, a guide or a second pass through the
    encoder is not in it.
    """
    visual = schedule.layer_counts(model.layers, [visual_tokens])
    lengths = [n + text_tokens for n in visual]
    encoder = encoder_flops(model.encoder, _grid(visual_tokens))
    return Estimate(tuple(visual), prefill_flops(model, lengths), encoder, sum(kv_bytes(model, lengths)))


def prompt_sizes(
    model: Architecture, visual_tokens: int | None = None, text_tokens: Number = TEXT_TOKENS
) -> PromptSizes:
    """What budgets of any kind are solved on, for one image in a prompt of `text_tokens`.

    Args:
        model: whose cost is meant.
        visual_tokens: of the image; by default every image's, or the family's example where images differ in size: then
            solutions are ratios.
        text_tokens: of the prompt.
    """

    def flops(counts: Sequence[int]) -> Number:
        return prefill_flops(model, [n + text_tokens for n in counts], logits=int(len(counts) == model.layers))

    def kv(counts: Sequence[int]) -> Number:
        return sum(kv_bytes(model, [n + text_tokens for n in counts]))

    fixed = visual_tokens or model.tokens_per_image
    return PromptSizes(model.layers, fixed, fixed or model.example_tokens, {"flops": flops, "kv": kv})


def _grid(tokens: int) -> tuple[int, int]:
    """The rows and columns nearest to a square that have `tokens` in all."""
    rows = next(rows for rows in range(isqrt(tokens), 0, -1) if tokens % rows == 0)
    return rows, tokens // rows
