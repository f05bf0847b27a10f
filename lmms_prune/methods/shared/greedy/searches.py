"""Greedy searches as one GPU kernel each: otherwise their hundreds of dependent picks would cost hundreds of launches.

Every search has a reference in plain torch, which CPUs use, and GPUs on which the kernel cannot be built.
Dimension letters: B images, V visual tokens, D features, P pivots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from subprocess import CalledProcessError
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lmms_prune.methods.shared.greedy import fused, plain
from lmms_prune.methods.shared.greedy import products as store
from lmms_prune.methods.shared.greedy.plain import multiplies_all
from lmms_prune.methods.shared.greedy.plain_passes import Lists, nearest_others
from lmms_prune.methods.shared.greedy.probes import probes
from lmms_prune.methods.shared.greedy.products import cosines
from lmms_prune.methods.shared.tensors import BLOCK
from lmms_prune.models.counting import counted_as
from lmms_prune.models.tensors import to_device

Rule = Literal["farthest", "sums", "determinant"]

# How many of a token's nearest others are listed, so that its nearest odd one need not be looked for among all.
_NEIGHBOURS = 64


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
    return run("greedy", rule, vectors, first, valid, limit, most, stored)


def in_turn(order: Int[Tensor, "B P V"], free: Bool[Tensor, "B V"], quota: Int[Tensor, "B P"]) -> Bool[Tensor, "B V"]:
    """Pivots pick in turn: each takes its quota of the tokens that are still free, in its own order.

    Args:
        order: for each pivot all tokens, the one that it takes first at the front.
        free: the candidates.
        quota: tokens for each pivot.

    Returns:
        a mask of the picks.
    """
    return run("in_turn", order, free, quota)


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
    return run("thinned", Lists(unit, cosine, neighbour, length, goal, tuple(lengths), tuple(goals)), step)


def covering(
    unit: Float[Tensor, "B V D"], weight: Float[Tensor, "B V"], valid: Bool[Tensor, "B V"], limit: Int[Tensor, " B"]
) -> Bool[Tensor, "B V"]:
    """Greedy search: every pick is the candidate with the highest weighted gain in coverage.

    A token is covered by its highest cosine to a pick, at least by 0. A candidate's gain is what it adds to the coverage of
    all tokens, times its weight.

    Args:
        unit: the tokens' directions, in the finest type.
        weight: of the tokens, not negative.
        valid: the tokens that are covered, and may be picked.
        limit: how many to pick in each image, at most as many as there are candidates; on the host.

    Returns:
        a mask of the picks; ties go to the lower index.
    """
    parts = []
    # The cosines of all pairs of so many images exist at once; those of larger images are computed anew.
    pairs = 4 * unit.shape[1] ** 2 if unit.shape[1] <= store.MOST_STORED else 1
    at_once = max(1, plain.MOST_BYTES // max(1, pairs))
    for start in range(0, len(unit), at_once):
        images = slice(start, start + at_once)
        most, number = int(limit[images].max()), to_device(limit[images], unit.device)
        stored = cosines(unit[images], unit[images]) if unit.shape[1] <= store.MOST_STORED else None
        parts.append(run("covering", unit[images], stored, weight[images], valid[images], number, most))
    return parts[0] if len(parts) == 1 else torch.cat([valid[:0], *parts])


def run(name: str, *args: Any) -> Any:
    """The result of a search, or of a step of merging, by its kernel where that can be built; `args` as its reference's."""
    device = next(x.device for x in tree_leaves(args) if isinstance(x, Tensor))
    is_fused = device.type == "cuda" and _works(device, name)
    with counted_as(_FLOPS[name](*args) if name in _FLOPS else 0):
        return (_fused if is_fused else _plain)(name, *args)


def _greedy_flops(
    rule: str, vectors: Tensor, first: Tensor, valid: Tensor, limit: Tensor, most: int, stored: Tensor | None
) -> int:
    """FLOPs of the reference's products on a CPU, whichever way the search goes; of Gram-Schmidt for "determinant"."""
    images, tokens, width = vectors.shape
    if rule == "determinant":
        return images * sum(2 * tokens * width + 4 * step * width for step in range(most))
    if stored is not None:
        return 0
    return 2 * images * tokens * width * (tokens if multiplies_all(tokens, most) else most)


def _nearest_flops(metric: Tensor, length: Tensor | None) -> int:
    """FLOPs of the products of all even tokens with all odd ones."""
    images, tokens, width = metric.shape
    return 2 * images * ((tokens + 1) // 2) * (tokens // 2) * width


# Of what multiplies vectors; other searches compare what is computed already.
_FLOPS: dict[str, Callable[..., int]] = {"greedy": _greedy_flops, "nearest": _nearest_flops}


def launches(name: str, *args: Any) -> int:
    """Kernel launches of a fused search."""
    # Directions, then for each block of rows a product of matrices and what is highest in it.
    return 1 + 2 * -(-args[0].shape[1] // (2 * BLOCK)) if name == "nearest" else 1


@lru_cache
def _works(device: torch.device, name: str) -> bool:
    """Whether a kernel can be built on this machine (Triton needs a C compiler) and agrees with the reference on a probe."""
    if fused.triton is None:
        return False
    try:
        return all(_are_equal(_fused(name, *probe), _plain(name, *probe)) for probe in probes(device, name))
    except (RuntimeError, OSError, CalledProcessError, KeyError, TypeError, fused.triton.TritonError):
        return False


def _are_equal(first: Any, second: Any) -> bool:
    return all(map(torch.equal, tree_leaves(first), tree_leaves(second)))


def _plain(name: str, *args: Any) -> Any:
    """The reference implementation, also used on CPUs."""
    return plain.SEARCHES[name](*args)


def _fused(name: str, *args: Any) -> Any:
    """The Triton kernel."""
    # Triton launches on the current device, whatever the tensors'.
    with fused.on_device(args):
        return fused.SEARCHES[name](*args)
