"""Searches by the fused kernels and by their references: python tests/kernel_cases.py DEVICE, or: … build

With TRITON_INTERPRET=1 and the device "cpu" the kernels run in Triton's interpreter, which has to be chosen before Triton is
imported: hence a script of its own.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lmms_prune.methods.shared.greedy import (
    fused,
    kernel_cover,
    kernel_merging,
    kernel_passes,
    kernel_steps,
    kernel_turns,
    plain,
    probes,
    products,
)
from lmms_prune.methods.shared.greedy.plain_passes import Lists, nearest_others
from lmms_prune.methods.shared.tensors import directions

DEVICE = torch.device("cpu" if sys.argv[1] == "build" else sys.argv[1])


def on_device(args: tuple) -> tuple:
    return tree_map(lambda x: x.to(DEVICE) if isinstance(x, Tensor) else x, args)


def compare(name: str, *args: Any, **options: Any) -> Any:
    """The reference on the CPU and the kernel on the device find the same."""
    expected = plain.SEARCHES[name](*args)
    found = fused.SEARCHES[name](*on_device(args), **options)
    for reference, kernels in zip(tree_leaves(expected), tree_leaves(found), strict=True):
        assert torch.equal(reference, kernels.cpu()), (name, args, options, reference, kernels)
    return expected


def points(generator: torch.Generator, rows: int, tokens: int, features: int, tied: bool) -> Tensor:
    x = torch.randn(rows, tokens, features, generator=generator)
    return x.round() if tied else x


def compare_greedy(seed: int, tokens: int, features: int, tied: bool, shares: list[float], block: int | None) -> None:
    generator, rows = torch.Generator().manual_seed(seed), len(shares)
    lengths = torch.randint(0, tokens + 1, (rows,), generator=generator)
    lengths[0] = tokens
    # Which tokens are candidates is not a matter of their place.
    valid = torch.rand(rows, tokens, generator=generator).argsort(1) < lengths[:, None]
    unit, first = (
        directions(points(generator, rows, tokens, features, tied)),
        torch.rand(rows, tokens, generator=generator),
    )
    first = first.mul(5).round() if tied else first
    limit = (lengths * torch.tensor(shares)).long()
    most = int(limit.max())
    relevant = unit * (0.2 + first.double() / 5)[..., None]
    for rule, vectors, scores in (
        ("farthest", unit, first),
        ("farthest", unit, first.double()),
        ("sums", unit, first.double()),
        ("determinant", relevant, relevant.square().sum(-1)),
    ):
        found = compare(
            "greedy", rule, vectors, scores, valid, limit, most, None, **({"block": block} if block else {})
        )
        assert found.sum(1).tolist() == limit.tolist()
        assert not (found & ~valid).any()


def compare_turns(seed: int, tokens: int, pivots: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(rows, pivots, tokens, generator=generator).argsort(dim=2)
    quota = torch.randint(0, tokens // 2 + 2, (rows, pivots), generator=generator)
    compare("in_turn", order, torch.rand(rows, tokens, generator=generator) < 0.8, quota)


def compare_thinned(seed: int, tokens: int, features: int, tied: bool, shares: list[float], neighbours: int) -> None:
    generator, rows = torch.Generator().manual_seed(seed), len(shares)
    unit = directions(points(generator, rows, tokens, features, tied))
    lengths = torch.randint(1, tokens + 1, (rows,), generator=generator).tolist()
    goals = [int(n * share) for n, share in zip(lengths, shares, strict=True)]
    if any(n > goal for n, goal in zip(lengths, goals, strict=True)):
        cosine, neighbour = nearest_others(unit, torch.tensor(lengths), neighbours)
        ends = torch.tensor([lengths, goals])
        found = compare("thinned", Lists(unit, cosine, neighbour, *ends, tuple(lengths), tuple(goals)), 8)
        assert found.sum(1).tolist() == goals


def compare_covering(seed: int, tokens: int, features: int, tied: bool, shares: list[float], stores: bool) -> None:
    generator, rows = torch.Generator().manual_seed(seed), len(shares)
    unit = directions(points(generator, rows, tokens, features, tied))
    lengths = torch.randint(0, tokens + 1, (rows,), generator=generator)
    valid = torch.arange(tokens) < lengths[:, None]
    weight = torch.rand(rows, tokens, generator=generator).double().mul(8).round()
    limit = (lengths * torch.tensor(shares)).long()
    for piece, changed in ((1024, 8), (16, 4)):
        stored = products.cosines(unit, unit) if stores else None
        args = (unit, stored, weight, valid, limit, int(limit.max()))
        expected = compare("covering", *args, piece=piece, rows=changed)
        assert expected.sum(1).tolist() == limit.tolist()


def compare_merging(seed: int, tokens: int, features: int, tied: bool, shares: list[float], dtype: torch.dtype) -> None:
    generator, rows = torch.Generator().manual_seed(seed), len(shares)
    counts = torch.randint(1, tokens + 1, (rows,), generator=generator).tolist()
    counts[0], shared = tokens, seed % 2
    counts = [tokens] * rows if shared else counts
    # Of the even tokens at least one stays; where the numbers are shared, the first token is protected.
    remove = [int((count - 1) // 2 * share) for count, share in zip(counts, shares, strict=True)]
    remove = remove[:1] * rows if shared else remove
    metric = points(generator, rows, tokens, features, tied)
    score, partner = (
        compare("nearest", metric, None if shared else torch.tensor(counts)) if tokens > 1 else (None, None)
    )
    if score is None:
        score, partner = torch.zeros(rows, 1).double(), torch.zeros(rows, 1, dtype=torch.long)
    into, order = compare("pairs", score, partner, tokens, tuple(counts), tuple(remove), bool(shared), shared)
    x = torch.randn(rows, tokens, 2 * features, generator=generator).to(dtype)
    fine = torch.promote_types(dtype, torch.float32)
    size = torch.randint(1, 9, (rows, tokens), generator=generator).to(fine)
    slot = torch.rand(rows, tokens, generator=generator).argsort(1)
    _, total, _ = compare("merge", x, size, slot, into, order)
    for row, (count, removed) in enumerate(zip(counts, remove, strict=True)):
        remaining = order[row, : count - removed]
        assert torch.equal(into[row, remaining], remaining)
        assert total[row, : count - removed].sum() == size[row, :count].sum()


def without_storing(call: Any, *args: Any) -> None:
    most, products.MOST_STORED = products.MOST_STORED, 0
    call(*args)
    products.MOST_STORED = most


SHARES = st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0]), min_size=1, max_size=3)
SETTINGS = settings(max_examples=8, deadline=None, derandomize=True, database=None)


@SETTINGS
@given(st.integers(0, 99), st.integers(1, 24), st.integers(1, 20), st.booleans(), SHARES, st.booleans())
def fuzz_greedy(seed: int, tokens: int, features: int, tied: bool, shares: list[float], stores: bool) -> None:
    args = (seed, tokens, features, tied, shares, None)
    compare_greedy(*args) if stores else without_storing(compare_greedy, *args)


@SETTINGS
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 8), st.integers(1, 3))
def fuzz_turns(seed: int, tokens: int, pivots: int, rows: int) -> None:
    compare_turns(seed, tokens, pivots, rows)


@SETTINGS
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 6), st.booleans(), SHARES, st.sampled_from([1, 3, 64]))
def fuzz_thinned(seed: int, tokens: int, features: int, tied: bool, shares: list[float], neighbours: int) -> None:
    compare_thinned(seed, tokens, features, tied, shares, neighbours)


@SETTINGS
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 8), st.booleans(), SHARES, st.booleans())
def fuzz_covering(seed: int, tokens: int, features: int, tied: bool, shares: list[float], stores: bool) -> None:
    compare_covering(seed, tokens, features, tied, shares, stores)


@SETTINGS
@given(
    st.integers(0, 99),
    st.integers(1, 40),
    st.integers(1, 8),
    st.booleans(),
    SHARES,
    # The interpreter cuts off what does not fit into bfloat16; a GPU rounds.
    st.sampled_from([torch.float32, torch.float16, torch.float64]),
)
def fuzz_merging(seed: int, tokens: int, features: int, tied: bool, shares: list[float], dtype: torch.dtype) -> None:
    compare_merging(seed, tokens, features, tied, shares, dtype)


class Largest(TorchDispatchMode):
    """The bytes of the largest tensor that any operation returns."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.bytes = max(self.bytes, x.numel() * x.element_size())
        return result


