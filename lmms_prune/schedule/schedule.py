"""A schedule: a tuple of stages, what it keeps at each layer, and what a model must be to run it.

Nothing in this package needs torch, so a schedule can be checked in milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from math import ceil, floor
from typing import Any

from lmms_prune.errors import (
    FROM_ONE,
    NUMBER,
    TOKEN_COUNTS,
    ScheduleError,
    did_you_mean,
    expect,
    optional,
    tuple_of,
)
from lmms_prune.methods import METHODS
from lmms_prune.schedule.presets import PRESETS
from lmms_prune.schedule.stage import OWN, Stage, print_keep
from lmms_prune.schedule.text import read_number, read_stages

# A ratio budget for images of any size is solved on an image of this many tokens, that is to four decimals.
_FINE = 10_000


@dataclass(frozen=True)
class Schedule:
    """A tuple of stages with strictly increasing layers and never growing keeps; `Schedule()` prunes nothing."""

    stages: tuple[Stage, ...] = ()

    def __post_init__(self) -> None:
        expect(stages=(self.stages, tuple_of(Stage)))
        for i, stage in enumerate(self.stages):
            self._check_stage(i, stage)

    def __str__(self) -> str:
        return ",".join(map(str, self.stages)) or "none"

    @classmethod
    def parse(cls, text: Any) -> Schedule:
        """Read a schedule text, a preset's name, ``none``, or a list of stage texts (whatever a YAML held).

        Raises:
            ScheduleError: the text is not a schedule; the message points at the place.
        """
        if not isinstance(text, str):
            if not isinstance(text, (list, tuple)) or not all(isinstance(stage, str) for stage in text):
                raise ScheduleError(f"{text!r} is neither a text nor a list of stages such as 'dart@2:0.44'.")
            text = ",".join(stage.strip() for stage in text)
        text = text.strip()
        if text.lower() == "none":
            return cls()
        if not text:
            raise ScheduleError("it is empty; write 'none' to prune nothing.")
        if text in PRESETS:
            text = PRESETS[text]
        elif "@" not in text:
            known = [*METHODS, *PRESETS, "none"]
            if text in METHODS:
                hint = f" A method needs a layer: e.g. '{METHODS[text].example}'."
            else:
                hint = did_you_mean(text, known)
            raise ScheduleError(
                f"'{text}' is neither a preset nor a stage such as 'dart@2:0.44'.{hint}", text, (0, len(text))
            )
        return cls(read_stages(text))

    @property
    def unknown(self) -> int | None:
        """The index of the stage whose keep is ``?``, or None."""
        return next((i for i, stage in enumerate(self.stages) if stage.keep is None), None)

    @property
    def at_most(self) -> bool:
        """Whether some stage may keep fewer tokens than planned, so that the plan and its averages are upper bounds."""
        return any(stage.at_most for stage in self.stages)

    def check(self, layers: int, images: Sequence[int] | None = None) -> None:
        """Refuse what a model of `layers` decoder layers, and images of these token counts, cannot run.

        Raises:
            ScheduleError: a layer beyond the model, an unsolved ``?``, or a stage that keeps more than an earlier one.
        """
        expect(layers=(layers, FROM_ONE), images=(images, optional(TOKEN_COUNTS)))
        for i, stage in enumerate(self.stages):
            if stage.layer >= layers:
                message = (
                    f"layer {stage.layer} in stage {i + 1} is beyond the model, whose layers are 0 to {layers - 1}."
                )
                raise self._error(i, message)
            if stage.keep is None:
                raise self._error(
                    i,
                    f"the '?' of stage {i + 1} needs a budget, e.g. budget=192t or budget=0.5 (in Python: Schedule.solve).",
                )
        if images is None:
            return self._check_units()
        for i in range(1, len(self.stages)):
            before, now = (sum(stage.asked(images)) for stage in self.stages[i - 1 : i + 1])
            if now > before and self.stages[i].keep != OWN:
                raise self._error(
                    i, f"stage {i + 1} keeps {now} of the {before} tokens that stage {i} keeps: keeps never grow."
                )

    def _check_units(self) -> None:
        """Without knowing the images, a ratio and a count cannot be told to be in order, so they may not be mixed."""
        for i in range(1, len(self.stages)):
            before, now = (self.stages[j].keep for j in (i - 1, i))
            if OWN not in (before, now) and now != 0 and before != 1 and type(before) is not type(now):
                message = f"stages {i} and {i + 1} mix a ratio and a number of tokens, but this model's images differ in size, "
                raise self._error(i, message + "so that the second may be more; use the same unit.")

    def plan(self, images: Sequence[int]) -> list[list[int]]:
        """Tokens really left in each image after each stage.

        Args:
            images: the original visual tokens of each image of one row.

        Returns:
            one list of per-image counts a stage; what is executed equals it (`at_most`: stays within it), and budgets
            are computed from it.
        """
        expect(images=(images, TOKEN_COUNTS))
        present, plan = list(images), []
        for stage in self.stages:
            present = stage.kept(images, present)
            plan.append(present)
        return plan

    @property
    def keeps_all(self) -> bool:
        """Whether every stage asks for all tokens, by the ratio 1: a control that is meant to change nothing."""
        return all(isinstance(stage.keep, Decimal) and stage.keep == 1 for stage in self.stages)

    def idle(self, images: Sequence[int]) -> list[Stage]:
        """The stages that prune nothing of a row with these images, though they do not ask for all tokens."""
        present, idle = list(images), []
        for stage in self.stages:
            kept = stage.kept(images, present)
            if kept == present and any(present) and not stage.at_most and stage.keep != 1:
                idle.append(stage)
            present = kept
        return idle

    def layer_counts(self, layers: int, images: Sequence[int]) -> list[int]:
        """Visual tokens entering each of `layers` decoder layers for one row with these images."""
        expect(layers=(layers, FROM_ONE), images=(images, TOKEN_COUNTS))
        counts, present, plan = [], sum(images), self.plan(images)
        for layer in range(layers):
            for stage, kept in zip(self.stages, plan, strict=True):
                if stage.layer == layer:
                    present = sum(kept)
            counts.append(present)
        return counts

    def average(self, layers: int, images: Sequence[int]) -> Fraction:
        """Average visual tokens per decoder layer for one row with these images."""
        return Fraction(sum(self.layer_counts(layers, images)), layers)

    def solve(self, budget: str | float, layers: int, visual_tokens: int | None = None) -> Schedule:
        """Replace the one ``?`` by the largest keep whose measured average stays within the budget.

        Args:
            budget: average visual tokens per layer: ``192t`` tokens, or a ratio of the original tokens.
            layers: decoder layers of the model.
            visual_tokens: original tokens of an image; None where images differ in size: then a token budget is
                refused, and a ratio is met exactly only by large images, whose counts round little.

        Returns:
            the schedule with a number of tokens where the budget is one, else with a ratio of four decimals.

        Raises:
            ScheduleError: no ``?`` or several, or a budget that cannot be met; the message says what can.
        """
        expect(layers=(layers, FROM_ONE), visual_tokens=(visual_tokens, optional(FROM_ONE)))
        n = visual_tokens or _FINE
        index = self._to_solve()
        limit, in_tokens = _parse_budget(budget, n, visual_tokens)

        def unmet(smallest: Fraction | float, largest: Fraction | float) -> str:
            step, unit = (Fraction(1, 100), "t") if in_tokens else (Fraction(n, _FINE), "")

            def said(amount: Fraction) -> str:  # of two decimals in tokens, four as a ratio
                return f"{float(amount if in_tokens else amount / n):.10g}{unit}"

            before = Fraction(sum(self.before_unknown(layers, n)), layers)
            # Rounded inwards, so that what is said to be possible is.
            possible = said(ceil(smallest / step) * step), said(floor(largest / step) * step)
            fixed = self.stages[index].layer if smallest > limit else 0
            return cannot_be_met(budget, fixed, "average", said(round(before / step) * step), *possible)

        # A ratio is sought on a grid of four decimals, so that it means the same for every image.
        solved = self._largest(index, n, in_tokens, lambda filled: filled.average(layers, [n]), limit, unmet)
        solved.check(layers, [visual_tokens] if visual_tokens else None)
        return solved

    def solve_for(
        self,
        cost: Callable[[Schedule], int | float],
        limit: int | float,
        layers: int,
        visual_tokens: int,
        unmet: Callable[[float, float], str],
    ) -> Schedule:
        """Replace the one ``?`` by the largest number of tokens at which `cost` stays within `limit`.

        Args:
            cost: of a schedule without a ``?``; must not fall when more is kept.
            limit: in the unit of `cost`.
            layers: decoder layers of the model.
            visual_tokens: original tokens of an image.
            unmet: the message where that cannot be, given the smallest and the largest possible cost.

        Raises:
            ScheduleError: no ``?`` or several, or a limit that cannot be met.
        """
        expect(limit=(limit, NUMBER), layers=(layers, FROM_ONE), visual_tokens=(visual_tokens, FROM_ONE))
        solved = self._largest(self._to_solve(), visual_tokens, True, cost, limit, unmet)
        solved.check(layers, [visual_tokens])
        return solved

    def before_unknown(self, layers: int, visual_tokens: int) -> list[int]:
        """Visual tokens of an image of `visual_tokens` that enter the decoder layers before the stage with the ``?``."""
        index = self._to_solve()
        return Schedule(self.stages[:index]).layer_counts(layers, [visual_tokens])[: self.stages[index].layer]

    def _to_solve(self) -> int:
        """The stage whose keep a budget is to solve."""
        if sum(stage.keep is None for stage in self.stages) != 1:
            raise ScheduleError(f"a budget needs a schedule with exactly one '?', e.g. 'dart@2:?'; got '{self}'.")
        own = next((i for i, stage in enumerate(self.stages) if stage.keep == OWN), None)
        if own is not None:
            raise self._error(
                own, f"stage {own + 1} decides by itself how much it keeps, so no budget can be solved; give it a keep."
            )
        assert self.unknown is not None
        return self.unknown

    def _largest(
        self,
        index: int,
        n: int,
        in_tokens: bool,
        cost: Callable[[Schedule], Fraction | float],
        limit: Fraction | float,
        unmet: Callable[[Any, Any], str],
    ) -> Schedule:
        """The schedule whose stage `index` keeps most of `n` tokens at no more than `limit`."""
        grid = n if in_tokens else _FINE

        def filled(step: int) -> Schedule:
            stages = list(self.stages)
            stages[index] = replace(stages[index], keep=step if in_tokens else Decimal(step) / _FINE)
            return Schedule(tuple(stages))

        def steps(stage: Stage) -> Fraction:
            """The keep of a neighbouring stage on the grid: in tokens what it really asks for, rounding included."""
            if isinstance(stage.keep, Decimal) and not in_tokens:
                return Fraction(stage.keep) * grid
            return Fraction(stage.asked([n])[0], n) * grid

        high = grid if index == 0 else floor(steps(self.stages[index - 1]))
        low = 0 if index + 1 == len(self.stages) else ceil(steps(self.stages[index + 1]))
        bottom, top = low, high
        smallest, largest = (cost(filled(step)) for step in (low, high))
        if smallest > limit or largest < limit:
            raise self._error(index, unmet(smallest, largest))
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if cost(filled(middle)) <= limit else (low, middle - 1)
        # Several counts may leave the same tokens (DART's quotas): say the number that is really kept, where it may be
        # asked for beside the neighbouring stages, and asking for it leaves it (with recycling it would not).
        kept = filled(low).plan([n])
        if in_tokens and bottom <= kept[index][0] <= top and filled(kept[index][0]).plan([n]) == kept:
            low = kept[index][0]
        return filled(low)

    def _check_stage(self, i: int, stage: Stage) -> None:
        spec = stage.spec
        if stage.layer < spec.lowest_layer:
            message = (
                f"{stage.method} cannot act at layer {stage.layer}: it reads {spec.reads_text}, so its lowest layer is "
            )
            raise self._error(i, message + f"{spec.lowest_layer}.")
        if spec.highest_layer is not None and stage.layer > spec.highest_layer:
            message = f"{stage.method} cannot act at layer {stage.layer}: the layers at which it can act: "
            raise self._error(i, message + f"{spec.layers_text}.")
        if wrong := spec.refuses(stage.layer, dict(stage.options)):
            raise self._error(i, f"{stage.method} cannot act like that in stage {i + 1}: {wrong}.")
        if spec.drops_all and stage.keep != 0:
            raise self._error(i, f"{stage.method} drops every visual token; write '{stage.method}@{stage.layer}'.")
        if isinstance(stage.keep, Decimal) and not 0 <= stage.keep <= 1:
            hint = "a number of tokens ends in 't'"
            if stage.keep < 0:
                hint = "it cannot be negative"
            elif stage.keep == stage.keep.to_integral_value():
                hint = f"for a number of tokens write '{int(stage.keep)}t'"
            raise self._error(i, f"the ratio {stage.keep} in stage {i + 1} must lie in [0, 1]; {hint}.")
        if isinstance(stage.keep, int) and stage.keep < 0:
            raise self._error(i, f"the count {stage.keep} in stage {i + 1} must not be negative.")
        if i == 0:
            return
        before = self.stages[i - 1]
        if stage.layer <= before.layer:
            message = f"layers must increase: stage {i + 1} acts at layer {stage.layer}, stage {i} at {before.layer}."
            raise self._error(i, message)
        comparable = {type(stage.keep), type(before.keep)} in ({int}, {Decimal})
        if comparable and stage.keep > before.keep:  # type: ignore[operator]
            message = f"keeps never grow: stage {i + 1} keeps {print_keep(stage.keep)}, stage {i} only "
            raise self._error(i, message + f"{print_keep(before.keep)}.")

    def _error(self, i: int, message: str) -> ScheduleError:
        start = sum(len(str(stage)) + 1 for stage in self.stages[:i])
        return ScheduleError(message, str(self), (start, start + len(str(self.stages[i]))))


def cannot_be_met(budget: str | float, fixed: int, verb: str, alone: str, smallest: str, largest: str) -> str:
    """What is said of a budget that no keep meets.

    Args:
        budget: as it was given.
        fixed: where it is too small, the number of layers before the ``?``, which no keep changes; else 0.
        verb, alone: what these layers do to it by themselves, in words: "average", "36t".
        smallest, largest: what can be met.
    """
    layers = {0: "", 1: f"layer 0 alone {verb}s {alone}; "}.get(
        fixed, f"layers 0 to {fixed - 1} alone {verb} {alone}; "
    )
    return f"the budget {budget} cannot be met: {layers}the smallest possible is {smallest}, the largest {largest}."


def _parse_budget(budget: str | float, n: int, visual_tokens: int | None) -> tuple[Fraction, bool]:
    """The budget in average tokens of an image of `n`, and whether it was given in tokens."""
    text = str(budget).strip()
    above, slash, below = text.removesuffix("t").partition("/")
    number, parts = read_number(above), read_number(below) if slash else Decimal(1)
    if number is None or not parts:
        raise ScheduleError(f"budget '{text}' is neither tokens ('192t') nor a ratio of the original tokens ('0.5').")
    amount = Fraction(number) / Fraction(parts)
    if text.endswith("t"):
        if visual_tokens is None:
            message = (
                f"budget '{text}' is a number of tokens, but this model's images differ in size; give a ratio: 0.5."
            )
            raise ScheduleError(message)
        return amount, True
    if not 0 <= amount <= 1:
        raise ScheduleError(f"budget '{text}' is a ratio and must lie in [0, 1]; for tokens write '{text}t'.")
    return amount * n, False
