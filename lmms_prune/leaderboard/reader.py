"""Reads samples files once per command: several at a time, and from a cache if they have not changed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import blake2b
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from threading import Thread

import numpy as np
from jaxtyping import Float

from lmms_prune.leaderboard.benchmarks import Benchmark
from lmms_prune.leaderboard.cache import Cache, code_version, name_of
from lmms_prune.leaderboard.encoding import decoded, encoded
from lmms_prune.leaderboard.samples import Samples, SamplesError, Stamp, read_samples
from lmms_prune.leaderboard.statistics import resampled
from lmms_prune.record.stored import status_of

FEW = 32 * 2**20
"""Bytes of samples files below which starting processes takes longer than reading."""
SETTLED = 2 * 10**9
"""Nanoseconds without a change after which a file is cached. A clock may be so coarse that a file which is written again at
once keeps its time."""

Outcome = Samples | SamplesError | OSError
Job = tuple[Path, Benchmark]


class SamplesReader:
    """What was read of samples files, each of them once.

    Args:
        cache: where to keep it for the next command; None for nowhere.
        workers: most processes that read at a time. They are started afresh ("spawn"), which imports the main program again:
            more than 1 is for programs that guard their start by ``__name__ == "__main__"``, as commands do.

    `counted` is called with the number of files that were read ahead, and of all.
    """

    def __init__(self, cache: Cache | None = None, workers: int = 1) -> None:
        self.counted: Callable[[int, int], None] = lambda done, total: None
        self._cache = cache if code_version() is not None else None
        self._workers = workers
        self._outcomes: dict[Job, Outcome] = {}

    def read(self, path: Path, benchmark: Benchmark) -> Samples:
        """Return what a samples file holds.

        Raises:
            SamplesError, OSError: as for `read_samples`; again each time that the file is asked for.
        """
        self.read_all([(path, benchmark)])
        outcome = self._outcomes[path, benchmark]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def read_all(self, jobs: Iterable[Job]) -> None:
        """Read files ahead, several at a time; errors are kept until a file is asked for."""
        missing = [job for job in dict.fromkeys(jobs) if job not in self._outcomes]
        for job in missing:
            if self._cache is not None and (samples := _cached(*job, self._cache)) is not None:
                self._outcomes[job] = samples
        unread = [job for job in missing if job not in self._outcomes]
        for number, ((path, benchmark), outcome) in enumerate(self._read(unread), 1):
            self._outcomes[path, benchmark] = outcome
            self.counted(number, len(unread))
        if unread and self._cache is not None:
            self._cache.prune()

    def _read(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Read files that are not in the cache, in a pool if that is worth its start."""
        # The largest first, so that none is left for the end.
        unread = sorted(jobs, key=lambda job: -_size(job[0]))
        workers = min(self._workers, len(unread))
        if workers > 1 and sum(_size(path) for path, _ in unread) >= FEW:
            try:
                for job, outcome in _in_pool(unread, self._cache, workers):
                    yield job, outcome
                    unread = unread[1:]
            except (BrokenProcessPool, OSError):
                pass  # no processes, or no memory for so many of them: the rest is read here
        for job in unread:
            yield job, _outcome(*job, self._cache)

    def resampled(
        self, runs: Sequence[Samples], resamples: int, seed: Sequence[int]
    ) -> Float[np.ndarray, "resamples runs"]:
        """Return `resampled` of runs, for a generator with this seed; from the cache if these runs were resampled before."""

        def compute() -> Float[np.ndarray, "resamples runs"]:
            return resampled(runs, resamples, np.random.default_rng(seed))

        if self._cache is None:
            return compute()
        digest = blake2b(digest_size=16)
        for run in runs:
            for array in (run.num, run.den, run.stratum):
                digest.update(f"{array.dtype.str}{array.shape}".encode())
                digest.update(array.tobytes())
        name = name_of("resampled", code_version(), digest.hexdigest(), resamples, tuple(seed))
        return _array(self._cache, name, (resamples, len(runs)), compute)


def processors() -> int:
    """Return how many CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _array(
    cache: Cache, name: str, shape: tuple[int, int], compute: Callable[[], Float[np.ndarray, "resamples runs"]]
) -> Float[np.ndarray, "resamples runs"]:
    content = cache.load(name)
    if content is not None and len(content) == 8 * shape[0] * shape[1]:
        return np.frombuffer(content, float).reshape(shape).copy()
    computed = compute()
    cache.store(name, computed.tobytes())
    cache.prune()
    return computed


def _entry(path: Path, benchmark: Benchmark) -> str:
    """Return the name of a file's entry. The file's state is in the entry, so that a later state takes its place."""
    return name_of("samples", os.path.abspath(path), repr(benchmark))


def _cached(path: Path, benchmark: Benchmark, cache: Cache) -> Samples | None:
    """Return what the cache holds of a file in its present state; None if it holds nothing that can be used."""
    try:
        stamp = Stamp.of(status_of(path))
    except OSError:
        return None
    content, version = cache.load(_entry(path, benchmark)), code_version()
    if content is None or version is None:
        return None
    try:
        return decoded(content, stamp, version)
    except (LookupError, TypeError, ValueError):
        return None  # whole, but not as this version writes it


def _outcome(path: Path, benchmark: Benchmark, cache: Cache | None) -> Outcome:
    """Read a file and store what was read, unless it may be in the middle of a change; return errors."""
    started = time.time_ns()
    try:
        samples = read_samples(path, benchmark)
        version = code_version()
        settled = max(samples.stamp.modified, samples.stamp.changed) <= started - SETTLED
        if cache is not None and version is not None and settled and Stamp.of(status_of(path)) == samples.stamp:
            cache.store(_entry(path, benchmark), encoded(samples, version))
    except (SamplesError, OSError) as error:
        return error
    return samples


def _size(path: Path) -> int:
    try:
        return status_of(path).st_size
    except OSError:
        return 0


def _in_pool(jobs: Sequence[Job], cache: Cache | None, workers: int) -> Iterator[tuple[Job, Outcome]]:
    """Read files in processes; yields in the order of `jobs`."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_begin)
    try:
        futures = [pool.submit(_outcome, path, benchmark, cache) for path, benchmark in jobs]
        for job, future in zip(jobs, futures, strict=True):
            yield job, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Let a process of the pool end without a word when the command is interrupted, and not outlive it if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
