"""Which requests are answered together, and the preparing of the next ones while the device answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

from lmms_prune.harness.memory import BatchSize

_Prepared = TypeVar("_Prepared")


class PreparedBatches(Generic[_Prepared]):
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
