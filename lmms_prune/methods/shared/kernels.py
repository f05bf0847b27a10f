"""A greedy search as one GPU kernel: otherwise its hundreds of dependent picks would cost hundreds of launches."""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from subprocess import CalledProcessError

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # torch installs Triton only on platforms with CUDA.
    triton = None


def farthest(
    similarity: Float[Tensor, "B V V"],
    first: Float[Tensor, "B V"],
    valid: Bool[Tensor, "B V"],
    count: Int[Tensor, " B"],
) -> Bool[Tensor, "B V"]:
    """Greedy max-min search: each pick is the candidate that is farthest from its nearest earlier pick.

    Args:
        similarity: of all pairs; distances are 1 - similarity.
        first: the score by which the first pick is made.
        valid: the candidates.
        count: how many to pick in each row, at most as many as there are candidates.

    Returns:
        a mask of the picks; ties go to the lower index.
    """
    fused = similarity.is_cuda and _works(similarity.device)
    return (_fused if fused else _plain)(similarity, first, valid, count)


@lru_cache
def _works(device: torch.device) -> bool:
    """Whether the kernel can be built on this machine (Triton needs a C compiler) and agrees with `_plain` on a probe."""
    if triton is None:
        return False
    side = torch.linspace(0, 3, 37, device=device)
    unit = torch.stack([side.cos(), side.sin()], dim=-1)[None]
    probe = (
        unit @ unit.transpose(1, 2),
        side[None] % 1,
        torch.ones_like(side[None], dtype=torch.bool),
        torch.tensor([9]),
    )
    try:
        return bool(torch.equal(_fused(*probe), _plain(*probe)))
    except (RuntimeError, OSError, CalledProcessError):
        return False


def _plain(similarity: Tensor, first: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """The reference implementation, also used on CPUs."""
    rows, limit = torch.arange(len(first), device=first.device), count.to(first.device)
    keep, farness = torch.zeros_like(valid), first
    nearest = torch.full_like(first, torch.inf)
    for step in range(int(count.max()) if len(count) else 0):
        pick = farness.masked_fill(keep | ~valid, -torch.inf).argmax(dim=1)
        keep = keep.index_put((rows, pick), keep[rows, pick] | (step < limit))
        farness = nearest = torch.minimum(nearest, 1 - similarity[rows, pick])
    return keep


def _fused(similarity: Tensor, first: Tensor, valid: Tensor, count: Tensor) -> Tensor:
    """The Triton kernel: one program per image, its state in registers."""
    keep = torch.zeros_like(valid, dtype=torch.int8)
    if keep.numel():
        similarity, first, tokens = similarity.contiguous(), first.contiguous(), valid.shape[1]
        is_valid, limit = valid.to(torch.int8).contiguous(), count.to(first.device, torch.int32)
        block = triton.next_power_of_2(tokens)
        warps = 4 if block <= 1024 else 8
        # Triton launches on the current device, whatever the tensors'.
        with torch.cuda.device(similarity.device) if similarity.is_cuda else nullcontext():
            _pick[(len(keep),)](similarity, first, is_valid, limit, keep, tokens, BLOCK=block, num_warps=warps)
    return keep.bool()


if triton is not None:

    @triton.jit
    def _pick(similarity, first, valid, limit, keep, tokens, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < tokens
        is_free = tl.load(valid + row * tokens + column, mask=inside, other=0).to(tl.int32)
        farness = tl.load(first + row * tokens + column, mask=inside, other=float("-inf"))
        nearest = tl.full([BLOCK], float("inf"), dtype=farness.dtype)
        picked = tl.zeros([BLOCK], dtype=tl.int32)
        steps = tl.load(limit + row)
        for _ in range(steps):
            score = tl.where(is_free > 0, farness, float("-inf"))
            best = tl.max(score, axis=0)
            # The lowest index of equal scores; a free one even if only -inf remains, and never beyond the last.
            pick = tl.minimum(tl.min(tl.where((score == best) & (is_free > 0), column, BLOCK), axis=0), tokens - 1)
            picked = tl.where(column == pick, 1, picked)
            is_free = tl.where(column == pick, 0, is_free)
            near = tl.load(similarity + (row * tokens + pick) * tokens + column, mask=inside, other=0.0)
            nearest = tl.minimum(nearest, 1 - near)
            farness = nearest
        tl.store(keep + row * tokens + column, picked.to(tl.int8), mask=inside)
