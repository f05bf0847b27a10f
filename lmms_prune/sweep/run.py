"""Runs the jobs of a sweep one after the other."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Literal

from lmms_prune.harness.failures import Failure, Scope
from lmms_prune.record.files import WriteError, make_folder
from lmms_prune.sweep.jobs import Job
from lmms_prune.sweep.results import publish, redact_files, seconds_if_complete
from lmms_prune.sweep.worker import Worker


@dataclass(frozen=True)
class JobOutcome:
    """The outcome of one job.

    Args:
        job: the job.
        state: "done" (evaluated now), "skipped" (complete before), "busy" (another sweep is evaluating it), "failed", or
            "untried" (it would have failed for the same reason as another job).
        seconds: duration of the evaluation, also of one that was skipped.
        reason: why it failed, and where to look.
        scope: which other jobs would fail for the same reason.
    """

    job: Job
    state: Literal["done", "skipped", "busy", "failed", "untried"]
    seconds: float = 0.0
    reason: str = ""
    scope: Scope = "run"


def run_sweep(jobs: Sequence[Job], launch: str, secrets: Collection[str]) -> Generator[JobOutcome]:
    """Evaluate every job that is not complete, and yield each job's outcome when it is known.

    After a failure that concerns the checkpoint, its other jobs are not tried; after one that concerns the environment,
    no further job is tried. An earlier success shows that a failure does not concern the whole checkpoint or environment.

    Args:
        jobs: in the order of `plan`.
        launch: the launcher of the evaluating processes; "" for one plain process.
        secrets: values that no file may contain, from `lmms_prune.record.redaction.secret_values`.

    Raises:
        SweepError: the launcher does not exist.
        WriteError: the sweep's folder is not writable.
    """
    hopeless = succeeded = False
    for _, same_weights in groupby(jobs, key=lambda job: job.weights):
        unusable = loaded = False
        with _worker(launch, secrets) as workers:
            for job in same_weights:
                if hopeless or unusable:
                    yield _untried(job)
                    continue
                with _locked(job) as acquired:
                    outcome = _outcome(job, workers, secrets) if acquired else JobOutcome(job, "busy")
                loaded = loaded or outcome.state == "done"
                succeeded = succeeded or loaded
                unusable = outcome.scope == "checkpoint" and not loaded
                hopeless = outcome.scope == "environment" and not succeeded
                yield outcome
    for folder in {job.partial.parent for job in jobs}:
        with suppress(OSError):  # not empty: it holds the logs of failed jobs
            folder.rmdir()


class _Workers:
    """Holds at most one worker: starts it when needed, and starts a new one after a failure."""

    def __init__(self, launch: str, secrets: Collection[str]) -> None:
        self._launch, self._secrets = launch, secrets
        self._worker: Worker | None = None

    def evaluate(self, job: Job) -> Failure | None:
        """Evaluate `job` as `Worker.evaluate` does."""
        if self._worker is None:
            self._worker = Worker(self._launch, self._secrets)
        failure = self._worker.evaluate(job)
        if failure is not None:
            self.close()
        return failure

    def close(self, *, at_once: bool = False) -> None:
        """End the worker, if there is one."""
        worker, self._worker = self._worker, None
        if worker is not None:
            worker.close(at_once=at_once)


@contextmanager
def _worker(launch: str, secrets: Collection[str]) -> Iterator[_Workers]:
    workers = _Workers(launch, secrets)
    try:
        yield workers
    except BaseException:
        workers.close(at_once=True)
        raise
    workers.close()


@contextmanager
def _locked(job: Job) -> Iterator[bool]:
    """Lock the job: yields False if another sweep holds it. The lock ends with the process that holds it."""
    make_folder(job.partial.parent)
    path = job.partial.with_name(f"{job.partial.name}.lock")
    # Imported here: `sweep --help` need not wait for it, nor for asyncio, which it imports.
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        yield False
        return
    except OSError as error:
        raise WriteError(path, error) from error
    try:
        yield True
    finally:
        # Unlinking is safe: a sweep that opened the file just before and locks it now finds the job complete.
        with suppress(OSError):  # the disk may have become read-only
            path.unlink(missing_ok=True)
        lock.release()


def _outcome(job: Job, workers: _Workers, secrets: Collection[str]) -> JobOutcome:
    seconds = seconds_if_complete(job)
    if seconds is not None:
        shutil.rmtree(job.journal, ignore_errors=True)  # left by a sweep that was killed just after publishing
        return JobOutcome(job, "skipped", seconds)
    # An interrupted evaluation resumes from its journal, which is outside this folder.
    shutil.rmtree(job.partial, ignore_errors=True)
    make_folder(job.partial)
    start = time.monotonic()
    failure = workers.evaluate(job)
    seconds = time.monotonic() - start
    log = job.partial / "log.txt"
    # lmms-eval's files stay on the disk even if the job fails, so they are redacted in any case.
    unreadable = redact_files(job.partial, secrets)
    reason = failure.reason if failure else unreadable or publish(job, seconds, secrets)
    if reason is not None:
        return JobOutcome(job, "failed", seconds, f"{reason}\n  log: {log}", failure.scope if failure else "run")
    shutil.rmtree(job.journal, ignore_errors=True)
    return JobOutcome(job, "done", seconds)


def _untried(job: Job) -> JobOutcome:
    seconds = seconds_if_complete(job)
    return JobOutcome(job, "untried") if seconds is None else JobOutcome(job, "skipped", seconds)


def time_left(jobs: Sequence[Job], outcomes: Sequence[JobOutcome]) -> float | None:
    """The estimated seconds for the jobs without an outcome, from finished jobs of the same task and weights.

    Returns:
        the estimate; None as long as nothing was evaluated.
    """
    durations: dict[tuple[str, ...], list[float]] = {}
    for outcome in outcomes:
        if outcome.state in ("done", "skipped"):
            for key in ((outcome.job.task, *outcome.job.weights), ()):
                durations.setdefault(key, []).append(outcome.seconds)
    if not durations:
        return None
    finished = {outcome.job.folder for outcome in outcomes}
    remaining = [job for job in jobs if job.folder not in finished]
    similar = [durations.get((job.task, *job.weights), durations[()]) for job in remaining]
    # A median, since the first job of a process also loads the weights.
    return float(sum(median(seconds) for seconds in similar))
