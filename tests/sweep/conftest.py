"""Sweeps without evaluations."""

from __future__ import annotations

import pytest
from sweeps import Processes


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    made = Processes()
    monkeypatch.setattr("lmms_prune.sweep.run.Worker", made)
    return made
