"""The Triton kernel of searches whose every pick is the candidate with the highest score."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # torch installs Triton only on platforms with CUDA.
    triton = None

if triton is not None:

    @triton.jit
    def on_grid(x):  # type: ignore[no-untyped-def]
        """`settled`, in float64: adding and taking off 1.5 * 2**52 rounds to whole numbers, half to even."""
        return (x * 4294967296.0 + 6755399441055744.0 - 6755399441055744.0) / 4294967296.0

    @triton.jit
    def dot(source, row, tokens, pick, column, inside, width, BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """The products of one token with those of `column`."""
        feature = tl.arange(0, CHUNK)
        total = tl.zeros([BLOCK, CHUNK], dtype=tl.float64)
        for start in range(0, width, CHUNK):
            exists = start + feature < width
            chosen = tl.load(source + (row * tokens + pick) * width + start + feature, mask=exists, other=0.0)
            other = source + (row * tokens + column[:, None]) * width + (start + feature)[None, :]
            total += tl.load(other, mask=inside[:, None] & exists[None, :], other=0.0) * chosen[None, :]
        return tl.sum(total, axis=1)

    @triton.jit
    def known(rows, first, count, tokens, pick, column, inside, BLOCK: tl.constexpr, EARLIER: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """The part of a token's products with those of `column` that lies in the space of the earlier picks."""
        earlier = tl.arange(0, EARLIER)
        total = tl.zeros([EARLIER, BLOCK], dtype=tl.float64)
        for start in range(0, count, EARLIER):
            exists = start + earlier < count
            before = rows + (first + start + earlier) * tokens
            of_pick = tl.load(before + pick, mask=exists, other=0.0, cache_modifier=".cg")
            of_all = tl.load(before[:, None] + column[None, :], mask=exists[:, None] & inside[None, :], other=0.0)
            total += of_pick[:, None] * of_all
        return tl.sum(total, axis=0)

    @triton.jit
    def products(  # type: ignore[no-untyped-def]
        source,
        row,
        tokens,
        pick,
        column,
        inside,
        width,
        RULE: tl.constexpr,  # noqa: N803
        STORED: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
        CHUNK: tl.constexpr,  # noqa: N803
    ):
        """The products of one token with those of `column`, where they are stored or computed anew."""
        if STORED:
            near = tl.load(source + (row * tokens + pick) * tokens + column, mask=inside, other=0.0)
        else:
            near = dot(source, row, tokens, pick, column, inside, width, BLOCK, CHUNK)
            if RULE != "determinant":
                near = on_grid(near)
        return near

    @triton.jit
    def later(value, near, step, RULE: tl.constexpr, COARSE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """The scores by distance or by cosines, after a pick."""
        if RULE == "farthest":
            if COARSE:  # noqa: SIM108  (a constant of the kernel)
                distance = (1 - near.to(tl.float32)).to(tl.float64)
            else:
                distance = (1 - near).to(tl.float64)
            value = tl.where(step == 0, distance, tl.minimum(value, distance))
        else:
            value = tl.where(step == 0, 0.0, value) - near.to(tl.float64)
        return value

    @triton.jit
    def best_free(value, is_free, column, RULE: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """The highest score of a free token, the token, and its value."""
        score = value
        if RULE == "determinant":
            # Gains that are equal in exact arithmetic differ in float64's last digits.
            score = value.to(tl.float32).to(tl.float64)
        # What is not a number comes first, as in torch.
        score = tl.where(score == score, score, float("inf"))
        score = tl.where(is_free > 0, score, float("-inf"))
        top = tl.max(score, axis=0)
        # The lowest index of equal scores.
        pick = tl.min(tl.where((score == top) & (is_free > 0), column, 2147483647), axis=0)
        return top, pick, tl.sum(tl.where(column == pick, value, 0.0), axis=0)

    @triton.jit
    def best_reported(best, where, buffer, tokens, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """The best token that all programs of an image reported, and its value."""
        part = tl.arange(0, PARTS_BLOCK)
        place = buffer * PARTS + part
        scores = tl.load(best + place * 2, mask=part < PARTS, other=float("-inf"), cache_modifier=".cg")
        values = tl.load(best + place * 2 + 1, mask=part < PARTS, other=0.0, cache_modifier=".cg")
        picks = tl.load(where + place, mask=part < PARTS, other=2147483647, cache_modifier=".cg")
        # A program without a free token reported an index beyond all.
        top = tl.max(tl.where(picks < tokens, scores, float("-inf")), axis=0)
        pick = tl.min(tl.where(scores == top, picks, 2147483647), axis=0)
        return pick, tl.sum(tl.where(picks == pick, values, 0.0), axis=0)

    @triton.jit
    def steps(  # type: ignore[no-untyped-def]
        source,
        state,
        free,
        limit,
        keep,
        best,
        where,
        reported,
        lows,
        rows,
        counts,
        start,
        stop,
        tokens,
        width,
        most,
        RULE: tl.constexpr,  # noqa: N803
        STORED: tl.constexpr,  # noqa: N803
        COARSE: tl.constexpr,  # noqa: N803
        PARTS: tl.constexpr,  # noqa: N803
        PARTS_BLOCK: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
        CHUNK: tl.constexpr,  # noqa: N803
        EARLIER: tl.constexpr,  # noqa: N803
    ):
        """Steps `start` to `stop` of a greedy search; step -1 only tells which token is best by the first scores.

        For "determinant", `lows` are the least gains, and at most `most` picks that are independent of the earlier ones
        have a row in `rows`; `counts` tells how many have.
        """
        row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        column = part * BLOCK + tl.arange(0, BLOCK)
        inside = column < tokens
        here = row * tokens + column
        is_free = tl.load(free + here, mask=inside, other=0).to(tl.int32)
        value = tl.load(state + here, mask=inside, other=0.0)
        picked = tl.load(keep + here, mask=inside, other=0).to(tl.int32)
        least, count = value, 0
        if RULE == "determinant":
            least = tl.load(lows + here, mask=inside, other=0.0)
            count = tl.load(counts + row * PARTS + part)
        steps = tl.minimum(stop, tl.load(limit + row))
        reported_by_all, pick, gain = 0, tokens - 1, tl.sum(tl.where(column == 0, value, 0.0), axis=0)
        for step in range(start, steps):
            if step >= 0:
                if PARTS > 1:
                    if step > start:
                        # All programs of this image have reported their best.
                        reported_by_all += PARTS
                        tl.debug_barrier()
                        tl.atomic_add(reported + row, 1, sem="acq_rel")
                        while tl.atomic_add(reported + row, 0, sem="acq_rel") < reported_by_all:
                            pass
                    tl.debug_barrier()
                    pick, gain = best_reported(best, where, row * 2 + step % 2, tokens, PARTS, PARTS_BLOCK)
                    pick = tl.minimum(pick, tokens - 1)
                picked = tl.where(column == pick, 1, picked)
                is_free = tl.where(column == pick, 0, is_free)
                near = products(source, row, tokens, pick, column, inside, width, RULE, STORED, BLOCK, CHUNK)
                if RULE != "determinant":
                    value = later(value, near, step, RULE, COARSE)
                else:
                    # What other threads stored in the steps before.
                    tl.debug_barrier()
                    if (gain > tl.load(lows + row * tokens + pick)) & (count < most):
                        near = near.to(tl.float64) - known(
                            rows, row * most, count, tokens, pick, column, inside, BLOCK, EARLIER
                        )
                        near = near / tl.sqrt(tl.maximum(gain, 2.2250738585072014e-308))
                        tl.store(rows + (row * most + count) * tokens + column, near, mask=inside)
                        value = tl.maximum(value - near * near, least)
                        count += 1
            top, pick, gain = best_free(value, is_free, column, RULE)
            if PARTS > 1:
                buffer = (row * 2 + (step + 1) % 2) * PARTS + part
                tl.store(best + buffer * 2, top)
                tl.store(best + buffer * 2 + 1, gain)
                tl.store(where + buffer, pick)
            pick = tl.minimum(pick, tokens - 1)
        if RULE == "determinant":
            tl.store(counts + row * PARTS + part, count)
        tl.store(state + here, value, mask=inside)
        tl.store(free + here, is_free.to(tl.int8), mask=inside)
        tl.store(keep + here, picked.to(tl.int8), mask=inside)
