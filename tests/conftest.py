"""Fixtures for all tests: tiny checkpoints of both families, saved and loaded as real ones are."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import LAYERS, Family, load

from lmms_prune.compat.installed import moved_names
from lmms_prune.demo.checkpoints import build_llava, build_qwen2_5_vl

# Processes that tests start find sitecustomize.py there.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).with_name("site")), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# Tiny matrices gain nothing from threads, and several test processes would fight over the cores.
torch.set_num_threads(1)


def pytest_sessionstart(session: pytest.Session) -> None:
    """A library that has moved a name is named in one line, before hundreds of tests fail for it."""
    if hasattr(session.config, "workerinput"):
        return  # the process that started this worker has looked
    if moved := moved_names():
        pytest.exit("\n".join(moved), returncode=1)


def pytest_collection_finish() -> None:
    """What has been imported stays: the collector, which lmms-eval calls in every run, need not visit it each time."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {
        "llava": build_llava(root / "llava", layers=LAYERS),
        "qwen": build_qwen2_5_vl(root / "qwen", layers=LAYERS),
    }


@pytest.fixture(scope="session")
def loaded(folders: dict[str, Path]) -> Callable[..., Family]:
    """Loads a family once for each dtype and attention kernel."""
    cache: dict[tuple, Family] = {}

    def get(name: str, dtype: torch.dtype = torch.float64, attention: str = "sdpa") -> Family:
        key = (name, dtype, attention)
        if key not in cache:
            cache[key] = load(name, folders[name], dtype, attention)
        return cache[key]

    return get


@pytest.fixture(params=["llava", "qwen"])
def family(request: pytest.FixtureRequest, loaded: Callable[..., Family]) -> Family:
    """Each family in turn, in float64 under SDPA."""
    return loaded(request.param)
