"""Tensor functions that several methods share. Dimension letters: B rows, L entries before, N after, D features."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import normalize

from lmms_prune.models.tensors import finest

BLOCK = 1024
"""How many rows of a matrix of all pairs of tokens are computed at a time, which bounds the memory that it takes."""


def gather(x: Shaped[Tensor, "B L *D"], index: Int[Tensor, "B N"]) -> Shaped[Tensor, "B N *D"]:
    """The entries of `x` at `index`, row by row."""
    index = index.to(x.device).view(*index.shape, *(1,) * (x.dim() - 2))
    return x.gather(1, index.expand(*index.shape[:2], *x.shape[2:]))


def joined(blocks: Sequence[Shaped[Tensor, "B n *D"]]) -> Shaped[Tensor, "B N *D"]:
    """Blocks of rows one after the other; a single one as it is, without a copy."""
    return blocks[0] if len(blocks) == 1 else torch.cat(list(blocks), dim=1)


def add_up(x: Shaped[Tensor, "B L *D"], into: Int[Tensor, "B L"], count: int) -> Shaped[Tensor, "B N *D"]:
    """Sum the entries of `x` by their index in `into`, of `count` indices; the order of addition is always the same."""
    sums = x.new_zeros(len(x), count, *x.shape[2:])
    if x.is_cuda:
        # Scattering adds in any order on a GPU, so that the last bits, and with them later choices, would vary.
        rows = torch.arange(len(x), device=x.device)[:, None].expand_as(into)
        return sums.index_put((rows, into), x, accumulate=True)
    return sums.scatter_add(1, into.view(*into.shape, *(1,) * (x.dim() - 2)).expand_as(x), x)


def directions(x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
    """Each vector at length 1, in the finest type; zero stays zero."""
    return normalize(x.to(finest(x.device)), dim=-1)


def settled(products: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Round products of `directions`, in place, to a grid coarser than rounding errors and finer than real differences.

    A matrix product rounds differently from entry to entry and from batch to batch. On the grid, products that are
    equal in exact arithmetic become equal, so that ties are ties.
    """
    steps = 2.0**32 if products.dtype == torch.float64 else 2.0**20
    return products.mul_(steps).round_().div_(steps)


def owners(rows: Sequence[int], repeats: int) -> list[int]:
    """For each image, the number of the encoded image that it repeats.

    Args:
        rows: the row of each image, in order.
        repeats: how many consecutive rows are equal, as `generate` makes them for several answers.
    """
    numbers: list[int] = []
    first = 0
    for _, group in groupby(rows, key=lambda row: row // repeats):
        images = len(list(group))
        numbers += [first + i % (images // repeats) for i in range(images)]
        first += images // repeats
    return numbers
