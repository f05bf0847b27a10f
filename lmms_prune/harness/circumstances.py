"""What changes an evaluation's time and none of its answers: speeds are compared only where it is the same."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil
import torch

from lmms_prune.record.run import Circumstances


def circumstances(batch_size: int | str, processes: int) -> Circumstances:
    """What is known before the first sample: the batch size that was asked for, machine, threads and processes."""
    cores = len(_cores())
    return Circumstances(
        batch_size=batch_size,
        machine=f"{_processor()}, {cores} core{'s' * (cores != 1)}",
        threads=str(torch.get_num_threads()),
        processes=str(processes),
    )


class OtherLoad:
    """How busy other programs keep the cores that this process may use, from when it is made."""

    def __init__(self) -> None:
        self._whole, self._busy, self._own = _seconds()

    def share(self) -> float | None:
        """0 to 1: of the cores' time; None where too little has passed to tell."""
        whole, busy, own = (
            now - then for now, then in zip(_seconds(), (self._whole, self._busy, self._own), strict=True)
        )
        return None if whole <= 0 else min(1.0, max(0.0, (busy - own) / whole))


def _seconds() -> tuple[float, float, float]:
    """Of the cores: that have passed, that something worked, and that this process and its finished children did."""
    times = psutil.cpu_times(percpu=True)
    whole = busy = 0.0
    for core in _cores():
        # A guest's time is part of its user's.
        passed = sum(times[core]) - getattr(times[core], "guest", 0.0) - getattr(times[core], "guest_nice", 0.0)
        whole += passed
        busy += passed - times[core].idle - getattr(times[core], "iowait", 0.0)
    return whole, busy, sum(os.times()[:4])


def _cores() -> list[int]:
    # macOS has no affinity.
    cores = getattr(os, "sched_getaffinity", lambda _: range(psutil.cpu_count() or 1))(0)
    return [core for core in sorted(cores) if core < (psutil.cpu_count() or 1)]


def _processor() -> str:
    """Its name as Linux has it; elsewhere what Python knows."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8", errors="replace").splitlines() if about.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
