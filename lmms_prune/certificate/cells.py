"""The cells of the matrix: every method in every way it can be run, those that cannot be and why, and a covering choice."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from itertools import combinations, product

from lmms_prune.methods import METHODS
from lmms_prune.models import FAMILIES
from lmms_prune.schedule import Schedule, Stage

PLACES = ("0", "1", "middle", "last")
BATCHES = ("1", "3", "ragged")
ATTENTIONS = ("eager", "sdpa")
POSITIONS = ("original", "compact")
DTYPES = ("float32", "bfloat16")
STAGES = (1, 2, 3)
# One layer each for the places 0, 1, middle and last.
FEWEST_LAYERS = 4
# Options that only cost time here.
_OPTIONS = {"sgl": (("new_tokens", 4),)}
_FIRST, _SECOND, _THIRD = Decimal("0.8"), Decimal("0.5"), Decimal("0.25")


@dataclass(frozen=True)
class Cell:
    """One way of running one method.

    Args:
        family: the model's type.
        dtype, attention: of the model.
        positions: the position policy.
        method: what is certified.
        place: of its stage: decoder layer 0 or 1, the middle one, or the last.
        stages: how many the schedule has; others prune by other methods before and after.
        batch: a name of `BATCHES`.
    """

    family: str
    dtype: str
    attention: str
    positions: str
    method: str
    place: str
    stages: int
    batch: str

    def __str__(self) -> str:
        return " ".join(str(getattr(self, field.name)) for field in fields(self))


def enumerate_cells(
    families: Sequence[str],
    methods: Sequence[str] = tuple(METHODS),
    dtypes: Sequence[str] = DTYPES,
    attentions: Sequence[str] = ATTENTIONS,
) -> Iterator[Cell]:
    """The whole product, cells that cannot be run included; neighbours differ in the batch first."""
    axes = (families, dtypes, attentions, POSITIONS, methods, PLACES, STAGES, BATCHES)
    for values in product(*axes):
        yield Cell(*values)


def impossible(cell: Cell) -> str:
    """Why no schedule can be made of a cell, as the table of methods says; nothing if one can."""
    spec, layer = METHODS[cell.method], PLACES.index(cell.place)
    if not spec.ready:
        return "needs weights that were trained for it" if spec.trained else "needs measurements that were made for it"
    if cell.positions == "compact" and not FAMILIES[cell.family].renumbers:
        return "positions=compact is refused for M-RoPE"
    if layer < spec.lowest_layer:
        return f"reads {spec.reads_text}: its lowest layer is {spec.lowest_layer}"
    if spec.highest_layer is not None and layer > spec.highest_layer:
        return f"acts at layer {spec.layers_text} only"
    if spec.drops_all and len(_layers(cell, FEWEST_LAYERS)) < cell.stages:
        return "drops everything: nothing is left for a later stage"
    return ""


def schedule(cell: Cell, layers: int) -> Schedule:
    """The schedule of a cell for a model of `layers` decoder layers: DivPrune before the method, random after it."""
    spec = METHODS[cell.method]
    at, acting = _place(cell.place, layers), _layers(cell, layers)
    keeps = (_SECOND,) if len(acting) == 1 else (_FIRST, _SECOND, _THIRD)
    example = dict(Schedule.parse(spec.example).stages[0].options)
    options = tuple({**example, **dict(_OPTIONS.get(cell.method, ()))}.items())
    made = []
    for layer, keep in zip(acting, keeps, strict=False):
        if layer == at:
            made.append(Stage(cell.method, layer, 0 if spec.drops_all else keep, options))
        else:
            made.append(Stage("divprune" if layer < at else "random", layer, keep))
    return Schedule(tuple(made))


def _place(place: str, layers: int) -> int:
    return {"0": 0, "1": 1, "middle": layers // 2, "last": layers - 1}[place]


def _layers(cell: Cell, layers: int) -> list[int]:
    """The layers of the stages: the method's, and as many others as asked for, rather after it than before."""
    at = _place(cell.place, layers)
    others = [_place(place, layers) for place in ("middle", "last", "1", "0")]
    after = [] if METHODS[cell.method].drops_all else [layer for layer in others if layer > at]
    before = [layer for layer in others if layer < at]
    # In the middle of three the method has one on either side.
    chosen = (after[:1] + before + after[1:])[: cell.stages - 1]
    return sorted([at, *chosen])


def covering(cells: Iterable[Cell], seed: int = 0, tries: int = 30) -> list[Cell]:
    """A choice of `cells` in which every two values that some cell has together are together in a chosen one."""
    pool = list(cells)
    holders: dict[tuple, list[int]] = {}
    for number, cell in enumerate(pool):
        for pair in _pairs(cell):
            holders.setdefault(pair, []).append(number)
    rng, chosen = random.Random(seed), []
    missing = set(holders)
    # Pairs that few cells have come first: there is least choice for them.
    for pair in sorted(holders, key=lambda pair: (len(holders[pair]), str(pair))):
        if pair in missing:
            some = rng.sample(holders[pair], min(tries, len(holders[pair])))
            best = max(some, key=lambda number: len(_pairs(pool[number]) & missing))
            chosen.append(best)
            missing -= _pairs(pool[best])
    return [pool[number] for number in sorted(chosen)]


def _pairs(cell: Cell) -> set[tuple]:
    values = [(field.name, getattr(cell, field.name)) for field in fields(cell)]
    return set(combinations(values, 2))
