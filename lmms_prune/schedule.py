"""Schedules: which method acts at which decoder layer and how many visual tokens it keeps.

The text form has its only home here::

    schedule := stage ("," stage)*
    stage    := method "@" layer [":" keep] (";" option "=" value)*
    keep     := ratio in [0, 1] of the original visual tokens | a number of tokens "252t" | "?"
                (left out where the method drops everything, or decides by itself how much it keeps)

Nothing in this module needs torch, so a schedule can be checked in milliseconds.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from decimal import ROUND_HALF_EVEN, Decimal, InvalidOperation
from difflib import get_close_matches
from fractions import Fraction
from math import ceil, floor
from typing import Any, Final, Literal, TypeAlias

from lmms_prune.expected import (
    FROM_ONE,
    FROM_ZERO,
    NUMBER,
    PAIRS,
    TEXT,
    TOKEN_COUNTS,
    Kind,
    expect,
    optional,
    tuple_of,
)
from lmms_prune.methods import METHODS, MethodSpec, OptionError
from lmms_prune.presets import PRESETS

OWN: Final = "own"
Keep: TypeAlias = Decimal | int | Literal["own"] | None
"""How much a stage keeps: a Decimal is a ratio, an int a number of tokens, None the unknown ``?``, OWN the method's own rule."""

_KEEP = Kind(
    "a ratio as a Decimal, a number of tokens as an int, None (the unknown) or OWN",
    lambda keep: keep is None or keep == OWN or (isinstance(keep, (Decimal, int)) and not isinstance(keep, bool)),
)
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# A ratio budget for images of any size is solved on an image of this many tokens, that is to four decimals.
_FINE = 10_000
# No model has so many layers or tokens, and no ratio so many decimals; what is longer is a mistake, and slow to compute with.
_DIGITS = 28
_WHOLE = re.compile(rf"[0-9]{{1,{_DIGITS}}}")


class ScheduleError(ValueError):
    """A schedule that cannot be run; the message points at the place in the text.

    Args:
        message: what is wrong.
        text: the whole schedule.
        span: where in `text`, from and up to; an empty span is where something is missing.
    """

    def __init__(self, message: str, text: str = "", span: tuple[int, int] | None = None):
        self.text, self.span = text, span
        lines = [f"schedule: {_printable(message)}"]
        if span is not None:
            start, end = span
            lines += [f"    {_printable(text)}", "    " + " " * start + "^" * max(1, end - start)]
        super().__init__("\n".join(lines))


def _printable(text: str) -> str:
    """`text` on one line, as long as it was: a line break or a tab would lead the pointer astray."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The hint of an error about an unknown name: a suggestion if one is near, else all that is known."""
    near = get_close_matches(name.lower(), known, n=1)
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(sorted(known))}."


@dataclass(frozen=True)
class Stage:
    """One pruning step: `method` acts on the input of 0-based decoder layer `layer` and keeps `keep`.

    Args:
        method: a name of `METHODS`.
        layer: the first `layer` decoder layers see the tokens as they were; 0 is before the decoder.
        keep: a ratio of the original visual tokens (Decimal), a number of tokens (int), or None for an unknown that `Schedule.solve` finds. Methods that drop everything take 0, methods with a count rule of their own may take OWN.
        options: the method's own options as (name, value) pairs, defaults left out.
    """

    method: str
    layer: int
    keep: Keep
    options: tuple[tuple[str, object], ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.keep, float):
            raise ScheduleError(f"a ratio is a Decimal, so that it is exact: write Decimal('{self.keep}').")
        expect(
            method=(self.method, TEXT),
            layer=(self.layer, FROM_ZERO),
            keep=(self.keep, _KEEP),
            options=(self.options, PAIRS),
        )
        if self.spec.drops_all and self.keep == 0:
            object.__setattr__(self, "keep", 0)
        if self.keep == OWN and self.spec.keep != "optional":
            raise ScheduleError(f"{self.method} has no count rule of its own; say how much it keeps.")
        names = [name for name, _ in self.options]
        if len(set(names)) < len(names):
            raise ScheduleError(f"stage '{self.method}@{self.layer}' names an option twice: {', '.join(names)}.")
        for name, value in self.options:
            self._check_option(name, value)
        defaults = {option.name: option.default for option in self.spec.options}
        kept = tuple(sorted((k, v) for k, v in self.options if defaults.get(k) != v))
        object.__setattr__(self, "options", kept)

    def _check_option(self, name: str, value: object) -> None:
        """An option must be one that can be written, or the stage's text would say something else."""
        try:
            read = self.spec.option(name, _print_option(value))
        except OptionError as error:
            raise ScheduleError(str(error)) from None
        if read != value or isinstance(read, bool) != isinstance(value, bool):
            raise ScheduleError(f"{self.method}: the option {name}={value!r} is not what its text says: {read!r}.")

    @property
    def spec(self) -> MethodSpec:
        if self.method not in METHODS:
            raise ScheduleError(f"unknown method '{self.method}'.{did_you_mean(self.method, list(METHODS))}")
        return METHODS[self.method]

    def __str__(self) -> str:
        text = f"{self.method}@{self.layer}"
        if not self.spec.drops_all and self.keep != OWN:
            text += f":{_print_keep(self.keep)}"
        return text + "".join(f";{name}={_print_option(value)}" for name, value in self.options)

    @property
    def at_most(self) -> bool:
        """Whether the stage may keep fewer tokens than planned; how many is known only when it has run."""
        return self.keep == OWN or self.spec.at_most

    def asked(self, images: Sequence[int]) -> list[int]:
        """Tokens asked for in each image, given the images' original token counts; all where the method decides."""
        if self.keep == OWN:
            return list(images)
        if self.keep is None:
            raise ScheduleError(f"the unknown '?' of stage '{self}' was not solved. Give a budget, e.g. budget=192t.")
        if isinstance(self.keep, int):
            return share(min(self.keep, sum(images)), images)
        return [int((self.keep * n).to_integral_value(ROUND_HALF_EVEN)) for n in images]

    def kept(self, images: Sequence[int], present: Sequence[int]) -> list[int]:
        """Tokens this stage leaves in each image, of the `present` ones, by the method's count rule (`at_most`: or fewer)."""
        options = dict(self.options)
        return [
            n if asked >= n else min(n, self.spec.count(asked, n, options))
            for asked, n in zip(self.asked(images), present, strict=True)
        ]


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
        return _Parser(text).schedule()

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
            message = f"keeps never grow: stage {i + 1} keeps {_print_keep(stage.keep)}, stage {i} only "
            raise self._error(i, message + f"{_print_keep(before.keep)}.")

    def _error(self, i: int, message: str) -> ScheduleError:
        start = sum(len(str(stage)) + 1 for stage in self.stages[:i])
        return ScheduleError(message, str(self), (start, start + len(str(self.stages[i]))))


