"""Parsing of schedule texts, with errors that point into the text.

schedule := stage ("," stage)*
stage    := method "@" layer [":" keep] (";" option "=" value)* [";per=tile"]
keep     := ratio in [0, 1] of the original visual tokens | a number of tokens "252t" | "?"
            (omitted if the method drops everything, or for an adaptive keep)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from typing import Any

from lmms_prune.errors import OptionError, ScheduleError, did_you_mean
from lmms_prune.methods import METHODS, MethodSpec
from lmms_prune.methods.reference import FORMS, Reference, entry_points, is_reference
from lmms_prune.methods.spec import Option, print_option, unread_spec
from lmms_prune.schedule.stage import ADAPTIVE, PER, Keep, Stage

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
# No model has so many layers or tokens, and no ratio so many decimals: longer numbers are mistakes, and slow to compute.
_DIGITS = 28
_PER = Option("per", PER[0], "what the keep holds for", PER)
_WHOLE = re.compile(rf"[0-9]{{1,{_DIGITS}}}")


def read_stages(text: str) -> tuple[Stage, ...]:
    """The stages of a schedule text.

    Raises:
        ScheduleError: points at the fault.
    """
    return _Parser(text).stages()


def text_of(value: Any) -> str:
    """The schedule text for a value of a command line or a YAML file.

    Raises:
        ScheduleError: it is neither a text nor a list of stages.
    """
    if isinstance(value, str) and re.fullmatch(r"\[.*\]", value.strip()):
        value = [stage.strip(" '\"") for stage in value.strip()[1:-1].split(",")]
    if isinstance(value, Mapping):
        value = [value]
    if isinstance(value, (list, tuple)) and all(isinstance(stage, (str, Mapping)) for stage in value):
        return ",".join(stage.strip() if isinstance(stage, str) else _stage_text(stage) for stage in value)
    if not isinstance(value, str):
        raise ScheduleError(f"{value!r} is neither a text nor a list of stages such as 'dart@2:0.44'.")
    return value.strip()


def _stage_text(stage: Mapping[Any, Any]) -> str:
    """The text of a stage that a YAML file states as a mapping."""
    options = dict(stage)
    method, layer, keep = (options.pop(name, None) for name in ("method", "layer", "keep"))
    if method is None or layer is None:
        raise ScheduleError(f"the stage {dict(stage)!r} lacks its method or its layer; write e.g. 'dart@2:0.44'.")
    text = f"{method}@{layer}" + ("" if keep is None else f":{keep}")
    return text + "".join(f";{name}={print_option(value)}" for name, value in options.items())


def read_number(text: str) -> Decimal | None:
    """The number in `text`, with at most _DIGITS digits before and after the point; None if there is none."""
    try:
        value = Decimal(text if text.isascii() and "_" not in text else "")
    except InvalidOperation:
        return None
    if not value:
        return Decimal(0)  # whatever its sign and exponent
    within = value.is_finite() and value.adjusted() < _DIGITS and int(value.as_tuple().exponent) >= -_DIGITS
    return value if within else None


def read_keep(value: float | Decimal | int | str | None, spec: MethodSpec) -> Keep:
    """The keep of a stage that is built in Python; see `lmms_prune.stage`."""
    if isinstance(value, float):
        value = Decimal(repr(value))
    if isinstance(value, (int, Decimal)):
        return 0 if spec.drops_all and not value else value
    return _Parser("" if value is None else value).keep(value or "", spec, 1, 0, value is not None)


class _Parser:
    """Parses one schedule text, keeping the offset of each piece so that errors can point at it."""

    def __init__(self, text: str):
        self.text = text

    def stages(self) -> tuple[Stage, ...]:
        stages, start = [], 0
        for number, part in enumerate(self.text.split(","), 1):
            stages.append(self.stage(part, start, number))
            start += len(part) + 1
        return tuple(stages)

    def error(self, message: str, start: int, piece: str) -> ScheduleError:
        return ScheduleError(message, self.text, (start, start + len(piece)))

    def stage(self, part: str, start: int, number: int) -> Stage:
        start += len(part) - len(part.lstrip())
        part = part.strip()
        head, *options = part.split(";")
        written, at, layer_and_keep = head.partition("@")
        if not at or not (_NAME.fullmatch(written) or is_reference(written)):
            hint = f" One of your own: {FORMS}; its path has no comma, semicolon or @." if ".py" in self.text else ""
            raise self.error(f"stage {number} is '{part}'; a stage looks like 'dart@2:0.44'.{hint}", start, part)
        if ".py" in layer_and_keep.partition(";")[0]:
            raise self.error(f"stage {number}: the path of a method's file must not have an @; rename it.", start, head)
        name, spec = self.method(written, number, start)
        layer, colon, keep = layer_and_keep.partition(":")
        layer_start = start + len(written) + 1
        if not _WHOLE.fullmatch(layer):
            raise self.error(f"the layer '{layer}' in stage {number} must be a whole number.", layer_start, layer)
        keep_start = layer_start + len(layer) + 1
        stage_keep = self.keep(keep, spec, number, keep_start, bool(colon))
        pairs: dict[str, object] = {}
        option_start = start + len(head) + 1
        for option in options:
            option_name, value = self.option(option, spec, option_start)
            if option_name in pairs:
                raise self.error(f"stage {number} names the option '{option_name}' twice.", option_start, option)
            pairs[option_name] = value
            option_start += len(option) + 1
        per = str(pairs.pop("per", PER[0]))
        return Stage(name, int(layer), stage_keep, tuple(pairs.items()), per)

    def method(self, written: str, number: int, start: int) -> tuple[str, MethodSpec]:
        """The method's name and what is known of it; what an entry point stands for is written in full."""
        if written in METHODS:
            return written, METHODS[written]
        if not is_reference(written) and written not in entry_points():
            hint = did_you_mean(written, [*METHODS, *entry_points()])
            raise self.error(f"unknown method '{written}' in stage {number}.{hint}", start, written)
        try:
            name = str(Reference.read(entry_points().get(written, written)))
        except OptionError as error:
            raise self.error(f"stage {number}: {error}", start, written) from None
        return name, unread_spec(name)

    def keep(self, text: str, spec: MethodSpec, number: int, start: int, has_keep: bool) -> Keep:
        if not has_keep:
            if spec.drops_all:
                return 0
            if spec.keep == "optional":
                return ADAPTIVE
            message = f"stage {number} does not say how much {spec.name} keeps; write e.g. '{spec.example}'."
            raise self.error(message, start - 1, "")
        if text == "?":
            if spec.drops_all:
                raise self.error(
                    f"{spec.name} takes no keep, so there is nothing to solve; write '{spec.example}'.", start, text
                )
            return None
        count = text.endswith("t") and _WHOLE.fullmatch(text[:-1])
        value = int(text[:-1]) if count else read_number(text)
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
            if name == "per":
                return name, _PER.read(value)
            return name, spec.option(name, value)
        except OptionError as error:
            raise self.error(str(error), start, text) from None
