"""Timing of work on a device: CPU time on a CPU, so that other jobs do not count, and elapsed time on a GPU."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """Marks when a device reaches a point, and says how many seconds passed between two of them.

    On a CPU these are seconds of computing, added over all threads of this process: waiting for a core that another
    job holds does not count. On a GPU they are elapsed seconds.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = clock_name(device.type)

    def now(self) -> float:
        """Return the current second, after the device has finished its queued work."""
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def mark(self) -> Any:
        """Mark the point that the device has reached, without making the host wait."""
        if self.device.type != "cuda":
            return time.process_time()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def between(self, first: Any, second: Any) -> float:
        """Return the seconds between two marks; call `now` first."""
        return second - first if self.device.type != "cuda" else first.elapsed_time(second) / 1000


def clock_name(device: str) -> str:
    """Return what a second is on a device, as reports name it."""
    return "elapsed time" if device.startswith("cuda") else "CPU time of all threads"


def timed(run: Callable[[], Any], repeats: int, device: torch.device) -> list[float]:
    """Return the seconds of each of `repeats` runs after one warm-up run."""
    clock, seconds = Clock(device), []
    for _ in range(repeats + 1):
        start = clock.now()
        run()
        seconds.append(clock.now() - start)
    return seconds[1:]
