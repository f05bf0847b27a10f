"""The Triton kernel of the greedy search of facility location."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # torch installs Triton only on platforms with CUDA.
    triton = None

if triton is not None:
    from lmms_prune.methods.shared.greedy.kernel_steps import dot

    @triton.jit
    def _whole(x):  # type: ignore[no-untyped-def]
        """A cosine as a whole number of 2⁻²⁴: adding and taking off 1.5 * 2**52 rounds, half to even."""
        return (x * 16777216.0 + 6755399441055744.0 - 6755399441055744.0).to(tl.int32)

    @triton.jit
    def cover(  # type: ignore[no-untyped-def]
        source,
        gain,
        weight,
        covered,
        free,
        limit,
        keep,
        changed,
        before,
        tokens,
        width,
        STORED: tl.constexpr,  # noqa: N803
        PIECE: tl.constexpr,  # noqa: N803
        ROWS: tl.constexpr,  # noqa: N803
        CHUNK: tl.constexpr,  # noqa: N803
    ):
        """The search for one image; `source` holds the cosines of all pairs, or else the directions."""
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
                if STORED:
                    for first in range(0, count, ROWS):
                        exists = first + number < count
                        who = tl.load(changed + base + first + number, mask=exists, other=0).to(tl.int64)
                        old = tl.load(before + base + first + number, mask=exists, other=0)
                        new = tl.load(covered + base + who, mask=exists, other=0)
                        place = source + (base + who[:, None]) * tokens + column[None, :]
                        near = tl.load(place, mask=exists[:, None] & inside[None, :], other=0)
                        less = tl.maximum(near - old[:, None], 0) - tl.maximum(near - new[:, None], 0)
                        value -= tl.sum(less.to(tl.int64), axis=0)
                else:
                    for index in range(count):
                        who = tl.load(changed + base + index).to(tl.int64)
                        old, new = tl.load(before + base + index), tl.load(covered + base + who)
                        near = _whole(dot(source, row, tokens, who, column, inside, width, PIECE, CHUNK))
                        value -= (tl.maximum(near - old, 0) - tl.maximum(near - new, 0)).to(tl.int64)
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
                if STORED:
                    near = tl.load(source + (base + pick) * tokens + column, mask=inside, other=0)
                else:
                    near = _whole(dot(source, row, tokens, pick, column, inside, width, PIECE, CHUNK))
                old = tl.load(covered + base + column, mask=inside, other=0)
                rises = inside & (near > old)
                place = base + count + tl.cumsum(rises.to(tl.int32), axis=0) - 1
                tl.store(changed + place, column, mask=rises)
                tl.store(before + place, old, mask=rises)
                tl.store(covered + base + column, near, mask=rises)
                count += tl.sum(rises.to(tl.int32), axis=0)
            tl.debug_barrier()
