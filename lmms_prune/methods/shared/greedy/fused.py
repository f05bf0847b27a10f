"""Greedy searches as GPU kernels: what is laid out for them, and how they are launched.

Dimension letters: B images, V visual tokens, D features, P pivots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lmms_prune.methods.shared.greedy import plain
from lmms_prune.methods.shared.greedy import products as store
from lmms_prune.methods.shared.greedy.fused_merging import EXACT, fused_merge, fused_nearest, fused_pairs
from lmms_prune.methods.shared.greedy.plain_passes import Lists
from lmms_prune.models.tensors import finest

try:
    import triton
except ImportError:  # torch installs Triton only on platforms with CUDA.
    triton = None
else:
    from lmms_prune.methods.shared.greedy.kernel_cover import cover
    from lmms_prune.methods.shared.greedy.kernel_passes import passes
    from lmms_prune.methods.shared.greedy.kernel_steps import steps
    from lmms_prune.methods.shared.greedy.kernel_turns import turns


def on_device(args: Sequence[Any]) -> AbstractContextManager:
    """A block in which the device of the first tensor among `args` is the current one."""
    device = next(x.device for x in tree_leaves(args) if isinstance(x, Tensor))
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _fused_greedy(
    rule: str,
    vectors: Tensor,
    first: Tensor,
    valid: Tensor,
    limit: Tensor,
    most: int,
    stored: Tensor | None,
    block: int | None = None,
) -> Tensor:
    """One program for each image, whose state is in registers; for large images, several programs in step.

    `block`, the tokens of each program, is for tests.
    """
    images, tokens = valid.shape
    if not valid.numel() or not most:
        return torch.zeros_like(valid)
    if stored is None and tokens <= store.MOST_STORED:
        stored = vectors @ vectors.transpose(1, 2) if rule == "determinant" else store.products(vectors, first.dtype)
    block = block or _tokens_per_program(first.device, images, tokens, stored is not None)
    parts = -(-tokens // block)
    fine = finest(first.device)
    state = first.to(fine).contiguous()
    keep, free = valid.new_zeros(valid.shape, dtype=torch.int8), valid.to(torch.int8).contiguous()
    # What the programs of an image tell each other: the best score of each, its token and its state, twice over, so that
    # one that is ahead writes where nobody reads; and how many have reported.
    best = state.new_empty(images, 2, parts, 2)
    where, reported = limit.new_empty(images, 2, parts, dtype=torch.int32), limit.new_zeros(images, dtype=torch.int32)
    # No more picks are independent of the earlier ones than there are features: the rows take no more than the vectors.
    independent = min(most, vectors.shape[2]) if rule == "determinant" else 1
    rows = state.new_empty(images, independent, tokens)
    lows, counts = plain.LEAST * state, limit.new_zeros(images, parts, dtype=torch.int32)
    source = (vectors if stored is None else stored).contiguous()
    buffers = source, state, free, limit.to(torch.int32), keep, best, where, reported, lows, rows, counts
    together = parts == 1 or _holds(first.device, images * parts)
    # Where programs cannot wait for each other, every step is a launch.
    spans = [(-1, most)] if together else [(step, step + 1) for step in range(-1, most)]
    extra = {"launch_cooperative_grid": True} if together and parts > 1 else {}
    for start, stop in spans:
        steps[(images, parts)](
            *buffers,
            start,
            stop,
            tokens,
            source.shape[2],
            independent,
            RULE=rule,
            STORED=stored is not None,
            COARSE=first.dtype != fine,
            PARTS=parts,
            PARTS_BLOCK=triton.next_power_of_2(parts),
            BLOCK=block,
            CHUNK=16,
            EARLIER=max(1, min(8, 8192 // block)),
            num_warps=4 if block < 1024 else 8 if block <= 2048 else 16,
            **extra,
            **EXACT,
        )
    return keep.bool()


def _tokens_per_program(device: torch.device, images: int, tokens: int, stores: bool) -> int:
    """Products that are computed anew for each pick are the work of as many programs as run at once."""
    padded = triton.next_power_of_2(tokens)
    if stores or device.type != "cuda":
        return padded
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    block = 32
    while block < padded and images * -(-tokens // block) > processors:
        block *= 2
    return block


def _holds(device: torch.device, programs: int) -> bool:
    """Whether all programs run at the same time, so that they may wait for each other."""
    return device.type == "cuda" and programs <= torch.cuda.get_device_properties(device).multi_processor_count


def _fused_in_turn(order: Tensor, free: Tensor, quota: Tensor) -> Tensor:
    images, pivots, tokens = order.shape
    if not free.numel():
        return torch.zeros_like(free)
    number = torch.arange(tokens, device=order.device, dtype=torch.int32).expand(order.shape)
    rank = torch.empty_like(order, dtype=torch.int32).scatter_(2, order, number)
    keep = free.new_zeros(free.shape, dtype=torch.int8)
    block = triton.next_power_of_2(tokens)
    turns[(images,)](
        rank,
        free.to(torch.int8).contiguous(),
        quota.to(torch.int32).contiguous(),
        keep,
        tokens,
        pivots,
        BITS=block.bit_length(),
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
        **EXACT,
    )
    return keep.bool()


def _fused_thinned(lists: Lists, step: int) -> Tensor:
    unit, cosine, neighbour = lists.unit, lists.cosine, lists.neighbour
    images, tokens = unit.shape[:2]
    keep = unit.new_zeros(images, tokens, dtype=torch.int8)
    order = torch.arange(tokens, device=unit.device, dtype=torch.int32).expand(images, 2, tokens).contiguous()
    half = max(16, triton.next_power_of_2((max(lists.lengths) + 1) // 2))
    passes[(images,)](
        unit.contiguous(),
        cosine.contiguous(),
        neighbour.to(torch.int32).contiguous(),
        lists.length.to(torch.int32),
        lists.goal.to(torch.int32),
        order,
        keep,
        tokens,
        unit.shape[2],
        cosine.shape[2],
        STEP=step,
        HALF=half,
        PIECE=64,
        CHUNK=16,
        num_warps=4 if half <= 512 else 8 if half <= 2048 else 16,
        **EXACT,
    )
    return keep.bool()


def _fused_covering(
    unit: Tensor,
    stored: Tensor | None,
    weight: Tensor,
    valid: Tensor,
    limit: Tensor,
    most: int,
    piece: int = 1024,
    rows: int = 8,
) -> Tensor:
    """One program for each image, which updates gains only by tokens whose coverage has changed.

    `piece`, the tokens that are looked at together, and `rows`, the changed tokens, are for tests.
    """
    images, tokens = valid.shape
    keep = valid.new_zeros(valid.shape, dtype=torch.int8)
    if valid.numel() and most:
        covered = torch.where(valid, 0, plain.COVERED).to(torch.int32)
        # Cosines that are computed anew take more registers.
        piece = max(16, min(piece if stored is not None else min(piece, 256), triton.next_power_of_2(tokens)))
        cover[(images,)](
            (unit if stored is None else stored).contiguous(),
            plain.gains(unit, stored, covered),
            weight.to(torch.float64).contiguous(),
            covered,
            valid.to(torch.int8).contiguous(),
            limit.to(torch.int32).contiguous(),
            keep,
            torch.empty_like(covered),
            torch.empty_like(covered),
            tokens,
            unit.shape[2],
            STORED=stored is not None,
            PIECE=piece,
            ROWS=rows,
            CHUNK=16,
            num_warps=4 if piece <= 256 else 8,
            **EXACT,
        )
    return keep.bool()


SEARCHES: dict[str, Callable[..., Any]] = {
    "greedy": _fused_greedy,
    "in_turn": _fused_in_turn,
    "thinned": _fused_thinned,
    "covering": _fused_covering,
    "nearest": fused_nearest,
    "pairs": fused_pairs,
    "merge": fused_merge,
}
