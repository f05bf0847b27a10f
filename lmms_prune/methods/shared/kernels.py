"""Greedy searches as one GPU kernel each: otherwise their hundreds of dependent picks would cost hundreds of launches.

Every search has a reference in plain torch, which CPUs use, and GPUs on which the kernel cannot be built.
Dimension letters: B images, V visual tokens, D features, P pivots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from subprocess import CalledProcessError
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.shared.tensors import BLOCK, gather, joined, settled
from lmms_prune.models.counting import counted_as
from lmms_prune.models.tensors import finest, to_device

try:
    import triton
    import triton.language as tl
except ImportError:  # torch installs Triton only on platforms with CUDA.
    triton = None

# A product and a sum are rounded one after the other, as by the references and in the interpreter.
_EXACT = {"enable_fp_fusion": False}
Rule = Literal["farthest", "sums", "determinant"]
MOST_STORED = 4096
"""Tokens of the largest image whose products of all pairs are stored (64 MiB in float32). Those of larger ones are computed
for each pick anew."""

# How many of a token's nearest others are listed, so that its nearest odd one need not be looked for among all.
_NEIGHBOURS = 64
# A token's marginal gain is at least this share of its own entry; anything smaller is rounding.
_LEAST = 1e-6


def products(unit: Float[Tensor, "B V D"], dtype: torch.dtype) -> Float[Tensor, "B V V"]:
    """The cosines of all pairs, on the grid of `settled`, for images of at most `MOST_STORED` tokens."""
    blocks = [
        settled(unit[:, start : start + BLOCK] @ unit.transpose(1, 2)).to(dtype)
        for start in range(0, unit.shape[1], BLOCK)
    ]
    return joined(blocks)


def greedy(
    rule: Rule,
    vectors: Float[Tensor, "B V D"],
    first: Float[Tensor, "B V"],
    valid: Bool[Tensor, "B V"],
    limit: Int[Tensor, " B"],
    most: int,
    stored: Float[Tensor, "B V V"] | None = None,
) -> Bool[Tensor, "B V"]:
    """A greedy search: every pick is the candidate with the highest score, which the earlier picks change.

    Args:
        rule: "farthest" scores by the distance (1 - cosine) to the nearest pick, "sums" by minus the sum of the cosines to
            all picks, "determinant" by what a candidate adds to the determinant of the picks' Gram matrix.
        vectors: of the tokens, in the finest type; of length 1, but for "determinant".
        first: the scores by which the first pick is made; for "determinant", the squared lengths. For "farthest", its type
            is that in which distances are compared.
        valid: the candidates.
        limit: how many to pick in each image, at most as many as there are candidates; on the device of the others.
        most: the largest of `limit`, known on the host.
        stored: `products` of all pairs in the type of `first`, where the caller has them; not for "determinant".

    Returns:
        a mask of the picks; ties go to the lower index.
    """
    return _search("greedy", rule, vectors, first, valid, limit, most, stored)


def in_turn(order: Int[Tensor, "B P V"], free: Bool[Tensor, "B V"], quota: Int[Tensor, "B P"]) -> Bool[Tensor, "B V"]:
    """Pivots pick in turn: each takes its quota of the tokens that are still free, in its own order.

    Args:
        order: for each pivot all tokens, the one that it takes first at the front.
        free: the candidates.
        quota: tokens for each pivot.

    Returns:
        a mask of the picks.
    """
    return _search("in_turn", order, free, quota)


def thinned(
    unit: Float[Tensor, "B R C"], lengths: Sequence[int], goals: Sequence[int], step: int
) -> Bool[Tensor, "B R"]:
    """Which tokens of each image's list remain when its most duplicated ones are removed, pass by pass.

    A pass removes the `step` even entries of the list (or as many as exist, or are still to remove) with the highest cosine
    to any odd one. The next list is the remaining even entries, the most duplicated first, then the odd ones.

    Args:
        unit: directions of the tokens, in the order of the list, padded on the right.
        lengths: tokens of each list.
        goals: how many of them remain.
        step: at most so many are removed in a pass.
    """
    length, goal = to_device([lengths, goals], unit.device)
    if all(length <= goal for length, goal in zip(lengths, goals, strict=True)):
        return torch.arange(unit.shape[1], device=unit.device) < length[:, None]
    cosine, neighbour = nearest_others(unit, length, _NEIGHBOURS)
    return _search("thinned", unit, cosine, neighbour, length, goal, tuple(lengths), tuple(goals), step)


def nearest_others(
    unit: Float[Tensor, "B R C"], length: Int[Tensor, " B"], count: int
) -> tuple[Float[Tensor, "B R K"], Int[Tensor, "B R K"]]:
    """For each token the (at most `count`) highest cosines to the first `length` tokens of its list, and which these are."""
    exists = torch.arange(unit.shape[1], device=unit.device) < length[:, None]
    # In blocks of rows, so that the matrix of all pairs never exists at once.
    nearest = [
        settled(unit[:, start : start + BLOCK] @ unit.transpose(1, 2))
        .masked_fill_(~exists[:, None], -torch.inf)
        .topk(min(count, unit.shape[1]), dim=2)
        for start in range(0, unit.shape[1], BLOCK)
    ]
    return joined([part.values for part in nearest]), joined([part.indices for part in nearest])


def _search(name: str, *args: Any) -> Tensor:
    device = next(x.device for x in args if isinstance(x, Tensor))
    fused = device.type == "cuda" and _works(device, name)
    with counted_as(_greedy_flops(*args) if name == "greedy" else 0):
        return (_fused if fused else _plain)(name, *args)


def _greedy_flops(
    rule: str, vectors: Tensor, first: Tensor, valid: Tensor, limit: Tensor, most: int, stored: Tensor | None
) -> int:
    """FLOPs of the reference's products on a CPU, whichever way the search goes; of Gram-Schmidt for "determinant"."""
    images, tokens, width = vectors.shape
    if rule == "determinant":
        return images * sum(2 * tokens * width + 4 * step * width for step in range(most))
    if stored is not None:
        return 0
    return 2 * images * tokens * width * (tokens if _multiplies_all(tokens, most) else most)


