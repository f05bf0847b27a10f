"""The batch size: a fixed number, or as many rows as the device's memory holds."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from loguru import logger

from lmms_prune.record.run import GPU_MEMORY, PROCESS_MEMORY

_FIRST = 4  # rows of the first batch with batch_size=auto
_ON_CPU = 8  # rows with batch_size=auto on a CPU: its free memory is not measured, and larger batches gain little
_FILLED = 0.8  # share of the device's memory that a batch is planned to fill


@dataclass
class BatchSize:
    """The number of rows that the next batch may have.

    Args:
        rows: the current number.
        fixed: whether out-of-memory ends the run instead of halving the number.
        most: the upper bound; lowered after out-of-memory.
    """

    rows: int
    fixed: bool
    most: int = 1024

    @classmethod
    def of(cls, requested: int | str, device: torch.device) -> BatchSize:
        """Make a batch size from a number, or from "auto", which is adapted during the run."""
        if requested != "auto":
            return cls(int(requested), fixed=True)
        return cls(_FIRST if device.type == "cuda" else _ON_CPU, fixed=False)

    def halve(self, rows: int) -> None:
        """Halve the size after a batch of `rows` did not fit."""
        self.most = self.rows = max(1, rows // 2)
        logger.warning("out of memory with {} rows at once; going on with {}.", rows, self.rows)

    def grow(self, rows: int, memory: Sequence[tuple[int, int, int]]) -> None:
        """Adapt the size after a batch of `rows`; `memory` has each device's bytes (before, at the peak, in total)."""
        fits = [
            int((_FILLED * total - before) / (peak - before) * rows) for before, peak, total in memory if peak > before
        ]
        if fits and not self.fixed:
            self.rows = max(1, min(2 * rows, self.most, *fits))


@dataclass
class BatchOutcome:
    """The outcome of a batch: whether it exhausted the memory."""

    exhausted: bool = False


@contextmanager
def watched(size: BatchSize, rows: int, model: torch.nn.Module) -> Iterator[BatchOutcome]:
    """Watch the GPUs that hold `model` while a batch of `rows` is answered, and adapt `size` to their memory.

    With `batch_size=auto`, out-of-memory is reported as an outcome (not raised) while the batch can still be halved.
    """
    outcome = BatchOutcome()
    devices = [] if size.fixed else sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    for device in devices:
        torch.cuda.reset_peak_memory_stats(device)
    before = [torch.cuda.memory_allocated(device) for device in devices]
    try:
        yield outcome
    except torch.OutOfMemoryError:
        if size.fixed or rows == 1:
            raise
        outcome.exhausted = True
    if outcome.exhausted:
        # Only here: the error is gone, and with it the tensors that its frames referenced.
        release()
    else:
        peaks = [torch.cuda.max_memory_allocated(device) for device in devices]
        totals = [torch.cuda.mem_get_info(device)[1] for device in devices]
        size.grow(rows, list(zip(before, peaks, totals, strict=True)))


class PeakMemory:
    """The most memory that a run uses, weights included: of the GPUs that hold its model, else of the process."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
        self._highest = 0
        for device in self._devices:
            torch.cuda.reset_peak_memory_stats(device)

    @property
    def of(self) -> str:
        """Return what the bytes are of."""
        return GPU_MEMORY if self._devices else PROCESS_MEMORY

    def note(self) -> int | None:
        """Return the bytes at the peak so far. Must be called after each batch: `watched` resets the GPUs' own counts.

        Returns:
            None where the operating system does not say.
        """
        if not self._devices:
            return _peak_resident()
        self._highest = max(self._highest, sum(map(torch.cuda.max_memory_allocated, self._devices)))
        return self._highest


def _peak_resident() -> int | None:
    """Return the largest resident set size that this process has had; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def release() -> None:
    """Free unreferenced memory on the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
