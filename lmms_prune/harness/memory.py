"""How many rows are answered at once: a given number, or as many as the device's memory takes."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from loguru import logger

_FIRST = 4  # rows of the first batch whose size is to be found
_ON_CPU = 8  # rows where no memory can be asked: more gain little there
_FILLED = 0.8  # share of the device's memory that a batch may be expected to take


@dataclass
class BatchSize:
    """How many rows the next batch may have.

    Args:
        rows: the number now.
        fixed: whether a memory that does not suffice ends the run, instead of halving the number.
        most: no more than this many; lowered where memory did not suffice.
    """

    rows: int
    fixed: bool
    most: int = 1024

    @classmethod
    def of(cls, asked: int | str, device: torch.device) -> BatchSize:
        """A given number, or "auto": found as the run goes."""
        if asked != "auto":
            return cls(int(asked), fixed=True)
        return cls(_FIRST if device.type == "cuda" else _ON_CPU, fixed=False)

    def halve(self, rows: int) -> None:
        """A batch of `rows` did not fit."""
        self.most = self.rows = max(1, rows // 2)
        logger.warning("out of memory with {} rows at once; going on with {}.", rows, self.rows)

    def grow(self, rows: int, memory: Sequence[tuple[int, int, int]]) -> None:
        """A batch of `rows` took each device's memory from so many bytes to so many at its peak, of so many in all."""
        fits = [
            int((_FILLED * whole - before) / (peak - before) * rows) for before, peak, whole in memory if peak > before
        ]
        if fits and not self.fixed:
            self.rows = max(1, min(2 * rows, self.most, *fits))


@dataclass
class BatchOutcome:
    """Whether a batch did not fit."""

    exhausted: bool = False


@contextmanager
def watched(size: BatchSize, rows: int, model: torch.nn.Module) -> Iterator[BatchOutcome]:
    """Watch the memory of the GPUs that hold `model` while a batch of `rows` is answered, and let `size` grow by it.

    Memory that does not suffice is an outcome, and no error, where the size is to be found and half the rows are left.
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
        # Only here, where the error and all that its frames held are gone.
        release()
    else:
        peaks = [torch.cuda.max_memory_allocated(device) for device in devices]
        whole = [torch.cuda.mem_get_info(device)[1] for device in devices]
        size.grow(rows, list(zip(before, peaks, whole, strict=True)))


def release() -> None:
    """Give back to the device what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
