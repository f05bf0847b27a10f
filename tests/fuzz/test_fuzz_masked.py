"""Random schedules on random batches equal the reference that removes nothing; `random_schedules.py` runs as many as one likes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import random_schedules

CASES, FULL = 150, 1000
PARTS = 5


@pytest.fixture(scope="module")
def families(built: Callable[[str, Callable[[Path], object]], Path]) -> list:
    layers = random_schedules.LAYERS
    return random_schedules.loaded(
        {
            name: built(f"{name}-{layers}", partial(build, layers=layers))
            for name, build in random_schedules.BUILDERS.items()
        }
    )


@pytest.mark.parametrize("part", range(PARTS))
def test_pruned_rows_equal_the_masked_reference(families: list, part: int, full: bool) -> None:
    cases = (FULL if full else CASES) // PARTS
    failed, dropped, _ = random_schedules.compare(families, cases, part)
    assert failed == []
    assert dropped > cases / 2


def test_the_comparison_sees_what_was_dropped(families: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the reference is told of no dropped token, most cases differ from it."""
    monkeypatch.setattr(random_schedules, "dropped_columns", lambda *_: set())
    failed, _, _ = random_schedules.compare(families, 20, 0)
    assert len(failed) > 5
    assert all("off by" in one for one in failed)
