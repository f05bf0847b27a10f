"""One stage of a schedule: which method acts, at the input of which decoder layer, keeping how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from lmms_prune.errors import FROM_ZERO, PAIRS, TEXT, Kind, OptionError, ScheduleError, did_you_mean, expect
from lmms_prune.methods import METHODS, MethodSpec
from lmms_prune.methods.reference import Reference, is_reference
from lmms_prune.methods.spec import print_option, unread_spec

if TYPE_CHECKING:
    from lmms_prune.methods.base import Method

ADAPTIVE: Final = "adaptive"
Keep: TypeAlias = Decimal | int | Literal["adaptive"] | None
"""How much a stage keeps: a Decimal is a ratio, an int a number of tokens, None the unknown ``?``; with ADAPTIVE the method's rule decides."""

PER: Final = ("image", "tile")
"""What a stage's keep holds for: each image, or each tile of an image (each image where a family has no tiles)."""

_KEEP = Kind(
    "a ratio as a Decimal, a number of tokens as an int, None (the unknown) or ADAPTIVE",
    lambda keep: keep is None or keep == ADAPTIVE or (isinstance(keep, (Decimal, int)) and not isinstance(keep, bool)),
)


@dataclass(frozen=True)
class Stage:
    """One pruning step: `method` acts on the input of 0-based decoder layer `layer` and keeps `keep`.

    Args:
        method: a name of `METHODS`, or where a method of one's own is: ``file.py:Class``, ``package.module:Class``.
        layer: the first `layer` decoder layers see the unpruned tokens; 0 is before the decoder.
        keep: a ratio of the original visual tokens (Decimal), a number of tokens (int), or None for an unknown that
            `Schedule.solve` finds. Methods that drop everything take 0; methods that can decide the count may take ADAPTIVE.
        options: the method's own options as (name, value) pairs, defaults left out. Those of a method of one's own are
            texts, because their types are not known before its code has run.
        per: what the keep holds for, and what the method sees as one image: one of `PER`.
        row: what the class of a method of one's own says of itself, once it was imported; None before.
    """

    method: str
    layer: int
    keep: Keep
    options: tuple[tuple[str, object], ...] = ()
    per: str = PER[0]
    row: MethodSpec | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if isinstance(self.keep, float):
            raise ScheduleError(f"a ratio is a Decimal, so that it is exact: write Decimal('{self.keep}').")
        expect(
            method=(self.method, TEXT),
            layer=(self.layer, FROM_ZERO),
            keep=(self.keep, _KEEP),
            options=(self.options, PAIRS),
            per=(self.per, TEXT),
        )
        if self.per not in PER:
            raise ScheduleError(f"stage '{self.method}@{self.layer}': per={self.per}: allowed are {' and '.join(PER)}.")
        if self.spec.drops_all and self.keep == 0:
            object.__setattr__(self, "keep", 0)
        if self.keep == ADAPTIVE and self.spec.keep != "optional":
            raise ScheduleError(f"{self.method} has no count rule of its own; say how much it keeps.")
        names = [name for name, _ in self.options]
        if len(set(names)) < len(names):
            raise ScheduleError(f"stage '{self.method}@{self.layer}' names an option twice: {', '.join(names)}.")
        for name, value in self.options:
            self._check_option(name, value)
        defaults: dict[str, object] = {option.name: option.default for option in self.spec.options}
        if self.spec.own:
            defaults = {name: print_option(value) for name, value in defaults.items()}
        kept = tuple(sorted((k, v) for k, v in self.options if defaults.get(k) != v))
        object.__setattr__(self, "options", kept)

    def _check_option(self, name: str, value: object) -> None:
        """Refuse a value that the stage's text cannot express, because reading the text back would give another stage."""
        try:
            parsed = self.spec.option(name, print_option(value))
        except OptionError as error:
            raise ScheduleError(str(error)) from None
        if self.spec.own:
            parsed = print_option(parsed) if isinstance(value, str) else parsed
            if not isinstance(value, str):
                raise ScheduleError(f"{self.method}: the option {name}={value!r} must be a text, or use `stage(…)`.")
        if parsed != value or isinstance(parsed, bool) != isinstance(value, bool):
            raise ScheduleError(f"{self.method}: the option {name}={value!r} is not what its text says: {parsed!r}.")

    @property
    def spec(self) -> MethodSpec:
        if self.row is not None:
            return self.row
        if is_reference(self.method):
            try:
                return unread_spec(str(Reference.read(self.method)))
            except OptionError as error:
                raise ScheduleError(str(error)) from None
        if self.method not in METHODS:
            raise ScheduleError(f"unknown method '{self.method}'.{did_you_mean(self.method, list(METHODS))}")
        return METHODS[self.method]

    def __str__(self) -> str:
        text = f"{self.method}@{self.layer}"
        if not self.spec.drops_all and self.keep != ADAPTIVE:
            text += f":{print_keep(self.keep)}"
        text += "".join(f";{name}={print_option(value)}" for name, value in self.options)
        return text if self.per == PER[0] else f"{text};per={self.per}"

    @property
    def portable(self) -> Stage:
        """The stage with the file of its method, if it has one, named without its folder."""
        return replace(self, method=str(Reference.read(self.method).short)) if self.spec.own else self

    @property
    def absolute(self) -> Stage:
        """The stage with the file of its method, if it has one, named by its absolute path."""
        if not self.spec.own:
            return self
        try:
            return replace(self, method=str(Reference.read(self.method).absolute))
        except OptionError as error:
            raise ScheduleError(str(error)) from None

    @property
    def file(self) -> Path | None:
        """The file with the code of a method of one's own, found without importing it; None for built-in methods."""
        return Reference.read(self.method).file if self.spec.own else None

    @property
    def at_most(self) -> bool:
        """Whether the stage may keep fewer tokens than planned; the number is known only after it has run."""
        return self.keep == ADAPTIVE or self.spec.at_most

    def undefined_on_tiles(self, title: str) -> str:
        """Why the stage is not defined for the model `title`, which encodes an image in tiles; "" if it is."""
        reason = self.spec.undefined_on_tiles(self.layer, dict(self.options))
        return f"'{self}' is not defined for {title}, which encodes an image in tiles: {reason}." if reason else ""

    def requested(self, images: Sequence[int]) -> list[int]:
        """Tokens requested in each image (or tile), from their original token counts; all tokens if the keep is adaptive."""
        if self.keep == ADAPTIVE:
            return list(images)
        if self.keep is None:
            raise ScheduleError(f"the unknown '?' of stage '{self}' was not solved. Give a budget, e.g. budget=192t.")
        if isinstance(self.keep, int):
            return share(min(self.keep, sum(images)), images)
        return [int((self.keep * n).to_integral_value(ROUND_HALF_EVEN)) for n in images]

    def kept(self, images: Sequence[int], present: Sequence[int]) -> list[int]:
        """Tokens that this stage keeps in each image (or tile), of the `present` ones, by the method's count rule.

        With `at_most` they may be fewer.
        """
        options = dict(self.options)
        return [
            n if requested >= n else min(n, self.spec.count(requested, n, options))
            for requested, n in zip(self.requested(images), present, strict=True)
        ]


