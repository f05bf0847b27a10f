"""The Triton kernel of pivots that pick in turn."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # torch installs Triton only on platforms with CUDA.
    triton = None

if triton is not None:

    @triton.jit
    def turns(rank, free, quota, keep, tokens, pivots, BITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """Each pivot in turn takes the free tokens whose rank is below a threshold, which is found by halving."""
        row = tl.program_id(0).to(tl.int64)
        column = tl.arange(0, BLOCK)
        inside = column < tokens
        is_free = tl.load(free + row * tokens + column, mask=inside, other=0).to(tl.int32)
        picked = tl.zeros([BLOCK], dtype=tl.int32)
        for pivot in range(pivots):
            own = tl.load(rank + (row * pivots + pivot) * tokens + column, mask=inside, other=BLOCK)
            share = tl.load(quota + row * pivots + pivot)
            threshold = 0
            # The largest threshold below which there are no more free tokens than the pivot may take.
            for bit in range(BITS):
                more = threshold + (1 << (BITS - 1 - bit))
                below = tl.sum(tl.where((own < more) & (is_free > 0), 1, 0), axis=0)
                threshold = tl.where(below <= share, more, threshold)
            takes = (own < threshold) & (is_free > 0)
            picked = tl.where(takes, 1, picked)
            is_free = tl.where(takes, 0, is_free)
        tl.store(keep + row * tokens + column, picked.to(tl.int8), mask=inside)
