"""Runs evaluations as processes of lmms-eval. Several runs share a process, and a failed run does not stop the others."""

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

from lmms_prune.harness.failures import OURS, Failure, first_run, read_failure, read_log
from lmms_prune.harness.installation import DOCTOR, LMMS_EVAL
from lmms_prune.record.files import write
from lmms_prune.record.redaction import printed, redacted_lines
from lmms_prune.record.results import results_files

_POLL_SECONDS = 1.0  # between two checks for finished runs and for a failure that all runs share


class RunError(RuntimeError):
    """An evaluation left no results; the message says why, and names its log.

    Args:
        failure: the failure, as read from the log.
        log: the log's path.
        what: the start of the message.
    """

    def __init__(self, failure: Failure, log: Path, what: str = "this run left no results") -> None:
        reason = f"{OURS} {failure.reason}" if failure.ours else failure.reason
        super().__init__(f"{what}; its log is {log} and ends with:\n{reason}")
        self.failure = failure


@dataclass(frozen=True)
class DemoRun:
    """One evaluation.

    Args:
        options: lmms-eval's options, by name.
        out: the folder for its results, used by no other run.
    """

    options: Mapping[str, str]
    out: Path

    @property
    def command(self) -> list[str]:
        """The command line for this run."""
        words = [word for name, value in self.options.items() for word in (f"--{name}", value)]
        return [_program(), *words, "--output_path", str(self.out), "--log_samples"]

    @property
    def configuration(self) -> dict[str, Any]:
        """The same run as an entry of a --config file."""
        return {**self.options, "output_path": str(self.out), "log_samples": True}

    @property
    def log(self) -> Path:
        """The log of its process, if the run does not share one."""
        return self.out / "log.txt"

    def files(self) -> set[Path]:
        """The existing results files."""
        return set(results_files(self.out, lambda error: None))


def evaluate(
    runs: Sequence[DemoRun],
    folder: Path,
    mirror: Path,
    environment: Mapping[str, str] | None,
    secrets: Collection[str],
    progressed: Callable[[int], None],
) -> list[dict[str, Any] | RunError]:
    """Evaluate all runs, in as many processes as there are cores.

    Importing lmms-eval takes longer than a small run, so each process evaluates several runs. A run without results may
    have failed, or have followed a run that ended the process. It is evaluated once more, in a separate process.

    Args:
        runs: the runs.
        folder: the folder for the processes' configurations and logs.
        mirror: the folder to start lmms-eval in.
        environment: the processes' environment; None to inherit this one's.
        secrets: values that no log may contain.
        progressed: called with the number of finished runs, from time to time.

    Returns:
        for each run, in order, the content of its results file, or why there is none.

    Raises:
        RunError: a run failed for a reason that all runs share; the running processes have been ended.
    """
    for run in runs:
        run.out.mkdir(parents=True, exist_ok=True)
    before = {run.out: run.files() for run in runs}

    def new(run: DemoRun) -> set[Path]:
        return run.files() - before[run.out]

    def finished() -> int:
        return sum(1 for run in runs if new(run))

    # One thread per process: two small models in parallel finish sooner than one after the other with two threads each.
    parallel = max(1, min(len(runs), os.cpu_count() or 1))
    groups = [runs[number::parallel] for number in range(parallel)]
    first = [_command(group, folder / f"process-{number}.yaml") for number, group in enumerate(groups, 1)]
    _finish(first, mirror, environment, secrets, finished, progressed)
    again = [_command([run], folder) for group in groups if len(group) > 1 for run in group if not new(run)]
    _finish(again, mirror, environment, secrets, finished, progressed)
    progressed(len(runs))
    return [_results(run, new(run)) for run in runs]


def _finish(
    commands: Sequence[tuple[list[str], Path]],
    mirror: Path,
    environment: Mapping[str, str] | None,
    secrets: Collection[str],
    finished: Callable[[], int],
    progressed: Callable[[int], None],
) -> None:
    """Run each command until it ends, as many at a time as there are cores.

    Any exception during the wait, also an interruption, ends the processes.

    Args:
        commands: command lines, each with the path of its log.
        mirror, environment, secrets, progressed: as for `evaluate`.
        finished: returns the number of finished runs.

    Raises:
        RunError: as for `evaluate`.
    """
    shared: list[tuple[Failure, Path]] = []
    ended = Event()

    def start(command: list[str], log: Path) -> None:
        if shared or ended.is_set():
            return
        pipe, merged = subprocess.PIPE, subprocess.STDOUT
        log.touch()
        with (
            subprocess.Popen(command, cwd=mirror, env=environment, stdout=pipe, stderr=merged) as process,
            ThreadPoolExecutor(1) as writer,
        ):
            written = writer.submit(_write_log, process, log, secrets)
            code = None
            while code is None and not shared and not ended.is_set():
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(_POLL_SECONDS)
                if code is not None:
                    written.result()
                failure = _shared_failure(log, code)
                # A finished run shows that not all runs share the failure.
                if failure is not None and not finished():
                    shared.append((failure, log))
            process.terminate()
            process.wait()
            written.result()

    with ThreadPoolExecutor(max(1, min(len(commands), os.cpu_count() or 1))) as pool:
        futures = [pool.submit(start, command, log) for command, log in commands]
        try:
            while wait(futures, timeout=_POLL_SECONDS).not_done:
                progressed(finished())
        except BaseException:
            ended.set()
            raise
        for future in futures:
            future.result()
    if shared:
        raise RunError(
            *shared[0],
            f"every run fails for the same reason, so no more were started. {DOCTOR} The first left no results",
        )


def _write_log(process: subprocess.Popen[bytes], log: Path, secrets: Collection[str]) -> None:
    """Write a process's output to its log, without secrets, until it ends."""
    try:
        with log.open("w", encoding="utf-8", newline="") as file:
            for line in redacted_lines(printed(process), secrets):
                file.write(line)
                file.flush()  # so that the log can be followed, and is complete after a crash
    except OSError:
        process.terminate()  # its output is no longer read, so it would block
        raise


def _shared_failure(log: Path, code: int | None) -> Failure | None:
    """Why a process's first run failed, if every other run would fail for the same reason.

    Args:
        log: the process's log.
        code: its exit code; None while it runs.
    """
    text = log.read_text(encoding="utf-8", errors="replace")
    first, failed = first_run(text)
    if not failed and not code:
        return None
    # lmms-eval exits with 0 even after failed runs. It exits with 1 if it starts no run, or if a model of ours ends it.
    failure = read_failure(first, before_any_run=code == 1 and not failed)
    return failure if failure.scope == "environment" else None


def _command(runs: Sequence[DemoRun], file: Path) -> tuple[list[str], Path]:
    """The command of one process, and its log. For several runs, writes `file` with their configurations."""
    if len(runs) == 1:
        return runs[0].command, runs[0].log
    write(file, yaml.safe_dump([run.configuration for run in runs]))
    return [_program(), "--config", str(file)], file.with_suffix(".log")


def _program() -> str:
    """lmms-eval's command; tests replace it."""
    return str(LMMS_EVAL)


def _results(run: DemoRun, files: set[Path]) -> dict[str, Any] | RunError:
    """The content of the newest results file; without one, the reason from the log."""
    # The exit code says nothing: lmms-eval exits with 0 even after failed runs.
    if files:
        return json.loads(max(files).read_text(encoding="utf-8"))
    return RunError(read_log(run.log), run.log)
