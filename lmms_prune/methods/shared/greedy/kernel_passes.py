"""The Triton kernel of lists that are thinned pass by pass."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # torch installs Triton only on platforms with CUDA.
    triton = None

if triton is not None:
    from lmms_prune.methods.shared.greedy.kernel_steps import on_grid

    @triton.jit
    def nearest_odd(  # type: ignore[no-untyped-def]
        unit,
        base,
        token,
        order,
        length,
        width,
        PIECE: tl.constexpr,  # noqa: N803
        CHUNK: tl.constexpr,  # noqa: N803
    ):
        """The highest cosine of one token to an odd entry of the list."""
        feature = tl.arange(0, CHUNK)
        highest = tl.full([PIECE], float("-inf"), dtype=tl.float64)
        for begin in range(0, length // 2, PIECE):
            entry = 2 * (begin + tl.arange(0, PIECE)) + 1
            exists = entry < length
            other = tl.load(order + entry, mask=exists, other=0).to(tl.int64)
            total = tl.zeros([PIECE, CHUNK], dtype=tl.float64)
            for start in range(0, width, CHUNK):
                within = start + feature < width
                chosen = tl.load(unit + (base + token) * width + start + feature, mask=within, other=0.0)
                place = unit + (base + other[:, None]) * width + (start + feature)[None, :]
                total += tl.load(place, mask=exists[:, None] & within[None, :], other=0.0) * chosen[None, :]
            near = on_grid(tl.sum(total, axis=1))
            highest = tl.maximum(highest, tl.where(exists, near, float("-inf")))
        return tl.max(highest, axis=0)

    @triton.jit
    def passes(  # type: ignore[no-untyped-def]
        unit,
        cosine,
        neighbour,
        lengths,
        goals,
        orders,
        odd,
        tokens,
        width,
        neighbours,
        STEP: tl.constexpr,  # noqa: N803
        HALF: tl.constexpr,  # noqa: N803
        PIECE: tl.constexpr,  # noqa: N803
        CHUNK: tl.constexpr,  # noqa: N803
    ):
        """`thinned` for one image; `odd` tells which tokens are odd entries, and in the end, which remain."""
        row = tl.program_id(0).to(tl.int64)
        base = row * tokens
        length, goal = tl.load(lengths + row), tl.load(goals + row)
        number = tl.arange(0, HALF)
        turn = 0
        while length > goal:
            now, then = orders + 2 * base + turn * tokens, orders + 2 * base + (1 - turn) * tokens
            is_even, is_odd = 2 * number < length, 2 * number + 1 < length
            even = tl.load(now + 2 * number, mask=is_even, other=0).to(tl.int64)
            other = tl.load(now + 2 * number + 1, mask=is_odd, other=0).to(tl.int64)
            tl.store(odd + base + even, tl.zeros([HALF], dtype=tl.int8), mask=is_even)
            tl.store(odd + base + other, tl.full([HALF], 1, dtype=tl.int8), mask=is_odd)
            tl.debug_barrier()
            nearest = tl.full([HALF], -4.0, dtype=tl.float64)
            seeks = is_even.to(tl.int32) * (length > 1).to(tl.int32)
            k = 0
            missing = tl.sum(seeks, axis=0)
            while (k < neighbours) & (missing > 0):
                place = (base + even) * neighbours + k
                near = tl.load(cosine + place, mask=seeks > 0, other=float("-inf"))
                # Behind the last token of a short list come others at an infinite distance.
                listed = (seeks > 0) & (near >= -2.0)
                who = tl.load(neighbour + place, mask=listed, other=0).to(tl.int64)
                hit = tl.load(odd + base + who, mask=listed, other=0).to(tl.int32) * listed.to(tl.int32)
                nearest = tl.where(hit > 0, near, nearest)
                seeks = tl.where(hit > 0, 0, seeks)
                missing = tl.sum(seeks, axis=0)
                k += 1
            # The others look among all, one after the other.
            while missing > 0:
                entry = tl.min(tl.where(seeks > 0, number, HALF), axis=0)
                token = tl.load(now + 2 * entry).to(tl.int64)
                near = nearest_odd(unit, base, token, now, length, width, PIECE, CHUNK)
                nearest = tl.where(number == entry, near, nearest)
                seeks = tl.where(number == entry, 0, seeks)
                missing = tl.sum(seeks, axis=0)
            # Whole numbers that sort by falling cosine, then by entry, with what does not exist at the end.
            key = (4294967296.0 * (4.0 - nearest)).to(tl.int64) * 65536 + number
            key = tl.where(is_even, key, 9223372036854775807)
            ranked = tl.sort(key) % 65536
            removed = tl.minimum(tl.minimum(STEP, length - goal), (length + 1) // 2)
            evens = (length + 1) // 2
            survivor = tl.load(now + 2 * ranked, mask=number < evens, other=0)
            tl.store(then + number - removed, survivor, mask=(number >= removed) & (number < evens))
            tl.store(then + evens - removed + number, other.to(tl.int32), mask=is_odd)
            tl.debug_barrier()
            tl.store(
                odd + base + survivor.to(tl.int64),
                tl.zeros([HALF], dtype=tl.int8),
                mask=number < tl.minimum(removed, evens),
            )
            tl.debug_barrier()
            length -= removed
            turn = 1 - turn
        now = orders + 2 * base + turn * tokens
        for begin in range(0, length, HALF):
            token = tl.load(now + begin + number, mask=begin + number < length, other=0).to(tl.int64)
            tl.store(odd + base + token, tl.full([HALF], 1, dtype=tl.int8), mask=begin + number < length)
