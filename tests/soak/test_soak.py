"""The short form of `soak.py`, which is run at length by hand: gross leaks and hooks that stay; with --full only."""

from __future__ import annotations

import pytest
from built import Checkpoint
from soak import families, soak

COUNT = 100


@pytest.mark.slow
def test_generations_leave_nothing_behind(checkpoint: Checkpoint, full: bool) -> None:
    if not full:
        pytest.skip("a hundred generations: pytest --full")
    found = soak(families(checkpoint), COUNT)
    assert found.hooks_left == 0
    # Without a leak a hundred small generations are lost in what the allocator does; a kept cache or trace is not.
    assert found.growth < 0.15, str(found)
