"""Rows and column types of the miniature benchmarks."""

from __future__ import annotations

import random
from typing import Any

from datasets import Features, Sequence, Value

Rows = list[dict[str, Any]]
Configs = dict[str, dict[str, tuple[Rows, Features]]]  # configuration -> split -> rows and their columns


def seeded(seed: int, *names: str) -> random.Random:
    """A generator of its own for each `names`, so that rows do not depend on how many were drawn before them."""
    return random.Random("/".join((str(seed), *names)))


def schema(*strings: str, **others: Any) -> Features:
    """Column types: text for the names in `strings`, and the given type for `others`."""
    return Features({**{name: Value("string") for name in strings}, **others})


def texts() -> Sequence:
    """The type of a column that holds a list of texts."""
    return Sequence(Value("string"))