def stage(
    method: Method | str, layer: int, keep: float | Decimal | int | str | None = None, per: str = PER[0]
) -> Stage:
    """A stage in Python: `method` acts on the input of decoder layer `layer`.

    Args:
        method: a method object, such as ``MyMethod(alpha=2.0)``, or a name as in a schedule text.
        layer: as in `Stage`.
        keep: a ratio (0.3), a number of tokens (192 or "192t"), "?" (solved from a budget); None where the method takes no
            keep, or decides by itself.
        per: as in `Stage`.

    Raises:
        ScheduleError: the stage cannot be written as a text, or the method's class is not usable; see the message.
    """
    from lmms_prune.schedule.text import read_keep

    options: tuple[tuple[str, object], ...] = ()
    row = None
    if isinstance(method, str):
        name = method
    else:
        from lmms_prune.methods.own import name_of, options_of, spec_of

        try:
            name, options = name_of(method), options_of(method)
            row = spec_of(type(method), name) if is_reference(name) else None
        except OptionError as error:
            raise ScheduleError(str(error)) from None
    spec = row or Stage(name, layer, 0).spec
    if row is not None:
        options = tuple((option, print_option(value)) for option, value in options)
    return Stage(name, layer, read_keep(keep, spec), options, per, row)


def share(total: int, sizes: Sequence[int]) -> list[int]:
    """Distribute `total` tokens among images in proportion to their `sizes`: largest remainders first, then order.

    As with any such rule, a larger total can give a small image one token less.
    """
    if not sum(sizes):
        return [0] * len(sizes)
    exact = [Fraction(total * size, sum(sizes)) for size in sizes]
    shares = [int(part) for part in exact]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (shares[i] - exact[i], i))
    for i in by_remainder[: total - sum(shares)]:
        shares[i] += 1
    return shares


def print_keep(keep: Keep) -> str:
    """A keep as written in a schedule text."""
    if keep is None:
        return "?"
    assert keep != ADAPTIVE
    return f"{keep}t" if isinstance(keep, int) else f"{keep.normalize():f}"