def _multiplies_all(tokens: int, most: int) -> bool:
    """On a CPU one product of matrices is faster than many by a vector, unless these are few."""
    return tokens <= MOST_STORED and 8 * most > tokens


@lru_cache
def _works(device: torch.device, name: str) -> bool:
    """Whether a kernel can be built on this machine (Triton needs a C compiler) and agrees with the reference on a probe."""
    if triton is None:
        return False
    try:
        return all(bool(torch.equal(_fused(name, *probe), _plain(name, *probe))) for probe in _probes(device, name))
    except (RuntimeError, OSError, CalledProcessError, KeyError, TypeError, triton.TritonError):
        return False


def _probes(device: torch.device, name: str) -> list[tuple]:
    """Small searches with ties, by which a kernel is tried."""
    generator = torch.Generator().manual_seed(0)
    if name == "in_turn":
        order = torch.rand(2, 3, 37, generator=generator).argsort(dim=2).to(device)
        quota = torch.tensor([[3, 0, 5], [9, 9, 9]]).to(device)
        return [(order, torch.rand(2, 37, generator=generator).to(device) < 0.8, quota)]
    if name == "thinned":
        unit = torch.nn.functional.normalize(torch.randn(2, 90, 5, generator=generator).double(), dim=-1).to(device)
        # The first neighbour alone: the search among all is tried too.
        cosine, neighbour = (unit @ unit.transpose(1, 2)).topk(2, dim=2)
        lengths, goals = (90, 71), (11, 20)
        length, goal = torch.tensor([lengths, goals]).to(device)
        return [(unit, settled(cosine), neighbour, length, goal, lengths, goals, 8)]
    probes = []
    for tokens, stores in ((37, True), (300, False)):
        unit = torch.nn.functional.normalize(torch.randn(2, tokens, 5, generator=generator).double(), dim=-1)
        unit[:, -1] = unit[:, 0]
        valid = torch.arange(tokens).expand(2, -1) < torch.tensor([[tokens], [tokens - 3]])
        first = torch.rand(2, tokens, generator=generator)
        unit, valid, first, limit = (x.to(device) for x in (unit, valid, first, torch.tensor([9, 12])))
        stored = products(unit, unit.dtype) if stores else None
        coarse = None if stored is None else stored.float()
        probes += [
            ("farthest", unit, first, valid, limit, 12, coarse),
            ("sums", unit, first.double(), valid, limit, 12, stored),
            (
                "determinant",
                unit * (1 + first.double())[..., None],
                (1 + first.double()).square(),
                valid,
                limit,
                12,
                None,
            ),
        ]
    return probes


