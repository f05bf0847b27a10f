"""A merging pass as GPU kernels: how they are launched. Functions and letters as in `plain_merging`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lmms_prune.methods.shared.tensors import BLOCK
from lmms_prune.models.tensors import to_device

try:
    import triton
except ImportError:  # torch installs Triton only on platforms with CUDA.
    triton = None
else:
    from lmms_prune.methods.shared.greedy import kernel_merging as kernels

# A product and a sum are rounded one after the other, as by the references and in the interpreter.
EXACT = {"enable_fp_fusion": False}
_ROWS, _PIECE = 16, 64


def fused_nearest(metric: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `plain_nearest`: a kernel for the directions, then a product of matrices and a kernel for each block of rows."""
    images, tokens, width = metric.shape
    unit = torch.empty(metric.shape, dtype=torch.float64, device=metric.device)
    kernels.normalised[(images * tokens,)](metric.contiguous(), unit, width, CHUNK=256, **EXACT)
    even, odd = unit[:, ::2], unit[:, 1::2]
    score = unit.new_empty(even.shape[:2])
    partner = torch.empty_like(score, dtype=torch.long)
    # In blocks of rows, so that the matrix of all pairs never exists at once.
    for first in range(0, even.shape[1], BLOCK):
        products = even[:, first : first + BLOCK] @ odd.transpose(1, 2)
        rows = products.shape[1]
        kernels.nearest[(images, triton.cdiv(rows, _ROWS))](
            products,
            score if length is None else length,
            score,
            partner,
            first,
            rows,
            even.shape[1],
            odd.shape[1],
            RAGGED=length is not None,
            ROWS=_ROWS,
            PIECE=_PIECE,
            **EXACT,
        )
    return score, partner


def fused_pairs(
    score: Tensor,
    partner: Tensor,
    tokens: int,
    counts: Sequence[int],
    remove: Sequence[int],
    evens_first: bool,
    protected: int,
) -> tuple[Tensor, Tensor]:
    """As `plain_pairs`, one program for each image."""
    images, evens = score.shape
    kept = max(count - r for count, r in zip(counts, remove, strict=True))
    into = partner.new_empty(images, tokens)
    order = partner.new_empty(images, kept)
    # Numbers that all images share need not be copied to the device.
    is_ragged = len({*zip(counts, remove, strict=True)}) > 1
    lengths, removed = to_device([counts, remove], score.device) if is_ragged else (counts[0], remove[0])
    block = max(16, triton.next_power_of_2(evens))
    kernels.pairs[(images,)](
        score.contiguous(),
        partner.contiguous(),
        lengths,
        removed,
        into,
        order,
        tokens,
        evens,
        kept,
        RAGGED=is_ragged,
        EVENS_FIRST=evens_first,
        PROTECTED=protected,
        BLOCK=block,
        PIECE=max(1, min(16, 8192 // block)),
        num_warps=4 if block <= 1024 else 8 if block <= 4096 else 16,
        **EXACT,
    )
    return into, order


def fused_merge(x: Tensor, weight: Tensor, slot: Tensor, into: Tensor, order: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `plain_merge`, one program for each remaining token."""
    (images, tokens, width), kept = x.shape, order.shape[1]
    mean, total, slots = x.new_empty(images, kept, width), weight.new_empty(order.shape), slot.new_empty(order.shape)
    block, every = min(1024, triton.next_power_of_2(width)), max(16, triton.next_power_of_2(tokens))
    if mean.numel():
        kernels.merge[(images, kept, triton.cdiv(width, block))](
            x.contiguous(),
            weight.contiguous(),
            slot.contiguous(),
            into.contiguous(),
            order.contiguous(),
            mean,
            total,
            slots,
            tokens,
            kept,
            width,
            TOKENS=every,
            BLOCK=block,
            num_warps=4 if every <= 2048 else 8 if every <= 8192 else 16,
            **EXACT,
        )
    return mean, total, slots
