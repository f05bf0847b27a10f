"""Budgets: upper bounds on the cost of a schedule, and the search for the largest keep within one.

budget := 192t | 0.5                     average visual tokens a decoder layer, or their share of the original ones
        | flops=40% | flops=3.5T         of the decoder's prefill: a share of the unpruned one's, or an amount (T, G)
        | kv=40% | kv=100MiB             of the key-value cache after it (MiB, GiB)
        | ttft@h100=60% | ttft@h100=9ms  of the estimated time to first token on a card, batch 1, vision encoder included (ms, s)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor, log10
from typing import TYPE_CHECKING, Any

from lmms_prune.errors import FROM_ONE, FROM_ZERO, ScheduleError, expect, optional
from lmms_prune.schedule.stage import ADAPTIVE, Stage
from lmms_prune.schedule.text import read_number

if TYPE_CHECKING:
    from lmms_prune.schedule.schedule import Schedule

Number = int | float | Fraction
MIB = 2**20
UNITS: dict[str, dict[str, Number]] = {
    "flops": {"T": 10**12, "G": 10**9},
    "kv": {"MiB": MIB, "GiB": 2**30},
    "ttft": {"ms": Fraction(1, 1000), "s": 1},
}
"""The value of each unit, by what is measured."""
_EXAMPLES = {
    "flops": "flops=30% or flops=2.5T",
    "kv": "kv=30% or kv=100MiB",
    "ttft": "ttft@h100=60% or ttft@h100=9ms",
}
_ON_A_CARD = "ttft"
# A ratio for images of any size is solved on an image of this many tokens, so it has four decimals.
_RATIO_STEPS = 10_000


@dataclass(frozen=True)
class Budget:
    """An upper bound on what a schedule costs.

    Args:
        text: as written.
        measure: "tokens" (average visual tokens a decoder layer), "flops", "kv", or "ttft@" with a card's name.
        amount: in the unit.
        unit: "t" (tokens), "" (a share of the original tokens), "%" (of the unpruned prefill), or one of `UNITS`.
    """

    text: str
    measure: str
    amount: Fraction
    unit: str

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, budget: Any) -> Budget:
        """Read a budget; a number is a share of the original tokens.

        Raises:
            ScheduleError: the text is no budget; the message says what may be written.
        """
        if isinstance(budget, Budget):
            return budget
        text = str(budget).strip()
        measure, equals, amount = (part.strip() for part in text.partition("="))
        if not equals:
            return cls._of_tokens(text)
        kind, at, card = measure.partition("@")
        if kind not in UNITS:
            raise ScheduleError(
                f"budget '{text}': '{measure}' is not known; use flops=, kv= or ttft@, or tokens: 192t."
            )
        if (kind == _ON_A_CARD) != bool(card) or bool(at) != bool(card):
            problem = "names no card" if kind == _ON_A_CARD else f"'{kind}' is the same on every card"
            raise ScheduleError(f"budget '{text}': {problem}; write {_EXAMPLES[kind]}.")
        match = re.fullmatch(rf"([0-9]+(?:\.[0-9]+)?)\s*(%|{'|'.join(UNITS[kind])})", amount)
        if match is None:
            raise ScheduleError(f"budget '{text}' is no amount with a unit; write {_EXAMPLES[kind]}.")
        return cls(text, measure, Fraction(match[1]), match[2])

    @classmethod
    def _of_tokens(cls, text: str) -> Budget:
        numerator, slash, denominator = text.removesuffix("t").partition("/")
        number, divisor = read_number(numerator), read_number(denominator) if slash else Decimal(1)
        if number is None or not divisor:
            raise ScheduleError(
                f"budget '{text}' is neither tokens ('192t') nor a ratio of the original tokens ('0.5')."
            )
        amount, unit = Fraction(number) / Fraction(divisor), "t" if text.endswith("t") else ""
        if not unit and not 0 <= amount <= 1:
            raise ScheduleError(f"budget '{text}' is a ratio and must lie in [0, 1]; for tokens write '{text}t'.")
        return cls(text, "tokens", amount, unit)


@dataclass(frozen=True)
class PromptSizes:
    """The prompt, with one image, on which a budget is solved, in a model of known depth.

    Args:
        layers: decoder layers of the model.
        visual_tokens: original tokens of every image; None where images differ in size. Then a budget in tokens is
            refused, and the solution is a ratio.
        example: tokens of the image on which a cost budget is solved where images differ.
        costs: functions "flops", "kv" and "ttft@" with each card, of the visual tokens that enter the first layers of the prompt; the output matrix
            is included only if all layers are passed. Empty if the model's sizes are not known.
        tile: tokens of each tile of an image, for stages whose keep holds per tile; 0 where each image is one.
    """

    layers: int
    visual_tokens: int | None = None
    example: int = _RATIO_STEPS
    costs: Mapping[str, Callable[[Sequence[int]], Number]] = field(default_factory=dict)
    tile: int = 0

    def __post_init__(self) -> None:
        expect(
            layers=(self.layers, FROM_ONE),
            visual_tokens=(self.visual_tokens, optional(FROM_ONE)),
            example=(self.example, FROM_ONE),
            tile=(self.tile, FROM_ZERO),
        )

    def tiles(self, tokens: int) -> list[list[int]]:
        """The tiles of an image of so many visual tokens, as `Schedule.plan` takes them: whole ones, and a rest."""
        if not self.tile:
            return []
        full, rest = divmod(tokens, self.tile)
        return [[self.tile] * full + [rest] * (rest > 0)]


def solved(schedule: Schedule, budget: Budget, sizes: PromptSizes) -> Schedule:
    """`schedule` with its one ``?`` replaced by the largest keep whose cost stays within `budget`.

    Returns:
        a number of tokens if all images have the same size and the budget is no ratio; otherwise a ratio of four
        decimals, which means the same for every image.

    Raises:
        ScheduleError: no ``?`` or several, or a budget that cannot be met; the message says what can.
    """
    solution = _Search(schedule, budget, sizes).largest()
    solution.check(sizes.layers, [sizes.visual_tokens] if sizes.visual_tokens else None)
    return solution


class _Search:
    """The search for the one unknown keep of a schedule."""

    def __init__(self, schedule: Schedule, budget: Budget, sizes: PromptSizes):
        self.schedule, self.budget, self.sizes = schedule, budget, sizes
        self.index = _to_solve(schedule)
        of_tokens = budget.measure == "tokens"
        if budget.unit == "t" and sizes.visual_tokens is None:
            raise ScheduleError(
                f"budget '{budget}' is a number of tokens, but this model's images differ in size; give a ratio: 0.5."
            )
        if not of_tokens and budget.measure not in sizes.costs:
            cards = [name.partition("@")[2] for name in sizes.costs if "@" in name]
            if cards:
                raise ScheduleError(f"budget '{budget}': this card is not known; use one of {', '.join(cards)}.")
            raise ScheduleError(f"budget '{budget}': a budget of cost needs a model whose sizes are known.")
        # By tiles, counts depend on how large these are, so that a ratio must be solved on a real image.
        self.n = sizes.visual_tokens or (_RATIO_STEPS if of_tokens and not sizes.tile else sizes.example)
        self.in_tokens = sizes.visual_tokens is not None and budget.unit != ""
        self.grid = self.n if self.in_tokens else _RATIO_STEPS

    def largest(self) -> Schedule:
        """The schedule with the largest keep within the budget, by bisection."""
        stages, index = self.schedule.stages, self.index
        high = self.grid if index == 0 else floor(self._steps(stages[index - 1]))
        low = 0 if index + 1 == len(stages) else ceil(self._steps(stages[index + 1]))
        bottom, top, limit = low, high, self._limit()
        smallest, largest = (self._cost(self._filled(step)) for step in (low, high))
        if smallest > limit or largest < limit:
            raise self.schedule.error(index, self._unmet(smallest, largest, limit))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self._cost(self._filled(middle)) <= limit else (low, middle - 1)
        # Several counts may leave the same tokens (DART's quotas): report the count that is actually kept, if that
        # count is a legal keep between the neighbouring stages and resolves to itself (with recycling it would not).
        kept = self._plan(low)
        if self.in_tokens and bottom <= kept[index][0] <= top and self._plan(kept[index][0]) == kept:
            low = kept[index][0]
        return self._filled(low)

    def _filled(self, step: int) -> Schedule:
        stages = list(self.schedule.stages)
        keep = step if self.in_tokens else Decimal(step) / _RATIO_STEPS
        stages[self.index] = replace(stages[self.index], keep=keep)
        return replace(self.schedule, stages=tuple(stages))

    def _plan(self, step: int) -> list[list[int]]:
        return self._filled(step).plan([self.n], self.sizes.tiles(self.n))

    def _steps(self, stage: Stage) -> Fraction:
        """The keep of a neighbouring stage in steps of the search; in tokens the rounded number that it requests."""
        if isinstance(stage.keep, Decimal) and not self.in_tokens:
            return Fraction(stage.keep) * self.grid
        return Fraction(stage.requested([self.n])[0], self.n) * self.grid

    def _cost(self, filled: Schedule) -> Number:
        counts = filled.cached_counts if self.budget.measure == "kv" else filled.layer_counts
        return self._of(counts(self.sizes.layers, [self.n], self.sizes.tiles(self.n)))

    def _of(self, counts: Sequence[int]) -> Number:
        """The cost of the layers that these visual tokens enter."""
        if self.budget.measure == "tokens":
            return Fraction(sum(counts), self.sizes.layers)
        return self.sizes.costs[self.budget.measure](counts)

    @property
    def _unit(self) -> Number:
        """The value of one unit of the budget."""
        if self.budget.measure == "tokens":
            return 1 if self.budget.unit else self.n
        if self.budget.unit == "%":
            return self._cost(replace(self.schedule, stages=())) / 100
        return UNITS[self.budget.measure.partition("@")[0]][self.budget.unit]

    def _limit(self) -> Number:
        amount = self.budget.amount
        # In floats like the costs, so that a printed bound is accepted as a budget.
        return amount * self._unit if self.budget.measure == "tokens" else float(amount) * self._unit

    def _unmet(self, smallest: Number, largest: Number, limit: Number) -> str:
        """The message that the budget cannot be met, with the smallest and largest possible cost."""
        layer = self.schedule.stages[self.index].layer
        earlier = replace(self.schedule, stages=self.schedule.stages[: self.index])
        before = self._of(earlier.layer_counts(self.sizes.layers, [self.n], self.sizes.tiles(self.n))[:layer])
        # Where earlier caches are cropped, no layer's alone is fixed.
        shrinks = self.budget.measure == "kv" and bool(self.schedule.cropped)
        fixed = layer if smallest > limit and not shrinks else 0
        verb = "average" if self.budget.measure == "tokens" else "take"
        alone = {0: "", 1: f"layer 0 alone {verb}s {self._written(before, round)}; "}.get(
            fixed, f"layers 0 to {fixed - 1} alone {verb} {self._written(before, round)}; "
        )
        # Rounded inwards, so that both printed bounds are possible.
        low, high = self._written(smallest, ceil), self._written(largest, floor)
        return f"the budget {self.budget} cannot be met: {alone}the smallest possible is {low}, the largest {high}."

    def _written(self, cost: Number, to: Callable[[Any], int]) -> str:
        """`cost` in the budget's unit: tokens with two decimals, ratios with four, other costs with four digits."""
        value = Fraction(cost) / self._unit if self.budget.measure == "tokens" else float(cost) / float(self._unit)
        if self.budget.measure == "tokens":
            step = Fraction(1, 100) if self.budget.unit else Fraction(1, _RATIO_STEPS)
            return f"{float(to(value / step) * step):.10g}{self.budget.unit}"
        size = 10.0 ** (floor(log10(value)) - 3) if value else 1.0
        return f"{to(value / size) * size:.4g}{self.budget.unit}"


def _to_solve(schedule: Schedule) -> int:
    """The index of the one stage with an unknown keep."""
    if sum(stage.keep is None for stage in schedule.stages) != 1:
        raise ScheduleError(f"a budget needs a schedule with exactly one '?', e.g. 'dart@2:?'; got '{schedule}'.")
    for i, stage in enumerate(schedule.stages):
        if stage.keep == ADAPTIVE:
            raise schedule.error(
                i, f"stage {i + 1} decides by itself how much it keeps, so no budget can be solved; give it a keep."
            )
    return next(i for i, stage in enumerate(schedule.stages) if stage.keep is None)
