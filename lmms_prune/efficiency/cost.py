"""FLOPs and cache bytes from a model's sizes and the tokens in each layer.

One multiply-accumulate is 2 FLOPs. Only matrix products are counted, as torch's ``FlopCounterMode`` counts them:
attention over all pairs of a sequence, although half of them are masked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import accumulate
from math import ceil

from lmms_prune.models.sizes import Architecture, EncoderSizes

Number = int | float


def prefill_flops(model: Architecture, tokens: Sequence[Number], logits: int = 1) -> Number:
    """FLOPs of the decoder over one prompt.

    Args:
        model: sizes of the model.
        tokens: sequence length in each decoder layer, text and visual tokens together; may be averages.
        logits: positions at which the output matrix is applied.
    """
    return sum(layer_flops(model, n, n) for n in tokens) + output_flops(model, logits)


def decode_flops(model: Architecture, cached: Sequence[int], steps: int) -> Number:
    """FLOPs of `steps` decode steps after a prefill with `cached` tokens in each layer's cache.

    The prefill gives the first new token, so an answer of n tokens takes n - 1 steps.
    """
    past = sum(layer_flops(model, 1, n + step) for n in cached for step in range(1, steps + 1))
    return past + steps * output_flops(model, 1)


def kv_bytes(model: Architecture, cached: Sequence[Number]) -> list[Number]:
    """Bytes of keys and values of one row in each layer's cache of `cached` tokens."""
    return [2 * n * model.kv_heads * model.head_dim * model.bytes_per_number for n in cached]


def peak_bytes(model: Architecture, rows: Sequence[Sequence[int]], steps: int) -> Number:
    """Peak bytes of a batch beside the weights: the cache, and during the prefill one decoder layer's activations.

    A layer holds the most in its MLP: its input before and after the norm, and three arrays of the MLP's width. Rows are
    padded to the longest in each layer. Not included: the vision encoder, whose activations are gone by then.

    Args:
        model: sizes of the model.
        rows: each row's sequence length in each decoder layer, after the prefill.
        steps: decode steps after it.
    """
    lengths = [len(rows) * max(tokens) for tokens in zip(*rows, strict=True)]
    caches = list(accumulate(kv_bytes(model, lengths)))
    width = (2 * model.hidden + 3 * model.intermediate) * model.bytes_per_number
    after = sum(kv_bytes(model, [length + steps * len(rows) for length in lengths]))
    return max(after, *(cache + length * width for cache, length in zip(caches, lengths, strict=True)))


def encoder_flops(encoder: EncoderSizes, grid: tuple[int, int]) -> int:
    """FLOPs of the vision encoder and the projector on one image of `grid` rows and columns of visual tokens.

    In tiles, an image takes as many as its tokens need at least.
    """
    tokens = grid[0] * grid[1]
    if encoder.tile:
        tile = replace(encoder, tile=0)
        return ceil(tokens / encoder.tile**2) * encoder_flops(tile, (encoder.tile, encoder.tile))
    patches = tokens * encoder.merge**2
    sequence = patches + encoder.class_tokens
    embed = 2 * patches * encoder.patch * encoder.hidden
    matrices = 4 * encoder.hidden**2 + encoder.matrices * encoder.hidden * encoder.intermediate
    blocks = 2 * encoder.layers * sequence * matrices
    full = sum(layer in encoder.full for layer in range(encoder.layers))
    pairs = full * sequence**2 + (encoder.layers - full) * _windowed(encoder, grid)
    projector = sum(2 * tokens * wide * out for wide, out in encoder.projector)
    return embed + blocks + 4 * pairs * encoder.hidden + projector


def layer_flops(model: Architecture, queries: Number, keys: Number) -> Number:
    """FLOPs of one decoder layer on `queries` tokens that attend to `keys`."""
    wide = model.heads * model.head_dim
    projections = model.hidden * (2 * wide + 2 * model.kv_heads * model.head_dim)
    return 2 * queries * (projections + 3 * model.hidden * model.intermediate) + 4 * queries * keys * wide


def output_flops(model: Architecture, positions: int) -> int:
    """FLOPs of the output matrix at some positions."""
    return 2 * positions * model.hidden * model.vocabulary


def _windowed(encoder: EncoderSizes, grid: tuple[int, int]) -> int:
    """Pairs of patches that attend to each other in windows; windows at the right and bottom edges may be smaller."""
    if not encoder.window:
        return 0
    down, across = (
        [min(encoder.window, side - start * encoder.window) for start in range(ceil(side / encoder.window))]
        for side in grid
    )
    return sum((rows * columns * encoder.merge**2) ** 2 for rows in down for columns in across)
