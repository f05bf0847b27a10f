"""The cells of the certificate's matrix: all combinations, why some cannot be run, and a choice that covers all pairs."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from decimal import Decimal
from itertools import combinations, product

from lmms_prune.methods import METHODS
from lmms_prune.models import FAMILIES
from lmms_prune.models.kernels import dtype_refusal
from lmms_prune.schedule import Schedule, Stage

STAGE_LAYERS = ("0", "1", "middle", "last")
BATCHES = ("1", "3", "ragged")
ATTENTIONS = ("eager", "sdpa")
POSITIONS = ("original", "compact")
DTYPES = ("float32", "bfloat16")
STAGES = (1, 2, 3)
# The layers 0, 1, middle and last must be four different layers.
FEWEST_LAYERS = 4
# Overrides that save time: long auxiliary generations prove nothing more here.
_OPTIONS = {"sgl": (("new_tokens", 4),)}
_FIRST, _SECOND, _THIRD = Decimal("0.8"), Decimal("0.5"), Decimal("0.25")


@dataclass(frozen=True)
class Cell:
    """One way to run one method.

    Args:
        family: the model type of the family.
        dtype: the model's dtype.
        attention: the model's attention kernel.
        positions: the position policy.
        method: the method that is certified.
        stage_layer: the decoder layer of the method's stage: 0, 1, the middle layer or the last layer.
        stages: the number of stages in the schedule; the other stages prune with other methods.
        batch: a name in `BATCHES`.
    """

    family: str
    dtype: str
    attention: str
    positions: str
    method: str
    stage_layer: str
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
    """Yield the full product of all axes, including cells that cannot be run.

    The batch varies fastest, so consecutive cells can share runs.
    """
    axes = (families, dtypes, attentions, POSITIONS, methods, STAGE_LAYERS, STAGES, BATCHES)
    for values in product(*axes):
        yield Cell(*values)


def impossible(cell: Cell) -> str:
    """Return why a cell cannot be run, according to the tables of kernels and methods; "" if it can."""
    spec, layer = METHODS[cell.method], STAGE_LAYERS.index(cell.stage_layer)
    if reason := dtype_refusal(cell.attention, cell.dtype) if cell.dtype != "auto" else "":
        return reason
    if not spec.ready:
        return "needs weights that were trained for it" if spec.trained else "needs measurements that were made for it"
    if cell.positions == "compact" and not FAMILIES[cell.family].renumbers:
        return "positions=compact is refused for M-RoPE"
    example = dict(Schedule.parse(spec.example).stages[0].options)
    if FAMILIES[cell.family].tiled and (reason := spec.undefined_on_tiles(layer, example)):
        return f"is not defined for images in tiles: {reason}"
    if layer < spec.lowest_layer:
        return f"reads {spec.reads_text}: its lowest layer is {spec.lowest_layer}"
    if spec.highest_layer is not None and layer > spec.highest_layer:
        return f"acts at layer {spec.layers_text} only"
    if spec.drops_all and len(_layers(cell, FEWEST_LAYERS)) < cell.stages:
        return "drops all visual tokens: none remain for a later stage"
    return ""


def schedule(cell: Cell, layers: int) -> Schedule:
    """Return a cell's schedule for a model with `layers` decoder layers.

    Stages before the method's stage use DivPrune, stages after it use random pruning.
    """
    spec = METHODS[cell.method]
    method_layer, stage_layers = _layer_of(cell.stage_layer, layers), _layers(cell, layers)
    keeps = (_SECOND,) if len(stage_layers) == 1 else (_FIRST, _SECOND, _THIRD)
    example = dict(Schedule.parse(spec.example).stages[0].options)
    options = tuple({**example, **dict(_OPTIONS.get(cell.method, ()))}.items())
    stages = []
    for layer, keep in zip(stage_layers, keeps, strict=False):
        if layer == method_layer:
            stages.append(Stage(cell.method, layer, 0 if spec.drops_all else keep, options))
        else:
            stages.append(Stage("divprune" if layer < method_layer else "random", layer, keep))
    return Schedule(tuple(stages))


def _layer_of(stage_layer: str, layers: int) -> int:
    return {"0": 0, "1": 1, "middle": layers // 2, "last": layers - 1}[stage_layer]


def _layers(cell: Cell, layers: int) -> list[int]:
    """Return the layers of a cell's stages, sorted: the method's layer and the other stages, preferably after it."""
    method_layer = _layer_of(cell.stage_layer, layers)
    others = [_layer_of(other, layers) for other in ("middle", "last", "1", "0")]
    after = [] if METHODS[cell.method].drops_all else [layer for layer in others if layer > method_layer]
    before = [layer for layer in others if layer < method_layer]
    # Of three stages, one comes after the method if possible, so that a middle method has a stage on either side.
    chosen = (after[:1] + before + after[1:])[: cell.stages - 1]
    return sorted([method_layer, *chosen])


def covering(cells: Iterable[Cell], seed: int = 0, tries: int = 30) -> list[Cell]:
    """Choose a subset of `cells` that covers all pairs.

    If any two values occur together in some cell, they also occur together in a chosen cell.

    Args:
        cells: the cells to choose from.
        seed: seeds the random candidates.
        tries: the number of candidates for each pair; the one that covers most missing pairs is chosen.
    """
    pool = list(cells)
    holders: dict[tuple, list[int]] = {}
    for index, cell in enumerate(pool):
        for pair in _pairs(cell):
            holders.setdefault(pair, []).append(index)
    rng, chosen = random.Random(seed), []
    missing = set(holders)
    # Rare pairs come first because they leave the least choice.
    for pair in sorted(holders, key=lambda pair: (len(holders[pair]), str(pair))):
        if pair in missing:
            candidates = rng.sample(holders[pair], min(tries, len(holders[pair])))
            best = max(candidates, key=lambda index: len(_pairs(pool[index]) & missing))
            chosen.append(best)
            missing -= _pairs(pool[best])
    return [pool[index] for index in sorted(chosen)]


def _pairs(cell: Cell) -> set[tuple]:
    values = [(field.name, getattr(cell, field.name)) for field in fields(cell)]
    return set(combinations(values, 2))
