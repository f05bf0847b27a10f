"""Values of any type, and values that something has changed."""

from __future__ import annotations

from random import Random
from typing import Any

from hypothesis import strategies as st
from schedule_texts import NUMBERS

# What stands in a text, also where it should not: among it our own marks for quoted stretches.
PIECES = [
    ",",
    "=",
    ",,",
    "schedule=",
    "'",
    '"',
    "[",
    "]",
    "{a: 1}",
    "\0",
    "\x000\x00",
    "\x0099\x00",
    "\n",
    "auto",
    *NUMBERS,
]
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(PIECES)
    | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def changed(draw: Random, value: Any) -> Any:
    """A JSON value in which something, somewhere, is of another type, gone, or beyond all bounds."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        name = draw.choice(sorted(value))
        left = {key: one for key, one in value.items() if key != name}
        return left if draw.random() < 0.2 else {**left, name: changed(draw, value[name])}
    if isinstance(value, list) and value and draw.random() < 0.8:
        place = draw.randrange(len(value))
        return [*value[:place], changed(draw, value[place]), *value[place + 1 :]]
    other = [
        None,
        True,
        False,
        0,
        -1,
        1.5,
        10**400,
        float("nan"),
        float("inf"),
        -float("inf"),
        "",
        "x",
        "7",
        [],
        {},
        [[]],
        {"a": 1},
    ]
    return draw.choice(other)
