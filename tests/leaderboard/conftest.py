"""Honest runs of the demo's models, from which tests forge others."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from built import Built, Mirror
from forking import Forking
from honest import RUNS

from lmms_prune.harness.tasks import task_configs


@pytest.fixture(scope="session")
def honest(built: Built, mirror: Mirror, forking: Forking) -> Path:
    """A folder with one folder of results for each of RUNS, evaluated on the local benchmarks. No test may change it."""

    def evaluate(folder: Path) -> Path:
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir(exist_ok=True)
        runs = []
        for name, run in RUNS.items():
            runs.append(
                {
                    "model": run.family,
                    "model_args": run.arguments(partial / ".journal"),
                    "tasks": ",".join(run.tasks),
                    "include_path": str(task_configs()),
                    "output_path": str(partial / name),
                    "log_samples": True,
                    **run.options,
                }
            )
        file = partial / "runs.yaml"
        file.write_text(yaml.safe_dump(runs), encoding="utf-8")
        done = forking.run("lmms-eval", "--config", file, cwd=mirror())
        assert done.returncode == 0, done.stderr[-3000:]
        file.unlink()
        return partial.rename(folder)

    return built.folder("honest", evaluate)