def large_images() -> None:
    """More tokens than are compared at once: the products with each pick are computed anew."""
    tokens, generator = products.MOST_STORED + 4, torch.Generator().manual_seed(0)
    unit = directions(torch.randn(1, tokens, 3, generator=generator))
    first, valid, limit = (
        torch.rand(1, tokens, generator=generator),
        torch.ones(1, tokens, dtype=torch.bool),
        torch.tensor([4]),
    )
    for rule, scores in (("farthest", first), ("sums", first.double()), ("determinant", unit.square().sum(-1))):
        compare("greedy", rule, unit, scores, valid, limit, 4, None)
    # However many tokens are kept, nothing is as large as one number for each pair of tokens.
    most = 3 * tokens // 5
    with Largest() as largest:
        gains = unit.square().sum(-1)
        fused._fused_greedy(*on_device(("determinant", unit, gains, valid, torch.tensor([4]), most, None)))
        fused._fused_covering(*on_device((unit, None, first.double(), valid, torch.tensor([1]), most)))
    assert largest.bytes < 4 * tokens**2, largest.bytes


def build(kernel: Any, pointers: dict[str, str], constants: dict[str, Any], **options: Any) -> None:
    """Compile a kernel for a GPU of compute capability 9.0, which need not exist."""
    from triton import compile as compiled
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    types = {name: "i32" for name in names} | {name: f"*{kind}" for name, kind in pointers.items()}
    types |= dict.fromkeys(constants, "constexpr")
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=types, constexprs=values)
    assert compiled(source, target=GPUTarget("cuda", 90, 32), options={**fused.EXACT, **options}).asm["ptx"]


