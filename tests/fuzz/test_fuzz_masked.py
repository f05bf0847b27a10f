"""Random schedules on random batches equal the reference that removes nothing; `random_schedules.py` runs as many as one likes."""

from __future__ import annotations

import pytest
import random_schedules

CASES = 1000
PARTS = 4


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> list:
    return random_schedules.build(tmp_path_factory.mktemp("masked"))


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_pruned_rows_equal_the_masked_reference(families: list, part: int) -> None:
    failed, dropped, _ = random_schedules.compare(families, CASES // PARTS, part)
    assert failed == []
    assert dropped > CASES // PARTS / 2


def test_the_comparison_sees_what_was_dropped(families: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the reference is told of no dropped token, most cases differ from it."""
    monkeypatch.setattr(random_schedules, "dropped_columns", lambda *_: set())
    failed, _, _ = random_schedules.compare(families, 20, 0)
    assert len(failed) > 5
    assert all("off by" in one for one in failed)
