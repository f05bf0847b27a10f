"""Counting FLOPs where an operation's own cannot be seen: inside a fused kernel no product reaches the dispatcher."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Tally:
    """FLOPs counted so far; `paused` while a computation is counted by a formula."""

    open: list[Tally] = []

    def __init__(self) -> None:
        self.flops = 0
        self.paused = False


@contextmanager
def counted_as(flops: int) -> Iterator[None]:
    """A block that counts as `flops`, whatever it runs: the same on every device."""
    tallies = [tally for tally in Tally.open if not tally.paused]
    for tally in tallies:
        tally.flops += flops
        tally.paused = True
    try:
        yield
    finally:
        for tally in tallies:
            tally.paused = False
