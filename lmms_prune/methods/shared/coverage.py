"""The greedy search of facility location: every pick adds most to how well the picks cover all tokens.

One GPU kernel, with a reference in plain torch, as in `lmms_prune.methods.shared.kernels`. Cosines are whole numbers of
2⁻²⁴, whose sums are exact in any order: so kernel, reference and any batch agree to the last bit.
Dimension letters: B images, V visual tokens, D features.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import lru_cache
from subprocess import CalledProcessError

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.shared.tensors import BLOCK
from lmms_prune.models.tensors import to_device

try:
    import triton
    import triton.language as tl
except ImportError:  # torch installs Triton only on platforms with CUDA.
    triton = None

_STEPS = 2**24
"""Whole numbers in which a cosine of 1 is written."""
_COVERED = 2**26
"""The coverage of padding: more than any cosine gives."""
_MOST_BYTES = 2**30
"""How many bytes the cosines of all pairs may take at once; a single image may take more."""


def covering(
    unit: Float[Tensor, "B V D"], weight: Float[Tensor, "B V"], valid: Bool[Tensor, "B V"], limit: Int[Tensor, " B"]
) -> Bool[Tensor, "B V"]:
    """Greedy search: every pick is the candidate with the highest weighted gain in coverage.

    A token is covered by its highest cosine to a pick, at least by 0. A candidate's gain is what it adds to the coverage of
    all tokens, times its weight.

    Args:
        unit: the tokens' directions, in the finest type. The cosines of all pairs take 4·V² bytes for each image.
        weight: of the tokens, not negative.
        valid: the tokens that are covered, and may be picked.
        limit: how many to pick in each image, at most as many as there are candidates; on the host.

    Returns:
        a mask of the picks; ties go to the lower index.
    """
    fused = unit.is_cuda and _works(unit.device)
    at_once = max(1, _MOST_BYTES // max(1, 4 * unit.shape[1] ** 2))
    parts = []
    for start in range(0, len(unit), at_once):
        some = slice(start, start + at_once)
        most = int(limit[some].max())
        number = to_device(limit[some], unit.device)
        parts.append((_fused if fused else _plain)(_cosines(unit[some]), weight[some], valid[some], number, most))
    return parts[0] if len(parts) == 1 else torch.cat([valid[:0], *parts])


def _cosines(unit: Float[Tensor, "B V D"]) -> Int[Tensor, "B V V"]:
    blocks = [
        (unit[:, start : start + BLOCK] @ unit.transpose(1, 2)).mul_(_STEPS).round_().to(torch.int32)
        for start in range(0, unit.shape[1], BLOCK)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=1)


@lru_cache
def _works(device: torch.device) -> bool:
    """Whether the kernel can be built on this machine (Triton needs a C compiler) and agrees with the reference on a probe."""
    if triton is None:
        return False
    try:
        return bool(torch.equal(_fused(*_probe(device)), _plain(*_probe(device))))
    except (RuntimeError, OSError, CalledProcessError, KeyError, TypeError, triton.TritonError):
        return False


def _probe(device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """A small search with ties, by which the kernel is tried."""
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(2, 37, 5, generator=generator).double(), dim=-1)
    unit[:, -4] = unit[:, 0]
    valid = torch.arange(37).expand(2, -1) < torch.tensor([[37], [34]])
    weight = torch.rand(2, 37, generator=generator).double().mul(8).round()
    limit = torch.tensor([9, 12])
    cosine, weight, valid, limit = (x.to(device) for x in (_cosines(unit), weight, valid, limit))
    return cosine, weight, valid, limit, 12


def _plain(cosine: Tensor, weight: Tensor, valid: Tensor, limit: Tensor, most: int) -> Tensor:
    """The reference implementation, also used on CPUs."""
    keep, free = torch.zeros_like(valid), valid
    covered = torch.where(valid, 0, _COVERED).to(torch.int32)
    for step in range(most):
        gain = (cosine - covered[..., None]).clamp_(min=0).sum(1)
        score = (gain * weight).masked_fill(~free, -torch.inf)
        pick = score.argmax(dim=1, keepdim=True)
        picked = torch.zeros_like(valid).scatter(1, pick, True) & (step < limit)[:, None]
        keep, free = keep | picked, free & ~picked
        near = cosine.gather(1, pick[..., None].expand(-1, -1, cosine.shape[2])).squeeze(1)
        covered = torch.maximum(covered, near)
    return keep


def _fused(
    cosine: Tensor, weight: Tensor, valid: Tensor, limit: Tensor, most: int, piece: int = 1024, rows: int = 8
) -> Tensor:
    """The Triton kernel: one program for each image, which updates gains only by tokens whose coverage has changed.

    `piece`, the tokens that are looked at together, and `rows`, the changed tokens, are for tests.
    """
    images, tokens = valid.shape
    keep = valid.new_zeros(valid.shape, dtype=torch.int8)
    if valid.numel() and most:
        covered = torch.where(valid, 0, _COVERED).to(torch.int32)
        gain = torch.where(valid[..., None], cosine.clamp(min=0), 0).sum(1)
        piece = max(16, min(piece, triton.next_power_of_2(tokens)))
        # Triton launches on the current device, whatever the tensors'.
        with torch.cuda.device(cosine.device) if cosine.is_cuda else nullcontext():
            _cover[(images,)](
                cosine.contiguous(),
                gain,
                weight.to(torch.float64).contiguous(),
                covered,
                valid.to(torch.int8).contiguous(),
                limit.to(torch.int32).contiguous(),
                keep,
                torch.empty_like(covered),
                torch.empty_like(covered),
                tokens,
                PIECE=piece,
                ROWS=rows,
                num_warps=4 if piece <= 256 else 8,
            )
    return keep.bool()


if triton is not None:

    @triton.jit
    def _cover(  # type: ignore[no-untyped-def]
        cosine,
        gain,
        weight,
        covered,
        free,
        limit,
        keep,
        changed,
        before,
        tokens,
        PIECE: tl.constexpr,  # noqa: N803
        ROWS: tl.constexpr,  # noqa: N803
    ):
        row = tl.program_id(0).to(tl.int64)
        base = row * tokens
        lane, number = tl.arange(0, PIECE), tl.arange(0, ROWS)
        count = 0
        for _ in range(tl.load(limit + row)):
            # Gains change by the tokens whose coverage the last pick has changed; the best is the next pick.
            top, pick = tl.full([], float("-inf"), tl.float64), tokens - 1
            for start in range(0, tokens, PIECE):
                column = start + lane
                inside = column < tokens
                value = tl.load(gain + base + column, mask=inside, other=0)
                for first in range(0, count, ROWS):
                    exists = first + number < count
                    who = tl.load(changed + base + first + number, mask=exists, other=0).to(tl.int64)
                    old = tl.load(before + base + first + number, mask=exists, other=0)
                    new = tl.load(covered + base + who, mask=exists, other=0)
                    place = cosine + (base + who[:, None]) * tokens + column[None, :]
                    near = tl.load(place, mask=exists[:, None] & inside[None, :], other=0)
                    less = tl.maximum(near - old[:, None], 0) - tl.maximum(near - new[:, None], 0)
                    value -= tl.sum(less.to(tl.int64), axis=0)
                tl.store(gain + base + column, value, mask=inside)
                is_free = tl.load(free + base + column, mask=inside, other=0) > 0
                score = value.to(tl.float64) * tl.load(weight + base + column, mask=inside, other=0.0)
                # What is not a number comes first, as in torch.
                score = tl.where(score == score, score, float("inf"))
                score = tl.where(is_free, score, float("-inf"))
                best = tl.max(score, axis=0)
                # The lowest index of equal scores.
                lowest = tl.min(tl.where((score == best) & is_free, column, tokens), axis=0)
                pick = tl.where(best > top, lowest, pick)
                top = tl.maximum(best, top)
            pick = tl.minimum(pick, tokens - 1)
            tl.debug_barrier()
            tl.store(keep + base + pick, 1)
            tl.store(free + base + pick, 0)
            count = 0
            for start in range(0, tokens, PIECE):
                column = start + lane
                inside = column < tokens
                near = tl.load(cosine + (base + pick) * tokens + column, mask=inside, other=0)
                old = tl.load(covered + base + column, mask=inside, other=0)
                rises = inside & (near > old)
                place = base + count + tl.cumsum(rises.to(tl.int32), axis=0) - 1
                tl.store(changed + place, column, mask=rises)
                tl.store(before + place, old, mask=rises)
                tl.store(covered + base + column, near, mask=rises)
                count += tl.sum(rises.to(tl.int32), axis=0)
            tl.debug_barrier()
