"""Greedy searches as one GPU kernel each: otherwise their hundreds of dependent picks would cost hundreds of launches.

Every search has a reference in plain torch, which CPUs use, and GPUs on which the kernel cannot be built.
Dimension letters: B images, V visual tokens, D features, P pivots.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from subprocess import CalledProcessError
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lmms_prune.methods.shared.greedy import fused, plain
from lmms_prune.methods.shared.greedy import products as store
from lmms_prune.methods.shared.greedy.plain import multiplies_all
from lmms_prune.methods.shared.greedy.plain_passes import nearest_others
from lmms_prune.methods.shared.greedy.products import cosines, products
from lmms_prune.methods.shared.tensors import settled
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
        some = slice(start, start + at_once)
        most, number = int(limit[some].max()), to_device(limit[some], unit.device)
        stored = cosines(unit[some], unit[some]) if unit.shape[1] <= store.MOST_STORED else None
        parts.append(_search("covering", unit[some], stored, weight[some], valid[some], number, most))
    return parts[0] if len(parts) == 1 else torch.cat([valid[:0], *parts])


def _search(name: str, *args: Any) -> Tensor:
    device = next(x.device for x in args if isinstance(x, Tensor))
    is_fused = device.type == "cuda" and _works(device, name)
    with counted_as(_greedy_flops(*args) if name == "greedy" else 0):
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


@lru_cache
def _works(device: torch.device, name: str) -> bool:
    """Whether a kernel can be built on this machine (Triton needs a C compiler) and agrees with the reference on a probe."""
    if fused.triton is None:
        return False
    try:
        return all(bool(torch.equal(_fused(name, *probe), _plain(name, *probe))) for probe in _probes(device, name))
    except (RuntimeError, OSError, CalledProcessError, KeyError, TypeError, fused.triton.TritonError):
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
    if name == "covering":
        return _covering_probes(device, generator)
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


def _covering_probes(device: torch.device, generator: torch.Generator) -> list[tuple]:
    unit = torch.nn.functional.normalize(torch.randn(2, 37, 5, generator=generator).double(), dim=-1)
    unit[:, -4] = unit[:, 0]
    valid = torch.arange(37).expand(2, -1) < torch.tensor([[37], [34]])
    weight = torch.rand(2, 37, generator=generator).double().mul(8).round()
    unit, weight, valid, limit = (x.to(device) for x in (unit, weight, valid, torch.tensor([9, 12])))
    return [(unit, stored, weight, valid, limit, 12) for stored in (cosines(unit, unit), None)]


def _plain(name: str, *args: Any) -> Tensor:
    """The reference implementation, also used on CPUs."""
    return plain.SEARCHES[name](*args)


def _fused(name: str, *args: Any) -> Tensor:
    """The Triton kernel."""
    # Triton launches on the current device, whatever the tensors'.
    with fused.on_device(args):
        return fused.SEARCHES[name](*args)