def build_all() -> None:
    pointers = {"source": "fp64", "state": "fp64", "free": "i8", "limit": "i32", "keep": "i8"}
    pointers |= {"best": "fp64", "where": "i32", "reported": "i32", "lows": "fp64", "rows": "fp64", "counts": "i32"}
    for rule in ("farthest", "sums", "determinant"):
        for parts in (1, 10):
            constants = {"RULE": rule, "STORED": parts == 1, "COARSE": rule == "farthest", "PARTS": parts}
            constants |= {"PARTS_BLOCK": 16 if parts > 1 else 1, "BLOCK": 64, "CHUNK": 16, "EARLIER": 8}
            build(kernel_steps.steps, pointers, constants, **({"launch_cooperative_grid": True} if parts > 1 else {}))
    build(kernel_turns.turns, {"rank": "i32", "free": "i8", "quota": "i32", "keep": "i8"}, {"BITS": 7, "BLOCK": 64})
    pointers = {"unit": "fp64", "cosine": "fp64", "neighbour": "i32", "lengths": "i32", "goals": "i32"}
    pointers |= {"orders": "i32", "odd": "i8"}
    build(kernel_passes.passes, pointers, {"STEP": 8, "HALF": 64, "PIECE": 64, "CHUNK": 16})
    pointers = {"gain": "i64", "weight": "fp64", "covered": "i32", "free": "i8", "limit": "i32", "keep": "i8"}
    pointers |= {"changed": "i32", "before": "i32"}
    for stored, piece in ((True, 16), (True, 256), (True, 1024), (False, 256)):
        source, constants = {"source": "i32" if stored else "fp64"}, {"STORED": stored, "PIECE": piece}
        build(kernel_cover.cover, pointers | source, constants | {"ROWS": 8, "CHUNK": 16}, num_warps=8)


def build_merging() -> None:
    build(kernel_merging.normalised, {"x": "fp32", "unit": "fp64"}, {"CHUNK": 256})
    pointers = {"products": "fp64", "lengths": "i64", "score": "fp64", "partner": "i64"}
    build(kernel_merging.nearest, pointers, {"RAGGED": True, "ROWS": 16, "PIECE": 64})
    pointers = {"score": "fp64", "partner": "i64", "into": "i64", "order": "i64"}
    for ragged in (False, True):
        numbers = {"lengths": "i64", "removed": "i64"} if ragged else {}
        constants = {"RAGGED": ragged, "EVENS_FIRST": not ragged, "PROTECTED": 1, "BLOCK": 512, "PIECE": 16}
        build(kernel_merging.pairs, pointers | numbers, constants)
    for x, weight in (("fp32", "fp32"), ("bf16", "fp32"), ("fp64", "fp64")):
        pointers = {"x": x, "mean": x, "weight": weight, "total": weight}
        pointers |= dict.fromkeys(("slot", "into", "order", "slots"), "i64")
        build(kernel_merging.merge, pointers, {"TOKENS": 1024, "BLOCK": 1024})


def main() -> None:
    if sys.argv[1] == "build":
        build_all()
        build_merging()
        print("built")
        return
    for name in plain.SEARCHES:
        for probe in probes.probes(torch.device("cpu"), name):
            compare(name, *probe)
    compare_greedy(1, 1, 3, False, [1.0], None)
    # Several programs for one image: on a GPU they wait for each other; in the interpreter every step is a launch.
    without_storing(compare_greedy, 2, 21, 5, True, [0.3, 0.0], 8)
    fuzz_greedy()
    fuzz_turns()
    fuzz_thinned()
    fuzz_covering()
    fuzz_merging()
    # More features than a kernel reads at a time, and more even tokens than the matrix of all pairs has rows at a time.
    compare_merging(3, 9, 1500, False, [0.6], torch.float16 if DEVICE.type == "cpu" else torch.bfloat16)
    compare("nearest", torch.randn(1, 2100, 2, generator=torch.Generator().manual_seed(0)), None)
    large_images()
    print("equal")


main()
