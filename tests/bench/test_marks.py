"""Ratios of times that are no result are marked, and on a CPU only computing counts as time."""

from __future__ import annotations

import json
import time
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from test_bench import made
from tiny import Family

from lmms_prune.bench import information, selection, throughput
from lmms_prune.bench.clock import Clock, timed
from lmms_prune.bench.gains import break_even
from lmms_prune.bench.ratios import ABOVE, MEANINGS, SIGNS, legend, merged, of_medians, ratio, signs
from lmms_prune.bench.report import chart, described, tables
from lmms_prune.bench.schedules import Workload, time_schedules
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.appearance import of_method

CPU = torch.device("cpu")


def test_waiting_is_no_time_on_a_cpu() -> None:
    """A core that another job holds is waited for just so."""
    (seconds,) = timed(lambda: time.sleep(0.3), 1, CPU)
    assert seconds < 0.1
    clock = Clock(CPU)
    start, mark = clock.now(), clock.mark()
    torch.ones(600, 600) @ torch.ones(600, 600)
    assert 0 < clock.between(mark, clock.mark()) <= clock.now() - start


@pytest.mark.parametrize(
    ("own", "other", "ideal", "expected"),
    [
        ([1.0, 1.01, 0.99], [1.0, 1.0, 1.01], None, ()),
        ([1.0, 1.5, 0.7], [1.0, 0.6, 1.4], None, ("wide",)),
        ([3.0, 3.0, 3.0], [1.0, 1.0, 1.0], 2.0, ("above",)),
        ([2.19, 2.19, 2.19], [1.0, 1.0, 1.0], 2.0, ()),
        ([2.21, 2.21, 2.21], [1.0, 1.0, 1.0], 2.0, ("above",)),
        ([5.0, 9.0, 1.0], [1.0, 1.0, 1.0], 2.0, ("wide", "above")),
        ([1.0], [1.0], 2.0, ("once",)),
        ([3.0], [1.0], 2.0, ("once", "above")),
    ],
)
def test_what_is_marked(own: list[float], other: list[float], ideal: float | None, expected: tuple[str, ...]) -> None:
    found = ratio(of_medians, own, other, ideal=ideal)
    assert set(found.marks) == set(expected)
    assert found.value == pytest.approx(np.median(own) / np.median(other))
    assert found.low <= found.value <= found.high


def test_a_mark_is_explained_in_one_line() -> None:
    assert set(SIGNS) == set(MEANINGS)
    assert merged([("above",), (), ("wide", "above")]) == ("wide", "above")
    assert signs(("wide", "above")) == "~!"
    lines = legend([("above",), ("above", "wide")])
    assert [line[0] for line in lines] == ["~", "!"]
    assert all("repeats" in line for line in lines)
    assert legend([(), ()]) == []


def test_a_machine_that_slows_the_unpruned_runs_is_seen(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a load: all unpruned runs seem four times as long, which no schedule can have saved."""
    now = Clock.now
    runs: list[float] = []

    def loaded_clock(clock: Clock) -> float:
        runs.append(now(clock))
        # Two readings a run; the unpruned model's come first in each repeat of two schedules.
        slow = len(runs) % 4 == 2
        return runs[-1] + (3 * (runs[-1] - runs[-2]) if slow else 0)

    monkeypatch.setattr(Clock, "now", loaded_clock)
    grid = None if family.name == "llava" else (6, 5)
    whole, kept = time_schedules(family.model, [Schedule.parse("random@1:1.0")], [Workload(1, 12, 1)], grid, 3)
    assert kept.realised_fraction > ABOVE
    assert "above" in kept.marks
    assert whole.marks == ()


def test_marks_are_in_table_json_and_plot(tmp_path: Path) -> None:
    runs = [made("none", 1, 1.0), made("vtw@4", 1, 1.0), made("none", 9, 1.0), made("vtw@4", 9, 1.0)]
    marked = [type(run)(**{**vars(run), "marks": ("wide", "above") if run.schedule != "none" else ()}) for run in runs]
    console = Console(width=200, record=True, file=StringIO())
    console.print(*tables(marked, "title", "cpu"))
    shown = console.export_text()
    assert "1.00x~!" in shown
    assert "80%~!" in shown
    assert "never~!" in shown
    assert "CPU time of all threads" in shown
    for mark in ("wide", "above"):
        assert MEANINGS[mark] in " ".join(shown.split())
    content = json.loads(json.dumps(described(marked)))
    assert [run["marks"] for run in content["runs"]] == [[], ["wide", "above"]] * 2
    assert content["break_even"][0]["marks"] == ["wide", "above"]
    chart(marked, tmp_path / "times.svg", "title", "cpu")
    drawn = (tmp_path / "times.svg").read_text(encoding="utf-8")  # matplotlib writes each text as a comment, too
    assert "1.00x~!" in drawn
    assert MEANINGS["above"].partition(":")[0] in drawn
    # Each schedule has its first method's colour, as in all figures, and the interval is explained.
    assert f"fill: {of_method('vtw').line['color']}" in drawn
    assert "black: 95 % interval" in drawn
    plain = Console(width=200, record=True, file=StringIO())
    plain.print(*tables(runs, "title", "cpu"))
    assert "~" not in plain.export_text()


def test_a_length_from_marked_times_is_marked() -> None:
    whole = [made("none", n, 1 + 0.02 * n) for n in (1, 32)]
    pruned = [made("x", n, 0.5 + 0.02 * n) for n in (1, 32)]
    pruned[1] = type(pruned[1])(**{**vars(pruned[1]), "marks": ("wide",)})
    assert break_even(pruned, whole).marks == ("wide",)


def test_selection_and_information_have_intervals_and_marks(family: Family, folders: dict[str, Path]) -> None:
    subject = selection.selection_model("", str(folders[family.name]), (6, 5), "cpu")
    _, (one,) = selection.time_selection(subject, ["random"], 1, 0.5, 1)
    assert one.marks == ("once",)
    _, (several,) = selection.time_selection(subject, ["random"], 1, 0.5, 3)
    assert several.low <= several.of_layer <= several.high
    assert "once" not in several.marks
    assert several.of_prefill == pytest.approx(several.of_layer / subject.layers)
    grid = None if family.name == "llava" else (6, 5)
    timing = information.time_information(family.model, [1], 3, grid, 12, 3)
    assert timing.low <= timing.ratio <= timing.high
    assert information.time_information(family.model, [1], 3, grid, 12, 1).marks == ("once",)


def test_throughput_that_noise_hides_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([10.0, 14.0, 10.0, 11.0, 10.0, 14.0, 10.9, 11.0, 10.0, 14.0, 9.5, 12.0])

    def run(options: list[str], include: Path, folder: Path | None) -> tuple[float, int]:
        return next(seconds), int(options[options.index("--limit") + 1])

    monkeypatch.setattr(throughput, "_run", run)
    arguments = ("llava_pruned", "pretrained=x", ["none"], "16", "pope", 4, 3, "cpu", Path())
    stock, ours = throughput.measure_throughput(*arguments, lambda line: None)
    assert (stock.relative, stock.marks) == (1, ())
    assert ours.relative == pytest.approx(4)
    assert ours.marks == ("wide",)
