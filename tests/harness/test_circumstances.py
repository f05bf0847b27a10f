"""What changes a run's time and none of its answers."""

from __future__ import annotations

import os
from typing import NamedTuple

import psutil
import pytest
import torch

from lmms_prune.harness import circumstances as module
from lmms_prune.harness.circumstances import OtherLoad, circumstances


class Times(NamedTuple):
    """Of one core, as Linux counts them; a guest's are in the user's, too."""

    user: float
    system: float
    idle: float
    iowait: float = 0.0
    guest: float = 0.0


@pytest.mark.parametrize(
    ("later", "own", "share"),
    [
        ([Times(10, 0, 0), Times(0, 0, 10)], 10.0, 0.0),  # one core, all of it this process's
        ([Times(10, 0, 0), Times(6, 2, 2)], 10.0, 0.4),  # others had 8 of 20 seconds
        ([Times(0, 0, 4, iowait=6), Times(0, 0, 10)], 0.0, 0.0),  # waiting for a disk is no work
        ([Times(5, 0, 5, guest=5), Times(0, 0, 10)], 0.0, 0.25),
        ([Times(1, 0, 9), Times(0, 0, 10)], 3.0, 0.0),  # clocks of different grain
        ([Times(0, 0, 0), Times(0, 0, 0)], 0.0, None),
    ],
)
def test_the_load_is_what_others_take_of_the_cores(
    later: list[Times], own: float, share: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [[Times(0, 0, 0), Times(0, 0, 0)], 0.0]
    monkeypatch.setattr(module, "_cores", lambda: [0, 1])
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: [*now[0], Times(1000, 0, 0)])  # a core of somebody else's
    monkeypatch.setattr(os, "times", lambda: (now[1] / 2, 0.0, now[1] / 4, now[1] / 4, 99.0))
    load = OtherLoad()
    now[:] = [later, own]
    assert load.share() == (share if share is None else pytest.approx(share))


def test_machine_threads_and_processes_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_cores", lambda: [3])
    recorded = circumstances("auto", 2)
    assert recorded.machine.endswith(", 1 core")
    assert len(recorded.machine) > len(", 1 core")
    assert (recorded.threads, recorded.processes) == (str(torch.get_num_threads()), "2")
    assert (recorded.batch_size, recorded.largest_batch, recorded.other_load) == ("auto", None, None)


def test_a_load_is_measured_on_this_machine() -> None:
    load = OtherLoad()
    list(range(3_000_000))
    share = load.share()
    assert share is None or 0 <= share <= 1
    assert module._cores()