# -- the references ----------------------------------------------------------------------------------------------------


def _plain(name: str, *args: Any) -> Tensor:
    """The reference implementation, also used on CPUs."""
    return _PLAIN[name](*args)


def _plain_greedy(
    rule: str, vectors: Tensor, first: Tensor, valid: Tensor, limit: Tensor, most: int, stored: Tensor | None
) -> Tensor:
    if not most:
        return torch.zeros_like(valid)
    if rule == "determinant":
        return _marked(_plain_determinant(vectors, first, valid, most), valid, limit)
    if stored is None and (_multiplies_all(valid.shape[1], most) or (first.is_cuda and valid.shape[1] <= MOST_STORED)):
        stored = products(vectors, first.dtype)
    picks, one = [], first.new_full((), 1)
    # `score` is -inf for tokens that are picked or no candidates, and stays so whatever is subtracted from it.
    never = first.new_full((), -torch.inf)
    score = torch.where(valid, first, never)
    later = torch.where(valid, first.new_full((), torch.inf if rule == "farthest" else 0), never)
    for _ in range(most):
        pick = score.argmax(dim=1, keepdim=True)
        picks.append(pick)
        near = _near(vectors, stored, pick).to(first.dtype)
        later = torch.minimum(later, one - near) if rule == "farthest" else later - near
        score = later = later.scatter_(1, pick, -torch.inf)
    return _marked(torch.cat(picks, dim=1), valid, limit)


def _near(vectors: Tensor, stored: Tensor | None, pick: Tensor) -> Tensor:
    """The cosines of each image's pick to all its tokens."""
    if stored is not None:
        return stored.gather(1, pick[..., None].expand(-1, -1, stored.shape[2])).squeeze(1)
    chosen = vectors.gather(1, pick[..., None].expand(-1, -1, vectors.shape[2]))
    return settled(vectors @ chosen.transpose(1, 2)).squeeze(-1)


def _plain_determinant(vectors: Tensor, gain: Tensor, valid: Tensor, most: int) -> Tensor:
    rows, picks = torch.arange(len(vectors), device=vectors.device), []
    least = _LEAST * gain
    never = gain.new_full((), -torch.inf)
    blocked = torch.where(valid, gain.new_zeros(()), never)
    # The component of each picked token that is orthogonal to the earlier picks, at length 1; the rows of the published
    # code are products with these.
    basis = vectors.new_zeros(len(vectors), most, vectors.shape[-1])
    for step in range(most):
        # Compared in float32: gains that are equal in exact arithmetic differ in float64's last digits.
        pick = (gain + blocked).float().argmax(dim=1)
        picks.append(pick)
        chosen, known = vectors[rows, pick, :, None], basis[:, :step]
        # Gram-Schmidt: what the new pick adds to the space of the earlier ones is taken off the gain of all tokens.
        rest = chosen - known.transpose(1, 2) @ (known @ chosen)
        direction = rest / gain[rows, pick, None, None].clamp(min=torch.finfo(gain.dtype).tiny).sqrt()
        basis[:, step] = direction.squeeze(-1)
        gain = torch.maximum(gain - (vectors @ direction).squeeze(-1).square(), least)
        blocked.scatter_(1, pick[:, None], -torch.inf)
    return torch.stack(picks, dim=1)


def _marked(picks: Int[Tensor, "B S"], valid: Tensor, limit: Tensor) -> Tensor:
    """A mask of each image's first `limit` picks."""
    tokens = valid.shape[1]
    # Picks beyond the limit mark a spare last column.
    is_kept = torch.arange(picks.shape[1], device=picks.device) < limit[:, None]
    marks = valid.new_zeros(len(valid), tokens + 1)
    return marks.scatter_(1, torch.where(is_kept, picks, tokens), True)[:, :-1]


def _plain_in_turn(order: Tensor, free: Tensor, quota: Tensor) -> Tensor:
    remains = free
    for p in range(order.shape[1]):
        in_order = remains.gather(1, order[:, p])
        takes = in_order & (in_order.cumsum(1) <= quota[:, p, None])
        remains = remains.scatter(1, order[:, p], in_order ^ takes)
    return free ^ remains


