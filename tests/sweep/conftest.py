"""Sweeps, without evaluations and as processes."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from forking import Forking
from sweeps import SCHEDULES, SECRETS, TASKS, Place, Processes, config


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Processes:
    made = Processes()
    monkeypatch.setattr("lmms_prune.sweep.run.Worker", made)
    return made


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    from lmms_prune.demo.benchmarks import build_mirror

    root = tmp_path_factory.mktemp("sweep")
    (root / "configs").mkdir()
    for name, schedule in SCHEDULES.items():
        config(root / "configs", name, schedule, ",".join(TASKS), batch_size=2)
    ours = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "hf"), "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **ours, **SECRETS}
    forking = Forking(root / "socket", environment)
    yield Place(build_mirror(root / "mirror", rows=4), root / "configs", environment, forking)
    forking.close()
