"""The short form of `soak.py`, which is run at length by hand: gross leaks and hooks that stay."""

from __future__ import annotations

import pytest
from soak import build, soak

COUNT = 100


@pytest.mark.full
def test_generations_leave_nothing_behind(tmp_path) -> None:
    found = soak(build(tmp_path), COUNT)
    assert found.hooks_left == 0
    # Without a leak a hundred small generations are lost in what the allocator does; a kept cache or trace is not.
    assert found.growth < 0.15, str(found)
