"""Fixtures for all tests: tiny checkpoints of both families, saved and loaded as real ones are."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from forking import Forking
from tiny import LAYERS, Family, load

from lmms_prune.compat.installed import moved_names
from lmms_prune.demo.checkpoints import build_llava, build_qwen2_5_vl

# Processes that tests start find sitecustomize.py there.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(Path(__file__).with_name("site")), *filter(None, [os.environ.get("PYTHONPATH")])]
)
# Tiny matrices gain nothing from threads, and several test processes would fight over the cores.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="Also what takes long: more random inputs and cases, and a soak."
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--full"):
        return
    left_out = [item for item in items if item.get_closest_marker("full")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


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
def full(pytestconfig: pytest.Config) -> bool:
    """Whether many inputs are asked for."""
    return pytestconfig.getoption("--full")


@pytest.fixture(scope="session")
def common(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> Path:
    """The folder of this run that all its workers share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if hasattr(pytestconfig, "workerinput") else own


@pytest.fixture(scope="session")
def built(common: Path) -> Callable[[str, Callable[[Path], object]], Path]:
    """Builds a folder once a run, by the first worker that asks for its name; nobody may change it."""

    def of(name: str, build: Callable[[Path], object]) -> Path:
        folder = common / "built" / name
        folder.parent.mkdir(exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.exists():  # builders leave nothing where they fail
                build(folder)
        return folder

    return of


@pytest.fixture(scope="session")
def mirror(built: Callable[[str, Callable[[Path], object]], Path]) -> Callable[[int], Path]:
    """The ten benchmarks with so many questions each, in the folder from which lmms-eval is to be started."""
    from lmms_prune.demo.benchmarks import build_mirror

    return lambda rows: built(f"mirror-{rows}", lambda folder: build_mirror(folder, rows=rows))


@pytest.fixture(scope="session")
def hf_home(common: Path) -> Path:
    """Of all commands that tests start: a library reads its name when it is imported."""
    return common / "huggingface"


@pytest.fixture(scope="session")
def forking(hf_home: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forking]:
    """This worker's server, which forks programs that have everything imported."""
    ours = {"HF_HOME": str(hf_home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    with closing(Forking(tmp_path_factory.mktemp("forks") / "socket", {**os.environ, **ours})) as server:
        yield server


@pytest.fixture(scope="session")
def folders(built: Callable[[str, Callable[[Path], object]], Path]) -> dict[str, Path]:
    """A tiny checkpoint of each family."""
    return {
        "llava": built("llava", lambda folder: build_llava(folder, layers=LAYERS)),
        "qwen": built("qwen2_5_vl", lambda folder: build_qwen2_5_vl(folder, layers=LAYERS)),
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
