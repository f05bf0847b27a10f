"""Batches of requests, each prepared in another thread while the device answers the one before."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lmms_prune.harness.memory import BatchSize

_Prepared = TypeVar("_Prepared")


def on_the_way(inputs: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """A batch's inputs, so that the main thread only starts their copy: pixels in the model's dtype, all in pinned memory for a GPU."""
    cast = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    return {name: x.pin_memory() for name, x in cast.items()} if device.type == "cuda" else cast


class PreparedBatches(Generic[_Prepared]):
    """Batches of request indices, each prepared in another thread while the one before is answered.

    Iteration yields the request indices of a batch and the result of `prepare`. An error of `prepare` is raised when its
    batch is due. Requests that are put back come again, in batches of the size that then holds.
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
                requests, prepared = self._ahead
                batch = prepared.result()
                self._ahead = self._submit()
                yield requests, batch

    def put_back(self, requests: list[int]) -> None:
        """Put requests back, to be yielded next."""
        if self._ahead is not None:
            self._ahead[1].cancel()
            self._waiting.insert(0, self._ahead[0])
        self._waiting.insert(0, requests)
        self._ahead = self._submit()

    def _submit(self) -> tuple[list[int], Future[_Prepared]] | None:
        if not self._waiting:
            return None
        group = self._waiting[0]
        requests, self._waiting[0] = group[: self._size.rows], group[self._size.rows :]
        if not self._waiting[0]:
            del self._waiting[0]
        return requests, self._pool.submit(self._prepare, requests)
