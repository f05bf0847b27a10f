"""Sweeps, without evaluations and as processes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from forking import Forking
from sweeps import SCHEDULES, SECRETS, TASKS, Place, Processes, config


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    made = Processes()
    monkeypatch.setattr("lmms_prune.sweep.run.Worker", made)
    return made


@pytest.fixture(scope="session")
def place(
    tmp_path_factory: pytest.TempPathFactory, mirror: Callable[[int], Path], hf_home: Path, forking: Forking
) -> Place:
    configs = tmp_path_factory.mktemp("sweep") / "configs"
    configs.mkdir()
    for name, schedule in SCHEDULES.items():
        config(configs, name, schedule, ",".join(TASKS), batch_size=2)
    ours = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(hf_home), "OMP_NUM_THREADS": "1"}
    return Place(mirror(4), configs, {**os.environ, **ours, **SECRETS}, forking)
