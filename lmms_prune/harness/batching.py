"""Which requests are answered together, and the preparing of the next ones while the device answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from loguru import logger

_Prepared = TypeVar("_Prepared")
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


class Batches(Generic[_Prepared]):
    """Groups of places, batch by batch, each prepared in another thread while the one before is answered.

    Iterating gives the places of a batch and what `prepare` made of them. An error of `prepare` is raised where its
    batch is due. What is put back comes again, in batches of the size that then holds.
    """

    def __init__(self, groups: Sequence[list[int]], size: BatchSize, prepare: Callable[[list[int]], _Prepared]) -> None:
        self._waiting = [list(group) for group in groups if group]
        self._size, self._prepare = size, prepare
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")
        self._ahead: tuple[list[int], Future[_Prepared]] | None = None

    def __iter__(self) -> Iterator[tuple[list[int], _Prepared]]:
        with self._pool:
            self._ahead = self._submit()
            while self._ahead is not None:
                places, prepared = self._ahead
                made = prepared.result()
                self._ahead = self._submit()
                yield places, made

    def put_back(self, places: list[int]) -> None:
        """Give these places again, next."""
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._waiting.insert(0, self._ahead[0])
        self._waiting.insert(0, places)
        self._ahead = self._submit()

    def _submit(self) -> tuple[list[int], Future[_Prepared]] | None:
        if not self._waiting:
            return None
        group = self._waiting[0]
        places, self._waiting[0] = group[: self._size.rows], group[self._size.rows :]
        if not self._waiting[0]:
            del self._waiting[0]
        return places, self._pool.submit(self._prepare, places)
