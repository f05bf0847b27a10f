"""The Triton kernels of a merging pass."""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # torch installs Triton only on platforms with CUDA.
    triton = None

if triton is not None:
    from lmms_prune.methods.shared.greedy.kernel_steps import on_grid

    @triton.jit
    def normalised(x, unit, width, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
        """One row at length 1, in float64; zero stays zero."""
        base, feature = tl.program_id(0).to(tl.int64) * width, tl.arange(0, CHUNK)
        squares = tl.zeros([CHUNK], dtype=tl.float64)
        for start in range(0, width, CHUNK):
            part = tl.load(x + base + start + feature, mask=start + feature < width, other=0.0).to(tl.float64)
            squares += part * part
        length = tl.maximum(tl.sqrt(tl.sum(squares, axis=0)), 1e-12)
        for start in range(0, width, CHUNK):
            exists = start + feature < width
            part = tl.load(x + base + start + feature, mask=exists, other=0.0).to(tl.float64)
            tl.store(unit + base + start + feature, part / length, mask=exists)

    @triton.jit
    def nearest(  # type: ignore[no-untyped-def]
        products,
        lengths,
        score,
        partner,
        first,
        rows,
        evens,
        odds,
        RAGGED: tl.constexpr,  # noqa: N803
        ROWS: tl.constexpr,  # noqa: N803
        PIECE: tl.constexpr,  # noqa: N803
    ):
        """The highest of the products of some even tokens, `rows` from `first` on, with the odd ones, and whose it is."""
        image = tl.program_id(0).to(tl.int64)
        even, number = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, PIECE)
        inside = even < rows
        length = tl.load(lengths + image) if RAGGED else 2 * odds
        top, lowest = tl.full([ROWS], float("-inf"), tl.float64), tl.zeros([ROWS], dtype=tl.int32)
        for start in range(0, odds, PIECE):
            odd = start + number
            exists = (odd < odds) & (2 * odd + 1 < length)
            place = products + (image * rows + even[:, None]) * odds + odd[None, :]
            near = on_grid(tl.load(place, mask=inside[:, None] & exists[None, :], other=0.0))
            # What is not a number comes first, as in torch.
            near = tl.where(near == near, near, float("inf"))
            near = tl.where(exists[None, :], near, float("-inf"))
            best = tl.max(near, axis=1)
            # The lowest index of equal products.
            among = tl.min(tl.where(near == best[:, None], odd[None, :], 2147483647), axis=1)
            lowest = tl.where(best > top, among, lowest)
            top = tl.maximum(best, top)
        tl.store(score + image * evens + first + even, top, mask=inside)
        tl.store(partner + image * evens + first + even, lowest.to(tl.int64), mask=inside)

    @triton.jit
    def pairs(  # type: ignore[no-untyped-def]
        score,
        partner,
        lengths,
        removed,
        into,
        order,
        tokens,
        evens,
        kept,
        RAGGED: tl.constexpr,  # noqa: N803
        EVENS_FIRST: tl.constexpr,  # noqa: N803
        PROTECTED: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
        PIECE: tl.constexpr,  # noqa: N803
    ):
        """For one image: into which token each is merged, and the order of those that remain.

        `lengths` and `removed` are numbers of each image, or two numbers that all images share.
        """
        row = tl.program_id(0).to(tl.int64)
        half, number = tl.arange(0, BLOCK), tl.arange(0, PIECE)
        even, odd, inside = 2 * half, 2 * half + 1, half < evens
        length = tl.load(lengths + row) if RAGGED else lengths
        remove = tl.load(removed + row) if RAGGED else removed
        value = tl.load(score + row * evens + half, mask=inside, other=float("-inf"))
        value = tl.where(value == value, value, float("inf"))
        value = tl.where((even < length) & (even >= PROTECTED), value, float("-inf"))
        # A token's rank by falling score, then by number.
        rank = tl.zeros([BLOCK], dtype=tl.int32)
        for start in range(0, evens, PIECE):
            other = start + number
            rival = tl.load(score + row * evens + other, mask=other < evens, other=float("-inf"))
            rival = tl.where(rival == rival, rival, float("inf"))
            rival = tl.where((2 * other < length) & (2 * other >= PROTECTED), rival, float("-inf"))
            is_tie = (rival[None, :] == value[:, None]) & (other[None, :] < half[:, None])
            precedes = ((rival[None, :] > value[:, None]) | is_tie) & (other < evens)[None, :]
            rank += tl.sum(precedes.to(tl.int32), axis=1)
        merges = inside & (rank < remove)
        target = 2 * tl.load(partner + row * evens + half, mask=inside, other=0) + 1
        tl.store(into + row * tokens + even, tl.where(merges, target, even), mask=inside)
        tl.store(into + row * tokens + odd, odd.to(tl.int64), mask=odd < tokens)
        # Remaining tokens come first, then those that are merged away, then padding.
        before = tl.cumsum(merges.to(tl.int32), axis=0) - merges.to(tl.int32)
        through = before + merges.to(tl.int32)
        away = tl.sum(merges.to(tl.int32), axis=0)
        of_even, of_odd = even - before, odd - through
        if EVENS_FIRST:
            of_even, of_odd = half - before, (length + 1) // 2 - away + half
        of_even = tl.where(merges, length - away + before, of_even)
        of_even, of_odd = tl.where(even < length, of_even, even), tl.where(odd < length, of_odd, odd)
        tl.store(order + row * kept + of_even, even.to(tl.int64), mask=inside & (of_even < kept))
        tl.store(order + row * kept + of_odd, odd.to(tl.int64), mask=(odd < tokens) & (of_odd < kept))

    @triton.jit
    def merge(  # type: ignore[no-untyped-def]
        x,
        weight,
        slot,
        into,
        order,
        mean,
        total,
        slots,
        tokens,
        kept,
        width,
        TOKENS: tl.constexpr,  # noqa: N803
        BLOCK: tl.constexpr,  # noqa: N803
    ):
        """The weighted mean of the tokens that are merged into one, added in the order of their numbers."""
        row, entry, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
        number, feature = tl.arange(0, TOKENS), part * BLOCK + tl.arange(0, BLOCK)
        token = tl.load(order + row * kept + entry)
        joins = tl.load(into + row * tokens + number, mask=number < tokens, other=-1) == token
        sizes = tl.load(weight + row * tokens + number, mask=joins, other=0.0)
        together = tl.sum(sizes, axis=0)
        sums = tl.zeros([BLOCK], dtype=weight.dtype.element_ty)
        last = -1
        for _ in range(tl.sum(joins.to(tl.int32), axis=0)):
            last = tl.min(tl.where(joins & (number > last), number, TOKENS), axis=0)
            own = tl.load(weight + row * tokens + last)
            share = tl.div_rn(own, together) if weight.dtype.element_ty == tl.float32 else own / together
            value = tl.load(x + (row * tokens + last) * width + feature, mask=feature < width, other=0.0)
            sums += value.to(weight.dtype.element_ty) * share
        place = row * kept + entry
        tl.store(mean + place * width + feature, sums.to(mean.dtype.element_ty), mask=feature < width)
        if part == 0:
            tl.store(total + place, together)
            tl.store(slots + place, tl.load(slot + row * tokens + token))
