"""Circumstances that change an evaluation's time but not its answers; speeds are compared only if they are equal."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch

from lmms_prune.record.run import Circumstances


def circumstances(batch_size: int | str, processes: int) -> Circumstances:
    """Return the circumstances known before the first sample: requested batch size, machine, threads, processes."""
    cores = len(_cores())
    return Circumstances(
        batch_size=batch_size,
        machine=f"{_processor()}, {cores} core{'s' * (cores != 1)}",
        threads=str(torch.get_num_threads()),
        processes=str(processes),
    )


class OtherLoad:
    """The load of other programs on the cores that this process may use, since its creation."""

    def __init__(self) -> None:
        self._passed, self._busy, self._own = _seconds()

    def share(self) -> float | None:
        """Return the share (0 to 1) of the cores' time; None if too little time has passed."""
        passed, busy, own = (
            now - then for now, then in zip(_seconds(), (self._passed, self._busy, self._own), strict=True)
        )
        return None if passed <= 0 else min(1.0, max(0.0, (busy - own) / passed))


def _seconds() -> tuple[float, float, float]:
    """Return seconds of the cores: passed, busy, and used by this process and its finished children."""
    times = psutil.cpu_times(percpu=True)
    total = busy = 0.0
    for core in _cores():
        # Guest time is already counted in user time.
        passed = sum(times[core]) - getattr(times[core], "guest", 0.0) - getattr(times[core], "guest_nice", 0.0)
        total += passed
        busy += passed - times[core].idle - getattr(times[core], "iowait", 0.0)
    return total, busy, sum(os.times()[:4])


def _cores() -> list[int]:
    # macOS has no sched_getaffinity.
    cores = getattr(os, "sched_getaffinity", lambda _: range(psutil.cpu_count() or 1))(0)
    return [core for core in sorted(cores) if core < (psutil.cpu_count() or 1)]


def _processor() -> str:
    """Return the processor's name from /proc/cpuinfo; outside Linux, the name that Python knows."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8", errors="replace").splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
