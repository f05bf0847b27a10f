"""Reports of `time_schedules`: tables, a chart and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lmms_prune.bench.clock import clock_name
from lmms_prune.bench.gains import WORTH, BreakEven, break_even
from lmms_prune.bench.ratios import legend, signs
from lmms_prune.bench.schedules import ScheduleTiming
from lmms_prune.bench.spans import PARTS
from lmms_prune.terminal.appearance import COLOURS, of_method

_COLOURS = {"encoder": "grey", "selection": "vermilion", "prefill": "blue", "decode": "sky"}
_CAPTION = (
    "ideal: the speed-up that the FLOPs promise; realised: the unpruned model's time over this one's; fraction: "
    f"realised / ideal; ≥ {WORTH}x: the numbers of new tokens at which so much is realised"
)


def tables(measured: Sequence[ScheduleTiming], title: str, device: str) -> list[Table]:
    """Return a table for each workload, in milliseconds of the device's clock."""
    break_evens = _break_evens(measured)
    workload_tables = []
    for workload, group in groupby(measured, key=lambda timing: timing.case):
        heading = f"{title}, {clock_name(device)}\n{workload}"
        table = Table(title=heading, box=box.SIMPLE, padding=0, pad_edge=False, caption=_CAPTION)
        table.add_column("schedule", overflow="fold")
        # Line breaks keep the table within 80 columns.
        gained = ("ideal", "real-\nised", "frac-\ntion", f"≥ {WORTH}x")
        for head in ("ms ± 95 %", "encoder", "select", "prefill", "decode", *gained):
            table.add_column(head, justify="right", no_wrap=True)
        for timing in group:
            time = f"{_ms(timing.seconds)} ±{_ms((timing.high - timing.low) / 2)}"
            gains = ["", "", "", ""]
            if timing.schedule != "none":
                shown, end = signs(timing.marks), break_evens[_line(timing)]
                speedups = [f"{timing.ideal_speedup:.2f}x", f"{timing.realised_speedup:.2f}x{shown}"]
                gains = [*speedups, f"{timing.realised_fraction:.0%}{shown}", f"{end}{signs(end.marks)}"]
            name = timing.schedule.replace(",", ",\n")
            table.add_row(name, time, *(_ms(timing.parts[part]) for part in PARTS), *gains)
        timings = [timing for timing in measured if timing.case == workload]
        lines = [_CAPTION]
        if any(timing.peak_bytes is not None for timing in timings):
            lines.append(f"peak memory in GiB (by arithmetic), line by line: {', '.join(map(_memory, timings))}")
        shown_marks = [timing.marks for timing in timings] + [break_evens[_line(timing)].marks for timing in timings]
        table.caption = "\n".join([*lines, *legend(shown_marks)])
        workload_tables.append(table)
    return workload_tables


def described(measured: Sequence[ScheduleTiming]) -> dict[str, Any]:
    """Return the content for ``--json``, with the field names of `ScheduleTiming` and `BreakEven`."""
    break_evens = [
        {"schedule": schedule, "batch": batch, "text_tokens": text, **asdict(end)}
        for (schedule, batch, text), end in _break_evens(measured).items()
        if schedule != "none"
    ]
    return {"runs": [asdict(timing) for timing in measured], "break_even": break_evens}


def chart(measured: Sequence[ScheduleTiming], path: Path, title: str, device: str) -> None:
    """Draw each schedule's time as a bar of its parts, with its interval, one panel per workload."""
    from lmms_prune.terminal.drawing import pyplot, save

    workloads = list(dict.fromkeys(timing.case for timing in measured))
    names = list(dict.fromkeys(timing.schedule for timing in measured))
    figure, panels = pyplot.subplots(
        len(workloads),
        1,
        figsize=(8.5, 1.3 + len(workloads) * (0.75 + 0.33 * len(names))),
        squeeze=False,
        layout="constrained",
    )
    for workload, panel in zip(workloads, panels[:, 0], strict=True):
        timings = [timing for timing in measured if timing.case == workload]
        for bar, timing in enumerate(timings):
            left = 0.0
            for part in PARTS:
                width = timing.parts[part] * 1e3
                panel.barh(bar, width, left=left, color=COLOURS[_COLOURS[part]], label=part if bar == 0 else None)
                left += width
            errors = [[1e3 * (timing.seconds - timing.low)], [1e3 * (timing.high - timing.seconds)]]
            panel.errorbar(timing.seconds * 1e3, bar, xerr=errors, color="black", capsize=3, linewidth=1)
            speedup = (
                ""
                if timing.schedule == "none"
                else f"  {timing.realised_speedup:.2f}x{signs(timing.marks)} ({timing.ideal_speedup:.2f}x by FLOPs)"
            )
            panel.text(max(left, timing.high * 1e3), bar, speedup, va="center", fontsize=8)
            # The first method's marker, as in all figures, on the axis: nothing of a bar is hidden.
            style = of_method(timing.schedule.partition("@")[0]).line
            panel.plot(0, bar, markersize=7, markeredgecolor="white", clip_on=False, zorder=5, **style)
        panel.set_yticks(range(len(timings)), [timing.schedule for timing in timings], fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.28)
        panel.set_title(str(workload), fontsize=9)
    panels[-1, 0].set_xlabel(
        "\n".join([f"milliseconds of {clock_name(device)} (black: 95 % interval)", *legend(t.marks for t in measured)]),
        fontsize=8,
    )
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=len(PARTS))
    figure.suptitle(title, fontsize=10)
    save(figure, path, dpi=120)


def _line(timing: ScheduleTiming) -> tuple[str, int, int]:
    return timing.schedule, timing.case.batch, timing.case.text_tokens


def _break_evens(measured: Sequence[ScheduleTiming]) -> dict[tuple[str, int, int], BreakEven]:
    """Return each schedule's break-even length, by schedule, batch and text length."""
    lines: dict[tuple[str, int, int], list[ScheduleTiming]] = {}
    for timing in measured:
        lines.setdefault(_line(timing), []).append(timing)
    return {key: break_even(points, lines[("none", *key[1:])]) for key, points in lines.items()}


def _memory(timing: ScheduleTiming) -> str:
    peak = "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 2**30:.2f}"
    return f"{peak} ({timing.predicted_peak_bytes / 2**30:.2f})"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.{1 if seconds < 1 else 0}f}"
