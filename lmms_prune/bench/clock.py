"""Timing of work on a device."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch


def median_seconds(run: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Return the median seconds of `repeats` runs after one warm-up run; each waits for the device."""
    seconds = []
    for _ in range(repeats + 1):
        wait(device)
        start = time.perf_counter()
        run()
        wait(device)
        seconds.append(time.perf_counter() - start)
    return median(seconds[1:])


def wait(device: torch.device) -> None:
    """Wait until the device has finished its queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
