"""Random schedules on random batches equal the reference that removes nothing; `random_schedules.py` runs as many as one likes."""

from __future__ import annotations

import pytest
import random_schedules
from built import Checkpoint

PARTS = 2


@pytest.fixture(scope="module")
def families(checkpoint: Checkpoint) -> list:
    return random_schedules.families(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_pruned_rows_equal_the_masked_reference(families: list, part: int, full: bool) -> None:
    """150 cases in all, and 1,000 with --full; that every method is tried in every place is the certificate's."""
    cases = 500 if full else 75
    failed, dropped, _ = random_schedules.compare(families, cases, part)
    assert failed == []
    assert dropped > cases / 2


def test_the_comparison_sees_what_was_dropped(families: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the reference is told of no dropped token, most cases differ from it."""
    monkeypatch.setattr(random_schedules, "dropped_columns", lambda *_: set())
    failed, _, _ = random_schedules.compare(families, 20, 0)
    assert len(failed) > 5
    assert all("off by" in one for one in failed)