def _plain_thinned(
    unit: Tensor,
    cosine: Tensor,
    neighbour: Tensor,
    length: Tensor,
    goal: Tensor,
    lengths: Sequence[int],
    goals: Sequence[int],
    step: int,
) -> Tensor:
    cosine, neighbour = cosine.clone(), neighbour.clone()
    order = torch.arange(unit.shape[1], device=unit.device).expand(unit.shape[:2])
    longest, length = list(lengths), length[:, None]
    # A GPU without the kernel looks among all, and does not wait to know where that is needed.
    nearest = _nearest_of_all if unit.is_cuda else _nearest_of_few
    while any(now > end for now, end in zip(longest, goals, strict=True)):
        order = order[:, : max(longest)]
        entry = torch.arange(order.shape[1], device=order.device).expand_as(order)
        exists = entry < length
        nearest_odd = nearest(unit, cosine, neighbour, order, exists)
        ranked = nearest_odd.masked_fill(~exists[:, ::2], -torch.inf).argsort(dim=1, descending=True, stable=True)
        rank = torch.empty_like(ranked).scatter_(1, ranked, entry[:, : ranked.shape[1]])
        removed = torch.minimum(length - goal[:, None], (length + 1) // 2).clamp(min=0, max=step)
        # Sort keys: even entries by rank, then odd entries in order; removed entries and padding come last.
        sort_key = order.shape[1] + entry
        sort_key[:, ::2] = torch.where(rank < removed, 3 * order.shape[1], rank)
        sort_key = torch.where(exists, sort_key, 3 * order.shape[1])
        order, length = order.gather(1, sort_key.argsort(dim=1, stable=True)), length - removed
        longest = [now - max(0, min(step, now - end, (now + 1) // 2)) for now, end in zip(longest, goals, strict=True)]
    return _marked(order, unit.new_zeros(unit.shape[:2], dtype=torch.bool), length[:, 0])


def _nearest_of_all(unit: Tensor, _: Tensor, __: Tensor, order: Tensor, exists: Tensor) -> Tensor:
    """For each even entry of the list, its highest cosine to an odd entry."""
    even, odd = (gather(unit, order[:, parity::2]) for parity in (0, 1))
    if not odd.shape[1]:
        return unit.new_zeros(even.shape[:2])
    blocks = [
        settled(even[:, start : start + BLOCK] @ odd.transpose(1, 2))
        .masked_fill(~exists[:, None, 1::2], -torch.inf)
        .amax(2)
        for start in range(0, even.shape[1], BLOCK)
    ]
    return joined(blocks)


def _nearest_of_few(unit: Tensor, cosine: Tensor, neighbour: Tensor, order: Tensor, exists: Tensor) -> Tensor:
    """As `_nearest_of_all`, from lists of each token's nearest others; a list without an odd entry is renewed, in place."""
    is_odd = exists.new_zeros(unit.shape[:2]).scatter_(1, order[:, 1::2], exists[:, 1::2])
    even, rows = order[:, ::2], torch.arange(len(order))[:, None]
    listed = neighbour[rows, even]
    hits = is_odd.gather(1, listed.flatten(1)).view(listed.shape)
    nearest = cosine[rows, even].masked_fill_(~hits, -torch.inf).amax(2)
    missing = (nearest == -torch.inf) & exists[:, ::2] & is_odd.any(1, keepdim=True)
    for row in missing.any(1).nonzero().flatten().tolist():
        entries = missing[row].nonzero().flatten()
        tokens, present = even[row, entries], order[row][exists[row]]
        among = settled(unit[row, tokens] @ unit[row, present].T)
        nearest[row, entries] = among.masked_fill(~is_odd[row, present], -torch.inf).amax(1)
        near, number = among.topk(min(cosine.shape[2], among.shape[1]), dim=1)
        cosine[row, tokens] = -torch.inf
        cosine[row, tokens, : near.shape[1]], neighbour[row, tokens, : near.shape[1]] = near, present[number]
    return nearest


_PLAIN: dict[str, Callable[..., Tensor]] = {
    "greedy": _plain_greedy,
    "in_turn": _plain_in_turn,
    "thinned": _plain_thinned,
}


# -- the kernels -------------------------------------------------------------------------------------------------------


def _fused(name: str, *args: Any) -> Tensor:
    """The Triton kernel."""
    # Triton launches on the current device, whatever the tensors'.
    device = next(x.device for x in args if isinstance(x, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        return _FUSED[name](*args)


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
    if stored is None and tokens <= MOST_STORED:
        stored = vectors @ vectors.transpose(1, 2) if rule == "determinant" else products(vectors, first.dtype)
    block = block or _tokens_per_program(first.device, images, tokens, stored is not None)
    parts = -(-tokens // block)
    fine = finest(first.device)
    state = first.to(fine).contiguous()
    keep, free = valid.new_zeros(valid.shape, dtype=torch.int8), valid.to(torch.int8).contiguous()
    # What the programs of an image tell each other: the best score of each, its token and its state, twice over, so that
    # one that is ahead writes where nobody reads; and how many have told.
    best = state.new_empty(images, 2, parts, 2)
    where, told = limit.new_empty(images, 2, parts, dtype=torch.int32), limit.new_zeros(images, dtype=torch.int32)
    rows = state.new_empty(images, most if rule == "determinant" else 1, tokens)
    source = (vectors if stored is None else stored).contiguous()
    together = parts == 1 or _holds(first.device, images * parts)
    # Where programs cannot wait for each other, every step is a launch.
    spans = [(-1, most)] if together else [(step, step + 1) for step in range(-1, most)]
    extra = {"launch_cooperative_grid": True} if together and parts > 1 else {}
    for start, stop in spans:
        _steps[(images, parts)](
            source,
            state,
            free,
            limit.to(torch.int32),
            keep,
            best,
            where,
            told,
            rows,
            start,
            stop,
            tokens,
            source.shape[2],
            most,
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
            **_EXACT,
        )
    return keep.bool()


def _tokens_per_program(device: torch.device, images: int, tokens: int, stores: bool) -> int:
    """Products that are computed anew for each pick are the work of as many programs as run at once."""
    whole = triton.next_power_of_2(tokens)
    if stores or device.type != "cuda":
        return whole
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    block = 32
    while block < whole and images * -(-tokens // block) > processors:
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
    _turns[(images,)](
        rank,
        free.to(torch.int8).contiguous(),
        quota.to(torch.int32).contiguous(),
        keep,
        tokens,
        pivots,
        BITS=block.bit_length(),
        BLOCK=block,
        num_warps=4 if block <= 2048 else 8,
        **_EXACT,
    )
    return keep.bool()


def _fused_thinned(
    unit: Tensor,
    cosine: Tensor,
    neighbour: Tensor,
    length: Tensor,
    goal: Tensor,
    lengths: Sequence[int],
    goals: Sequence[int],
    step: int,
) -> Tensor:
    images, tokens = unit.shape[:2]
    keep = unit.new_zeros(images, tokens, dtype=torch.int8)
    order = torch.arange(tokens, device=unit.device, dtype=torch.int32).expand(images, 2, tokens).contiguous()
    half = max(16, triton.next_power_of_2((max(lengths) + 1) // 2))
    _passes[(images,)](
        unit.contiguous(),
        cosine.contiguous(),
        neighbour.to(torch.int32).contiguous(),
        length.to(torch.int32),
        goal.to(torch.int32),
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
        **_EXACT,
    )
    return keep.bool()


_FUSED: dict[str, Callable[..., Tensor]] = {
    "greedy": _fused_greedy,
    "in_turn": _fused_in_turn,
    "thinned": _fused_thinned,
}

if triton is not None:

    @triton.jit
    def _on_grid(x):  # type: ignore[no-untyped-def]
        """`settled`, in float64: adding and taking off 1.5 * 2**52 rounds to whole numbers, half to even."""
        return (x * 4294967296.0 + 6755399441055744.0 - 6755399441055744.0) / 4294967296.0

    @triton.jit
    def _dot(source, row, tokens, pick, column, inside, width, BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
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
    def _known(rows, first, count, tokens, pick, column, inside, BLOCK: tl.constexpr, EARLIER: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
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
    def _steps(  # type: ignore[no-untyped-def]
        source,
        state,
        free,
        limit,
        keep,
        best,
        where,
        told,
        rows,
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
        """Steps `start` to `stop` of a greedy search; step -1 only tells which token is best by the first scores."""
        row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
        column = part * BLOCK + tl.arange(0, BLOCK)
        inside = column < tokens
        here = row * tokens + column
        is_free = tl.load(free + here, mask=inside, other=0).to(tl.int32)
        value = tl.load(state + here, mask=inside, other=0.0)
        picked = tl.load(keep + here, mask=inside, other=0).to(tl.int32)
        least = value * 1e-6
        if RULE == "determinant":
            # A later launch finds gains in `state`; what they were at first is in the row that the last step fills.
            if start >= 0:
                least = tl.load(rows + (row * most + most - 1) * tokens + column, mask=inside, other=0.0)
            elif stop < most:
                tl.store(rows + (row * most + most - 1) * tokens + column, least, mask=inside)
        steps = tl.minimum(stop, tl.load(limit + row))
        told_by_all, pick, gain = 0, tokens - 1, tl.sum(tl.where(column == 0, value, 0.0), axis=0)
        for step in range(start, steps):
            if step >= 0:
                if PARTS > 1:
                    if step > start:
                        # All programs of this image have told their best.
                        told_by_all += PARTS
                        tl.debug_barrier()
                        tl.atomic_add(told + row, 1, sem="acq_rel")
                        while tl.atomic_add(told + row, 0, sem="acq_rel") < told_by_all:
                            pass
                    tl.debug_barrier()
                    buffer = (row * 2 + step % 2) * PARTS + tl.arange(0, PARTS_BLOCK)
                    is_part = tl.arange(0, PARTS_BLOCK) < PARTS
                    scores = tl.load(best + buffer * 2, mask=is_part, other=float("-inf"), cache_modifier=".cg")
                    values = tl.load(best + buffer * 2 + 1, mask=is_part, other=0.0, cache_modifier=".cg")
                    picks = tl.load(where + buffer, mask=is_part, other=2147483647, cache_modifier=".cg")
                    # A program without a free token told an index beyond all.
                    top = tl.max(tl.where(picks < tokens, scores, float("-inf")), axis=0)
                    pick = tl.min(tl.where(scores == top, picks, 2147483647), axis=0)
                    gain = tl.sum(tl.where(picks == pick, values, 0.0), axis=0)
                    pick = tl.minimum(pick, tokens - 1)
                picked = tl.where(column == pick, 1, picked)
                is_free = tl.where(column == pick, 0, is_free)
                if STORED:
                    near = tl.load(source + (row * tokens + pick) * tokens + column, mask=inside, other=0.0)
                else:
                    near = _dot(source, row, tokens, pick, column, inside, width, BLOCK, CHUNK)
                    if RULE != "determinant":
                        near = _on_grid(near)
                if RULE == "farthest":
                    if COARSE:  # noqa: SIM108  (a constant of the kernel)
                        distance = (1 - near.to(tl.float32)).to(tl.float64)
                    else:
                        distance = (1 - near).to(tl.float64)
                    value = tl.where(step == 0, distance, tl.minimum(value, distance))
                elif RULE == "sums":
                    value = tl.where(step == 0, 0.0, value) - near.to(tl.float64)
                else:
                    # What other threads stored in the steps before.
                    tl.debug_barrier()
                    near = near.to(tl.float64) - _known(
                        rows, row * most, step, tokens, pick, column, inside, BLOCK, EARLIER
                    )
                    near = near / tl.sqrt(tl.maximum(gain, 2.2250738585072014e-308))
                    if step < most - 1:
                        tl.store(rows + (row * most + step) * tokens + column, near, mask=inside)
                    value = tl.maximum(value - near * near, least)
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
            gain = tl.sum(tl.where(column == pick, value, 0.0), axis=0)
            if PARTS > 1:
                buffer = (row * 2 + (step + 1) % 2) * PARTS + part
                tl.store(best + buffer * 2, top)
                tl.store(best + buffer * 2 + 1, gain)
                tl.store(where + buffer, pick)
            pick = tl.minimum(pick, tokens - 1)
        tl.store(state + here, value, mask=inside)
        tl.store(free + here, is_free.to(tl.int8), mask=inside)
        tl.store(keep + here, picked.to(tl.int8), mask=inside)

    @triton.jit
    def _turns(rank, free, quota, keep, tokens, pivots, BITS: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: N803
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

    @triton.jit
    def _nearest_odd(  # type: ignore[no-untyped-def]
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
            near = _on_grid(tl.sum(total, axis=1))
            highest = tl.maximum(highest, tl.where(exists, near, float("-inf")))
        return tl.max(highest, axis=0)

    @triton.jit
    def _passes(  # type: ignore[no-untyped-def]
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
                near = _nearest_odd(unit, base, token, now, length, width, PIECE, CHUNK)
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
