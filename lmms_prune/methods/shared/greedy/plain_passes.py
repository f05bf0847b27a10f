"""Lists that are thinned pass by pass, in plain torch. Dimension letters: B images, R entries of a list, C features."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad

from lmms_prune.methods.shared.greedy import products as store
from lmms_prune.methods.shared.tensors import BLOCK, gather, joined, settled
from lmms_prune.models.tensors import to_device

# Numbers of columns that go over to the device at a time: 16 MiB.
_MOST_COLUMNS = 2**21


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


class Lists(NamedTuple):
    """Lists that are to be thinned; `cosine` and `neighbour` are `nearest_others` of each token.

    Args:
        unit: directions of the tokens, in the order of the list, padded on the right.
        cosine: to each token's nearest others.
        neighbour: which these are.
        length: tokens of each list.
        goal: how many of them remain.
        lengths: `length`, on the host.
        goals: `goal`, on the host.
    """

    unit: Float[Tensor, "B R C"]
    cosine: Float[Tensor, "B R K"]
    neighbour: Int[Tensor, "B R K"]
    length: Int[Tensor, " B"]
    goal: Int[Tensor, " B"]
    lengths: tuple[int, ...]
    goals: tuple[int, ...]


def plain_thinned(lists: Lists, step: int) -> Tensor:
    """As `lmms_prune.methods.shared.greedy.searches.thinned`."""
    unit, cosine, neighbour, length, _, lengths, goals = lists
    images, tokens = unit.shape[:2]
    nearest = _nearest(unit, cosine, neighbour)
    # Columns without an entry hold the number of a token that does not exist.
    number = torch.arange(tokens, device=unit.device)
    order = torch.where(number < length[:, None], number, tokens)[:, : max(lengths)]
    spare = torch.full_like(order[:, :1], tokens)
    for column in _next_columns(lengths, goals, step, unit.device):
        even, odd = order[:, ::2], order[:, 1::2]
        ranked = nearest(even, odd).argsort(dim=1, descending=True, stable=True)
        order = torch.cat([even.gather(1, ranked), odd, spare], dim=1).gather(1, column)
    remains = torch.zeros(images, tokens + 1, dtype=torch.bool, device=unit.device)
    return remains.scatter_(1, order, True)[:, :-1]


def _next_columns(
    lengths: Sequence[int], goals: Sequence[int], step: int, device: torch.device
) -> Iterator[Int[Tensor, "B R"]]:
    """For each pass, where the next list is found in [even entries, most duplicated first; odd entries; a spare column].

    All follows from lengths that the host knows. The tables of many passes go over to the device at once.
    """
    now, ends = torch.tensor(list(lengths)), torch.tensor(list(goals))
    tables: list[Tensor] = []
    while True:
        is_last = bool((now <= ends).all())
        if tables and (is_last or sum(table.numel() for table in tables) > _MOST_COLUMNS):
            flat = to_device(torch.cat([table.flatten() for table in tables]), device)
            pieces = flat.split([table.numel() for table in tables])
            yield from (piece.view(table.shape) for piece, table in zip(pieces, tables, strict=True))
            tables = []
        if is_last:
            return
        width, evens = int(now.max()), (now + 1) // 2
        removed = torch.minimum(now - ends, evens).clamp(min=0, max=step)
        left, now = evens - removed, now - removed
        number = torch.arange(int(now.max()))
        behind = (width + 1) // 2 - left[:, None]
        column = number + torch.where(number < left[:, None], removed[:, None], behind)
        tables.append(torch.where(number < now[:, None], column, width))


def _nearest(unit: Tensor, cosine: Tensor, neighbour: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """A function that tells for each even entry its highest cosine to an odd entry; -inf where there is none."""
    if not unit.is_cuda:
        return partial(_nearest_of_few, unit, cosine.clone(), neighbour.clone())
    return _without_waiting(unit)


def _without_waiting(unit: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The function of a GPU without the kernel: it looks among all, and does not wait to know where that is needed."""
    if unit.shape[1] > store.MOST_STORED:
        return partial(_nearest_of_all, unit)
    return partial(_nearest_of_stored, pad(store.products(unit, unit.dtype), (0, 1, 0, 1), value=-torch.inf))


def _nearest_of_stored(stored: Float[Tensor, "B W W"], even: Tensor, odd: Tensor) -> Tensor:
    if not odd.shape[1]:
        return torch.full_like(even, -torch.inf, dtype=stored.dtype)
    rows = torch.arange(len(even), device=even.device)[:, None, None]
    return stored[rows, even[..., None], odd[:, None]].amax(2)


def _nearest_of_all(unit: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    if not odd.shape[1]:
        return torch.full_like(even, -torch.inf, dtype=unit.dtype)
    last = unit.shape[1] - 1
    evens, odds = (gather(unit, entries.clamp(max=last)) for entries in (even, odd))
    blocks = [
        settled(evens[:, start : start + BLOCK] @ odds.transpose(1, 2))
        .masked_fill_(odd[:, None] > last, -torch.inf)
        .amax(2)
        for start in range(0, even.shape[1], BLOCK)
    ]
    return joined(blocks).masked_fill_(even > last, -torch.inf)


def _nearest_of_few(unit: Tensor, cosine: Tensor, neighbour: Tensor, even: Tensor, odd: Tensor) -> Tensor:
    """From lists of each token's nearest others; a list without an odd entry is renewed, in place."""
    tokens = unit.shape[1]
    is_odd = torch.zeros(len(unit), tokens + 1, dtype=torch.bool).scatter_(1, odd, True)[:, :-1]
    exists, rows, entry = even < tokens, torch.arange(len(even))[:, None], even.clamp(max=tokens - 1)
    listed = neighbour[rows, entry]
    hits = is_odd.gather(1, listed.flatten(1)).view(listed.shape) & exists[..., None]
    nearest = cosine[rows, entry].masked_fill_(~hits, -torch.inf).amax(2)
    missing = (nearest == -torch.inf) & exists & is_odd.any(1, keepdim=True)
    for row in missing.any(1).nonzero().flatten().tolist():
        entries = missing[row].nonzero().flatten()
        chosen, present = even[row, entries], torch.cat([even[row, exists[row]], odd[row, odd[row] < tokens]])
        among = settled(unit[row, chosen] @ unit[row, present].T)
        nearest[row, entries] = among.masked_fill(~is_odd[row, present], -torch.inf).amax(1)
        near, number = among.topk(min(cosine.shape[2], among.shape[1]), dim=1)
        cosine[row, chosen] = -torch.inf
        cosine[row, chosen, : near.shape[1]], neighbour[row, chosen, : near.shape[1]] = near, present[number]
    return nearest
