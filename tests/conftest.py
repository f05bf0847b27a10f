"""Fixtures for all tests: tiny checkpoints of both families, saved and loaded as real ones are."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import checked  # noqa: F401  (before the package, whose calls it checks)
import pytest
import torch
from built import Built, Checkpoint, Mirror, shared_folder
from flash_stand_in import ALL, Flash, flash_attention, is_installed
from forking import Forking
from hypothesis import settings
from tiny import LAYERS, Family, load

from lmms_prune.compat.installed import moved_names
from lmms_prune.leaderboard import benchmarks

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


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all random inputs and the soak, as in the nightly run")


def pytest_configure(config: pytest.Config) -> None:
    """The usual run draws the same inputs each time, so that a change fails by its own fault; `--full` draws new ones."""
    settings.register_profile("repeatable", derandomize=True, database=None)
    settings.register_profile("new inputs", print_blob=True)
    settings.load_profile("new inputs" if config.getoption("full") else "repeatable")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands in this process keep what they read away from the user's cache, and from other tests'."""
    folder = tmp_path_factory.getbasetemp() / "cache" / uuid4().hex
    monkeypatch.setattr("lmms_prune.leaderboard.cache.cache_folder", lambda: folder)


@pytest.fixture(autouse=True)
def _own_columns() -> Iterator[None]:
    """Columns that a test's results files add to the ten benchmarks are gone after it."""
    own = set(benchmarks.TASKS)
    yield
    for table in (benchmarks.TASKS, benchmarks.ORDER):
        for name in set(table) - own:
            del table[name]


@pytest.fixture(scope="session")
def full(pytestconfig: pytest.Config) -> bool:
    """Whether all random inputs are tried, rather than about fifty of each kind."""
    return pytestconfig.getoption("full")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    root = shared_folder(tmp_path_factory) / "built"
    root.mkdir(exist_ok=True)
    return Built(root)


@pytest.fixture(scope="session")
def checkpoint(built: Built) -> Checkpoint:
    return built.checkpoint


@pytest.fixture(scope="session")
def mirror(built: Built) -> Mirror:
    return built.mirror


@pytest.fixture(scope="session")
def environment(built: Built) -> dict[str, str]:
    """Of the commands that tests start: no network, one thread each, and one cache of the benchmarks for all of them."""
    dropped = {"LMMS_EVAL_DATASETS_CACHE", "HF_DATASETS_CACHE"}
    # Two test processes share two cores.
    ours = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    ours |= {"HF_HOME": str(built.root / "huggingface"), "HOME": str(built.root / "home")}
    return {**{name: value for name, value in os.environ.items() if name not in dropped}, **ours}


@pytest.fixture(scope="session")
def forking(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Iterator[Forking]:
    """Forks all commands of this test process that need no start-up of their own."""
    server = Forking(tmp_path_factory.mktemp("forks"), environment)
    yield server
    server.close()


@pytest.fixture(scope="session")
def folders(checkpoint: Checkpoint) -> dict[str, Path]:
    names = {"llava": "llava", "qwen": "qwen2_5_vl", "qwen2": "qwen2_vl", "qwen3": "qwen3_vl", "next": "llava_next"}
    return {name: checkpoint(family, layers=LAYERS) for name, family in names.items()}


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


INSTALLED = pytest.param("installed", marks=pytest.mark.gpu)


@pytest.fixture(scope="module", params=[INSTALLED if is_installed() else "stand-in"])
def flash(request: pytest.FixtureRequest) -> Iterator[Flash]:
    """FlashAttention 2 for a module's tests: the installed package where there is one with a GPU, else the stand-in."""
    real = request.param == "installed"
    with flash_attention(dtypes=ALL, real=real) as calls:
        yield Flash(calls, real)
