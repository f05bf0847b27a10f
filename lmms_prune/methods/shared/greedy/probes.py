"""Small searches with ties, by which a kernel is tried before it is used."""

from __future__ import annotations

import torch

from lmms_prune.methods.shared.greedy.plain_passes import Lists
from lmms_prune.methods.shared.greedy.products import cosines, products
from lmms_prune.methods.shared.tensors import settled


def probes(device: torch.device, name: str) -> list[tuple]:
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
        return [(Lists(unit, settled(cosine), neighbour, length, goal, lengths, goals), 8)]
    if name == "covering":
        return _covering_probes(device, generator)
    if name in ("nearest", "pairs", "merge"):
        return _merging_probes(name, device, generator)
    searches: list[tuple] = []
    for tokens, stores in ((37, True), (300, False)):
        unit = torch.nn.functional.normalize(torch.randn(2, tokens, 5, generator=generator).double(), dim=-1)
        unit[:, -1] = unit[:, 0]
        valid = torch.arange(tokens).expand(2, -1) < torch.tensor([[tokens], [tokens - 3]])
        first = torch.rand(2, tokens, generator=generator)
        unit, valid, first, limit = (x.to(device) for x in (unit, valid, first, torch.tensor([9, 12])))
        stored = products(unit, unit.dtype) if stores else None
        coarse = None if stored is None else stored.float()
        searches += [
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
    return searches


def _covering_probes(device: torch.device, generator: torch.Generator) -> list[tuple]:
    unit = torch.nn.functional.normalize(torch.randn(2, 37, 5, generator=generator).double(), dim=-1)
    unit[:, -4] = unit[:, 0]
    valid = torch.arange(37).expand(2, -1) < torch.tensor([[37], [34]])
    weight = torch.rand(2, 37, generator=generator).double().mul(8).round()
    unit, weight, valid, limit = (x.to(device) for x in (unit, weight, valid, torch.tensor([9, 12])))
    return [(unit, stored, weight, valid, limit, 12) for stored in (cosines(unit, unit), None)]


def _merging_probes(name: str, device: torch.device, generator: torch.Generator) -> list[tuple]:
    # Small whole numbers: cosines have ties, and sums are exact in any order.
    metric = torch.randint(-2, 3, (2, 37, 3), generator=generator).float()
    counts, removed = torch.tensor([[37, 30], [9, 11]])
    if name == "nearest":
        return [(metric.to(device), length) for length in (None, counts.to(device))]
    score, partner = torch.randint(0, 9, (2, 2, 19), generator=generator).to(device)
    score = score.double() / 8
    shared = (score, partner.clamp(max=17), 37, (37, 37), (9, 9), True, 1)
    if name == "pairs":
        return [shared, (score, partner, 37, tuple(counts.tolist()), tuple(removed.tolist()), False, 0)]
    # Into every other odd token one even one: all means are halves.
    into = torch.arange(37).repeat(2, 1)
    into[:, 0:36:4] += 1
    order = (into != torch.arange(37)).long().argsort(dim=1, stable=True)[:, :28]
    size, slot = torch.full((2, 37), 2.0), 3 * torch.arange(37).expand(2, -1)
    return [tuple(x.to(device) for x in (metric, size, slot, into, order))]
