"""Sweeps, without evaluations and as processes."""

from __future__ import annotations

import pytest
from built import Mirror
from forking import Forking
from sweeps import SCHEDULES, SECRETS, TASKS, Place, Processes, config


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    stand_in = Processes()
    monkeypatch.setattr("lmms_prune.sweep.run.Worker", stand_in)
    return stand_in


@pytest.fixture(scope="session")
def place(
    tmp_path_factory: pytest.TempPathFactory, mirror: Mirror, environment: dict[str, str], forking: Forking
) -> Place:
    configs = tmp_path_factory.mktemp("sweep") / "configs"
    configs.mkdir()
    for name, schedule in SCHEDULES.items():
        config(configs, name, schedule, ",".join(TASKS), batch_size=2)
    return Place(mirror(), configs, {**environment, **SECRETS}, forking)