def share(total: int, sizes: Sequence[int]) -> list[int]:
    """Share `total` tokens out among images in proportion to their `sizes`: largest remainders first, then order.

    As with any such rule, one token more in all can be one less for a small image.
    """
    if not sum(sizes):
        return [0] * len(sizes)
    exact = [Fraction(total * size, sum(sizes)) for size in sizes]
    shares = [int(part) for part in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


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


def _number(text: str) -> Decimal | None:
    """The number that `text` is, of at most _DIGITS digits before and behind the point; None if it is none."""
    try:
        value = Decimal(text if text.isascii() and "_" not in text else "")
    except InvalidOperation:
        return None
    if not value:
        return Decimal(0)  # whatever its sign and exponent
    within = value.is_finite() and value.adjusted() < _DIGITS and int(value.as_tuple().exponent) >= -_DIGITS
    return value if within else None


def _print_keep(keep: Keep) -> str:
    if keep is None:
        return "?"
    assert keep != OWN
    return f"{keep}t" if isinstance(keep, int) else f"{keep.normalize():f}"


def _print_option(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parse_budget(budget: str | float, n: int, visual_tokens: int | None) -> tuple[Fraction, bool]:
    """The budget in average tokens of an image of `n`, and whether it was given in tokens."""
    text = str(budget).strip()
    above, slash, below = text.removesuffix("t").partition("/")
    number, parts = _number(above), _number(below) if slash else Decimal(1)
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


class _Parser:
    """Reads one schedule text, remembering where each piece stands so that errors can point."""

    def __init__(self, text: str):
        self.text = text

    def schedule(self) -> Schedule:
        stages, start = [], 0
        for number, part in enumerate(self.text.split(","), 1):
            stages.append(self.stage(part, start, number))
            start += len(part) + 1
        return Schedule(tuple(stages))

    def error(self, message: str, start: int, piece: str) -> ScheduleError:
        return ScheduleError(message, self.text, (start, start + len(piece)))

    def stage(self, part: str, start: int, number: int) -> Stage:
        start += len(part) - len(part.lstrip())
        part = part.strip()
        head, *options = part.split(";")
        name, at, place = head.partition("@")
        if not at or not _NAME.fullmatch(name):
            raise self.error(f"stage {number} is '{part}'; a stage looks like 'dart@2:0.44'.", start, part)
        if name not in METHODS:
            hint = did_you_mean(name, list(METHODS))
            raise self.error(f"unknown method '{name}' in stage {number}.{hint}", start, name)
        layer, colon, keep = place.partition(":")
        at_layer = start + len(name) + 1
        if not _WHOLE.fullmatch(layer):
            raise self.error(f"the layer '{layer}' in stage {number} must be a whole number.", at_layer, layer)
        at_keep = at_layer + len(layer) + 1
        value = self.keep(keep, METHODS[name], number, at_keep, bool(colon))
        pairs: dict[str, object] = {}
        at_option = start + len(head) + 1
        for option in options:
            named, said = self.option(option, METHODS[name], at_option)
            if named in pairs:
                raise self.error(f"stage {number} names the option '{named}' twice.", at_option, option)
            pairs[named] = said
            at_option += len(option) + 1
        return Stage(name, int(layer), value, tuple(pairs.items()))

    def keep(self, text: str, spec: MethodSpec, number: int, start: int, given: bool) -> Keep:
        if not given:
            if spec.drops_all:
                return 0
            if spec.keep == "optional":
                return OWN
            message = f"stage {number} does not say how much {spec.name} keeps; write e.g. '{spec.example}'."
            raise self.error(message, start - 1, "")
        if text == "?":
            if spec.drops_all:
                raise self.error(
                    f"{spec.name} takes no keep, so there is nothing to solve; write '{spec.example}'.", start, text
                )
            return None
        count = text.endswith("t") and _WHOLE.fullmatch(text[:-1])
        value = int(text[:-1]) if count else _number(text)
        if value is None:
            message = f"the keep '{text}' in stage {number} is neither a ratio (0.44), a count (252t) nor '?'."
            raise self.error(message, start, text)
        if spec.drops_all and value != 0:
            raise self.error(
                f"{spec.name} drops every visual token and takes no keep; write '{spec.example}'.", start, text
            )
        return 0 if spec.drops_all else value

    def option(self, text: str, spec: MethodSpec, start: int) -> tuple[str, object]:
        name, equals, value = (part.strip() for part in text.partition("="))
        try:
            if not equals:
                raise OptionError(f"the option '{text}' of {spec.name} has no value; write name=value.")
            return name, spec.option(name, value)
        except OptionError as error:
            raise self.error(str(error), start, text) from None
