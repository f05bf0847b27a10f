"""What the arguments of public functions must be, checked by name at the door. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Integral, Real
from reprlib import repr as shortened
from typing import Any


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


def _whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes)) and all(map(of, value))


def _text(value: Any) -> bool:
    return isinstance(value, str)


WHOLE = Kind("a whole number", _whole)
FROM_ZERO = Kind("a whole number of at least 0", _whole, lambda value: value >= 0)
FROM_ONE = Kind("a whole number of at least 1", _whole, lambda value: value >= 1)
NUMBER = Kind("a number", lambda value: isinstance(value, (Real, Decimal)) and not isinstance(value, bool))
FLAG = Kind("True or False", lambda value: isinstance(value, bool))
TEXT = Kind("a text", _text)
TEXTS = Kind("a list of texts", lambda value: _list(value, _text))
TOKEN_COUNTS = Kind(
    "a list of whole numbers of at least 0 (the tokens of each image)",
    lambda value: _list(value, _whole),
    lambda value: all(count >= 0 for count in value),
)
PAIRS = Kind(
    "a tuple of (name, value) pairs",
    lambda value: (
        isinstance(value, tuple)
        and all(isinstance(pair, tuple) and len(pair) == 2 and _text(pair[0]) for pair in value)
    ),
)


def tuple_of(kind: type) -> Kind:
    """A tuple of objects of one class."""
    return Kind(
        f"a tuple of {kind.__name__} objects",
        lambda value: isinstance(value, tuple) and all(isinstance(entry, kind) for entry in value),
    )
