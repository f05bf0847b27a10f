"""Evaluations as processes of lmms-eval: several share one, and one that fails does not end the others."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

import yaml

from lmms_prune.compat.lmms_eval import RUN_FAILED
from lmms_prune.harness.failures import OURS, Failure, read_failure, read_log
from lmms_prune.harness.installation import DOCTOR, LMMS_EVAL
from lmms_prune.record.files import write
from lmms_prune.record.redaction import printed, redacted_lines
from lmms_prune.record.results import results_files

_EVERY = 1.0  # seconds between two looks at what is finished, and at whether it is worth going on


class RunError(RuntimeError):
    """An evaluation that left no results; the message says why, and where its log is.

    Args:
        failure: what its log says.
        log: the file.
    """

    def __init__(self, failure: Failure, log: Path, what: str = "this run left no results") -> None:
        reason = f"{OURS} {failure.reason}" if failure.ours else failure.reason
        super().__init__(f"{what}; its log is {log} and ends with:\n{reason}")
        self.failure = failure


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

    @property
    def log(self) -> Path:
        """What its process prints, where it has one of its own."""
        return self.out / "log.txt"

    def files(self) -> set[Path]:
        """Results files that are there."""
        return set(results_files(self.out, lambda error: None))


def evaluate(
    runs: Sequence[Run],
    folder: Path,
    mirror: Path,
    environment: Mapping[str, str] | None,
    secrets: Collection[str],
    progressed: Callable[[int], None],
) -> list[dict[str, Any] | RunError]:
    """Make all runs, in as many processes as there are cores.

    Importing lmms-eval takes a process longer than a small run, so each makes several runs. A run that left no results
    may have failed, or have come after one that ended the process: it is made once more by itself.

    Args:
        runs: in the order of the answer.
        folder: where the processes' configurations and logs go.
        mirror: the folder to start lmms-eval in.
        environment: of the processes; None for this one's.
        secrets: that no log may hold.
        progressed: told how many runs are finished, from time to time.

    Returns:
        each run's results, as in its file, or why there are none.

    Raises:
        RunError: a run failed for a reason that all of them share; those at work have been ended.
    """
    for run in runs:
        run.out.mkdir(parents=True, exist_ok=True)
    before = {run.out: run.files() for run in runs}

    def new(run: Run) -> set[Path]:
        return run.files() - before[run.out]

    def finished() -> int:
        return sum(1 for run in runs if new(run))

    # One thread a process: two small models side by side finish sooner than one after the other with two threads each.
    beside = max(1, min(len(runs), os.cpu_count() or 1))
    groups = [runs[number::beside] for number in range(beside)]
    first = [_job(group, folder / f"process-{number}.yaml") for number, group in enumerate(groups, 1)]
    _finish(first, mirror, environment, secrets, finished, progressed)
    again = [_job([run], folder) for group in groups if len(group) > 1 for run in group if not new(run)]
    _finish(again, mirror, environment, secrets, finished, progressed)
    progressed(len(runs))
    return [_results(run, new(run)) for run in runs]


def _finish(
    jobs: Sequence[tuple[list[str], Path]],
    mirror: Path,
    environment: Mapping[str, str] | None,
    secrets: Collection[str],
    finished: Callable[[], int],
    progressed: Callable[[int], None],
) -> None:
    """Let each job's process end, as many at a time as there are cores.

    Whatever ends the wait, an interruption too, ends the processes.

    Raises:
        RunError: see `evaluate`.
    """
    shared: list[tuple[Failure, Path]] = []
    ended = Event()

    def start(command: list[str], log: Path) -> None:
        if shared or ended.is_set():
            return
        pipe, both = subprocess.PIPE, subprocess.STDOUT
        log.touch()
        with (
            subprocess.Popen(command, cwd=mirror, env=environment, stdout=pipe, stderr=both) as process,
            ThreadPoolExecutor(1) as writer,
        ):
            written = writer.submit(_write_log, process, log, secrets)
            code = None
            while code is None and not shared and not ended.is_set():
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(_EVERY)
                if code is not None:
                    written.result()
                failure = _shared_failure(log, code)
                # What went well before shows that not all share it.
                if failure is not None and not finished():
                    shared.append((failure, log))
            process.terminate()
            process.wait()
            written.result()

    with ThreadPoolExecutor(max(1, min(len(jobs), os.cpu_count() or 1))) as pool:
        futures = [pool.submit(start, *job) for job in jobs]
        try:
            while wait(futures, timeout=_EVERY).not_done:
                progressed(finished())
        except BaseException:
            ended.set()
            raise
        for future in futures:
            future.result()
    if shared:
        raise RunError(
            *shared[0], f"every run fails alike, so no more were started. {DOCTOR} The first left no results"
        )


def _write_log(process: subprocess.Popen[bytes], log: Path, secrets: Collection[str]) -> None:
    """Write what a process prints, without secrets, until it ends."""
    try:
        with log.open("w", encoding="utf-8", newline="") as file:
            for line in redacted_lines(printed(process), secrets):
                file.write(line)
                file.flush()  # it can be followed, and ends with what was printed last
    except OSError:
        process.terminate()  # nobody reads what it prints any more
        raise


def _shared_failure(log: Path, code: int | None) -> Failure | None:
    """Why a process's run failed, if every other run will fail for the same reason.

    Args:
        log: of the process.
        code: its exit code, None while it is at work.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    first, failed, _ = text.partition(RUN_FAILED)
    if not failed and not code:
        return None
    # lmms-eval exits with 0 whatever becomes of a run, unless it comes to none, or a model of ours ends it.
    failure = read_failure(first, before_any_run=code == 1 and not failed)
    return failure if failure.scope == "environment" else None


def _job(runs: Sequence[Run], file: Path) -> tuple[list[str], Path]:
    """The command of one process and its log; for several runs `file` is written to hold them."""
    if len(runs) == 1:
        return runs[0].command, runs[0].log
    write(file, yaml.safe_dump([run.configuration for run in runs]))
    return [_program(), "--config", str(file)], file.with_suffix(".log")


def _program() -> str:
    return str(LMMS_EVAL)


def _results(run: Run, files: set[Path]) -> dict[str, Any] | RunError:
    """lmms-eval exits with 0 even when it fails, so its file is the judge."""
    if files:
        return json.loads(max(files).read_text(encoding="utf-8"))
    return RunError(read_log(run.log), run.log)
