"""Types of the miniature benchmarks' rows and columns."""

from __future__ import annotations

import random
from typing import Any

from datasets import Features, Sequence, Value

Rows = list[dict[str, Any]]
Configs = dict[str, dict[str, tuple[Rows, Features]]]  # configuration -> split -> rows and their columns


def seeded(seed: int, *names: str) -> random.Random:
    """A separate random generator for each `names`, so that a row does not depend on the rows drawn before it."""
    return random.Random("/".join((str(seed), *names)))


def schema(*strings: str, **others: Any) -> Features:
    """Column types: text for the columns in `strings`; `others` maps further columns to their types."""
    return Features({**{name: Value("string") for name in strings}, **others})


def texts() -> Sequence:
    """The type of a column whose values are lists of texts."""
    return Sequence(Value("string"))
