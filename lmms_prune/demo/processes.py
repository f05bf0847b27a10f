"""Evaluations as processes of lmms-eval: several share one, and one that fails does not end the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lmms_prune.redaction import printed, redacted_lines, secret_values


class RunError(RuntimeError):
    """An evaluation that left no results; the message says why, and where its log is."""


@dataclass(frozen=True)
class Run:
    """One evaluation: lmms-eval's options by name, and the folder of its own that its results go to."""

    options: Mapping[str, str]
    out: Path

    @property
    def command(self) -> list[str]:
        """The command line that makes this run alone."""
        named = [word for name, value in self.options.items() for word in (f"--{name}", value)]
        return [_program(), *named, "--output_path", str(self.out), "--log_samples"]

    @property
    def configuration(self) -> dict[str, Any]:
        """The same as an entry of a --config file."""
        return {**self.options, "output_path": str(self.out), "log_samples": True}

    def files(self) -> set[Path]:
        """Results files that are there."""
        # What a task writes for submission may be called the same.
        return {path for path in self.out.rglob("*_results.json") if path.parent.name != "submissions"}


def evaluate(
    runs: Sequence[Run],
    folder: Path,
    mirror: Path,
    environment: Mapping[str, str],
    progressed: Callable[[int], None],
) -> list[dict[str, Any] | RunError]:
    """Make all runs, in as many processes as there are cores.

    Importing lmms-eval takes a process longer than a small run, so each makes several runs. A run that left no results
    may have failed, or have come after one that ended the process: it is made once more by itself.

    Args:
        runs: in the order of the answer.
        folder: where the processes' configurations and logs go.
        mirror: the folder to start lmms-eval in.
        environment: of the processes.
        progressed: told how many runs are finished, from time to time.

    Returns:
        each run's results, as in its file, or why there are none.
    """
    secrets = secret_values(environment)
    for run in runs:
        run.out.mkdir(parents=True, exist_ok=True)
    before = {run.out: run.files() for run in runs}

    def new(run: Run) -> set[Path]:
        return run.files() - before[run.out]

    def start(job: tuple[list[str], Path]) -> None:
        command, log = job
        pipe, both = subprocess.PIPE, subprocess.STDOUT
        with (
            log.open("w", encoding="utf-8", newline="") as file,
            subprocess.Popen(command, cwd=mirror, env=dict(environment), stdout=pipe, stderr=both) as process,
        ):
            for line in redacted_lines(printed(process), secrets):
                file.write(line)
                file.flush()  # it can be followed, and ends with what was printed last

    # One thread a process: two small models side by side finish sooner than one after the other with two threads each.
    beside = max(1, min(len(runs), os.cpu_count() or 1))
    groups = [runs[number::beside] for number in range(beside)]
    with ThreadPoolExecutor(beside) as pool:

        def finish(jobs: list[tuple[list[str], Path]]) -> None:
            futures = [pool.submit(start, job) for job in jobs]
            while wait(futures, timeout=1).not_done:
                progressed(sum(1 for run in runs if new(run)))
            for future in futures:
                future.result()

        finish([_job(group, folder / f"process-{number}.yaml") for number, group in enumerate(groups, 1)])
        finish([_job([run], folder) for group in groups if len(group) > 1 for run in group if not new(run)])
    progressed(len(runs))
    return [_results(run, new(run)) for run in runs]


def _job(runs: Sequence[Run], file: Path) -> tuple[list[str], Path]:
    """The command of one process and its log; for several runs `file` is written to hold them."""
    if len(runs) == 1:
        return runs[0].command, _log(runs[0])
    file.write_text(yaml.safe_dump([run.configuration for run in runs]), encoding="utf-8")
    return [_program(), "--config", str(file)], file.with_suffix(".log")


def _program() -> str:
    return str(Path(sys.executable).with_name("lmms-eval"))


def _log(run: Run) -> Path:
    return run.out / "log.txt"


def _results(run: Run, files: set[Path]) -> dict[str, Any] | RunError:
    """lmms-eval exits with 0 even when it fails, so its file is the judge."""
    if files:
        return json.loads(max(files).read_text(encoding="utf-8"))
    said = _log(run).read_text(encoding="utf-8").strip()
    marker = "lmms-prune: error:"
    # Our own errors may take several lines and come last; of any other the last line says most.
    end = said[said.rindex(marker) :] if marker in said else " ".join(said.splitlines()[-1:])
    return RunError(f"this run left no results; its log is {_log(run)} and ends with:\n{end}")
