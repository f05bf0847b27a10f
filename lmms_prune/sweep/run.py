"""Running a sweep's units one after the other."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from statistics import median
from typing import Literal

from filelock import FileLock, Timeout

from lmms_prune.harness.failures import Failure, Scope
from lmms_prune.record.files import WriteError, make_folder
from lmms_prune.sweep.results import publish, redact_files, seconds_if_complete
from lmms_prune.sweep.units import Unit
from lmms_prune.sweep.worker import Worker


@dataclass(frozen=True)
class Outcome:
    """What became of one unit.

    Args:
        unit: the one.
        state: "done" now, "skipped" since it was complete, "busy" with another sweep, "failed", or "untried" because it would
            have failed for the same reason as another.
        seconds: that its evaluation took, now or when it was made.
        reason: why it failed, with where to look.
        scope: which other units fail for this reason.
    """

    unit: Unit
    state: Literal["done", "skipped", "busy", "failed", "untried"]
    seconds: float = 0.0
    reason: str = ""
    scope: Scope = "run"


def run_sweep(units: Sequence[Unit], launch: str, secrets: Collection[str]) -> Generator[Outcome]:
    """Evaluate what is not complete; yields each unit's outcome as it is known.

    A failure that all units of a checkpoint share is met once, and one that all units share ends the sweep; what went
    well before shows that they do not share it.

    Args:
        units: as `plan` orders them.
        launch: what starts the evaluating processes, "" for one plain process.
        secrets: values that no file may hold, of `lmms_prune.record.redaction.secret_values`.

    Raises:
        SweepError: there is no such launcher.
        WriteError: the sweep's folder cannot be written to.
    """
    hopeless = succeeded = False
    for _, same in groupby(units, key=lambda unit: unit.weights):
        unusable = loaded = False
        with _worker(launch, secrets) as workers:
            for unit in same:
                if hopeless or unusable:
                    yield _untried(unit)
                    continue
                with _locked(unit) as mine:
                    outcome = _outcome(unit, workers, secrets) if mine else Outcome(unit, "busy")
                loaded = loaded or outcome.state == "done"
                succeeded = succeeded or loaded
                unusable = outcome.scope == "checkpoint" and not loaded
                hopeless = outcome.scope == "environment" and not succeeded
                yield outcome
    for folder in {unit.partial.parent for unit in units}:
        with suppress(OSError):  # logs of what failed stay
            folder.rmdir()


class _Workers:
    """At most one worker, started when it is needed, and again after one has failed."""

    def __init__(self, launch: str, secrets: Collection[str]) -> None:
        self._launch, self._secrets = launch, secrets
        self._worker: Worker | None = None

    def evaluate(self, unit: Unit) -> Failure | None:
        """As `Worker.evaluate`."""
        if self._worker is None:
            self._worker = Worker(self._launch, self._secrets)
        failure = self._worker.evaluate(unit)
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
def _locked(unit: Unit) -> Iterator[bool]:
    """Whether no other sweep is at work on the unit; the lock goes with the process that holds it."""
    make_folder(unit.partial.parent)
    path = unit.partial.with_name(f"{unit.partial.name}.lock")
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
        # Whoever opened it a moment ago and gets its lock now finds the unit complete.
        with suppress(OSError):  # on a disk that is read-only since
            path.unlink(missing_ok=True)
        lock.release()


def _outcome(unit: Unit, workers: _Workers, secrets: Collection[str]) -> Outcome:
    before = seconds_if_complete(unit)
    if before is not None:
        shutil.rmtree(unit.journal, ignore_errors=True)  # of a sweep that was killed just after it had published
        return Outcome(unit, "skipped", before)
    # What was interrupted goes on from its journal, which stands beside.
    shutil.rmtree(unit.partial, ignore_errors=True)
    make_folder(unit.partial)
    start = time.monotonic()
    failure = workers.evaluate(unit)
    seconds = time.monotonic() - start
    log = unit.partial / "log.txt"
    # Whatever becomes of the files that lmms-eval has written, they stay on the disk.
    unreadable = redact_files(unit.partial, secrets)
    reason = failure.reason if failure else unreadable or publish(unit, seconds, secrets)
    if reason is not None:
        return Outcome(unit, "failed", seconds, f"{reason}\n  log: {log}", failure.scope if failure else "run")
    shutil.rmtree(unit.journal, ignore_errors=True)
    return Outcome(unit, "done", seconds)


def _untried(unit: Unit) -> Outcome:
    seconds = seconds_if_complete(unit)
    return Outcome(unit, "untried") if seconds is None else Outcome(unit, "skipped", seconds)


def time_left(units: Sequence[Unit], outcomes: Sequence[Outcome]) -> float | None:
    """Seconds that the units without an outcome will take, as evaluations of the same task and weights took so far.

    Returns:
        None as long as nothing was evaluated.
    """
    took: dict[tuple[str, ...], list[float]] = {}
    for outcome in outcomes:
        if outcome.state in ("done", "skipped"):
            for key in ((outcome.unit.task, *outcome.unit.weights), ()):
                took.setdefault(key, []).append(outcome.seconds)
    if not took:
        return None
    finished = {outcome.unit.folder for outcome in outcomes}
    left = [unit for unit in units if unit.folder not in finished]
    means = [took.get((unit.task, *unit.weights), took[()]) for unit in left]
    # The first one of a process also loads the weights, which a median forgives.
    return float(sum(median(some) for some in means))
