"""Errors that several packages raise, and type checks of public functions' arguments. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from numbers import Integral
from os import PathLike
from reprlib import repr as shortened
from typing import Any


class ConfigError(ValueError):
    """A file is not a configuration of lmms-eval."""


class ScheduleError(ValueError):
    """A schedule that cannot be run; the message points into the text.

    Args:
        message: what is wrong.
        text: the complete schedule text.
        span: start and end of the fault in `text`; an empty span marks where something is missing.
    """

    def __init__(self, message: str, text: str = "", span: tuple[int, int] | None = None):
        self.text, self.span = text, span
        lines = [f"schedule: {_printable(message)}"]
        if span is not None:
            start, end = span
            lines += [f"    {_printable(text)}", "    " + " " * start + "^" * max(1, end - start)]
        super().__init__("\n".join(lines))


def _printable(text: str) -> str:
    """`text` on one line of the same length, so that the pointer below it is right despite line breaks and tabs."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text)


class OptionError(ValueError):
    """An option that a method does not have, or a value that it does not allow."""


class UnsupportedModelError(ValueError):
    """A model, or a way of running it, that is not supported; the message names the supported ones."""


class BrokenImageError(ValueError):
    """A prompt whose visual tokens do not form complete images."""


class PruningError(RuntimeError):
    """A way of running the model in which pruned tokens or their positions would be wrong, or a prefill in which they were."""


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The hint of an error about an unknown name: the closest known name, or else all known names."""
    near = get_close_matches(name.lower(), known, n=1)
    return f" Did you mean '{near[0]}'?" if near else f" Known: {', '.join(sorted(known))}."


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Args:
        words: for messages.
        holds: whether a value's type is right.
        within: whether a value of the right type is allowed.
    """

    words: str
    holds: Callable[[Any], bool]
    within: Callable[[Any], bool] = lambda _: True


def optional(kind: Kind) -> Kind:
    """`kind`, or None."""
    return Kind(
        f"{kind.words}, or None",
        lambda value: value is None or kind.holds(value),
        lambda value: value is None or kind.within(value),
    )


def expect(**arguments: tuple[Any, Kind]) -> None:
    """Check values by the names of the arguments, each with its kind.

    Raises:
        TypeError: one is of another type.
        ValueError: one is of that type, but not allowed.
    """
    for name, (value, kind) in arguments.items():
        message = f"{name}={shortened(value)} must be {kind.words}."
        if not kind.holds(value):
            raise TypeError(message)
        if not kind.within(value):
            raise ValueError(message)


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and all(map(of, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_path(value: Any) -> bool:
    return isinstance(value, (str, PathLike))


def several(value: Any, alone: type | tuple[type, ...]) -> list[Any]:
    """Return the list behind an argument that may also be a single value, which is of a type in `alone`; no check of its elements."""
    return [value] if isinstance(value, alone) or not isinstance(value, Iterable) else list(value)


WHOLE = Kind("a whole number", _is_integer)
FROM_ZERO = Kind("a whole number of at least 0", _is_integer, lambda value: value >= 0)
FROM_ONE = Kind("a whole number of at least 1", _is_integer, lambda value: value >= 1)
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
TEXT = Kind("a text", _is_text)
TEXTS = Kind("a list of texts", lambda value: _is_list(value, _is_text))
PATH = Kind("a path", _is_path, lambda value: str(value) != "")
PATHS = Kind(
    "a path or a list of paths",
    lambda value: _is_list(value, _is_path),
    lambda value: len(value) > 0 and all(map(PATH.within, value)),
)
TOKEN_COUNTS = Kind(
    "a list of whole numbers of at least 0 (the tokens of each image)",
    lambda value: _is_list(value, _is_integer),
    lambda value: all(count >= 0 for count in value),
)
PAIRS = Kind(
    "a tuple of (name, value) pairs",
    lambda value: (
        isinstance(value, tuple)
        and all(isinstance(pair, tuple) and len(pair) == 2 and _is_text(pair[0]) for pair in value)
    ),
)


def tuple_of(kind: type) -> Kind:
    """A tuple of objects of one class."""
    return Kind(
        f"a tuple of {kind.__name__} objects",
        lambda value: isinstance(value, tuple) and all(isinstance(entry, kind) for entry in value),
    )
