"""What `time_schedules` measured, as tables, as a picture and as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from lmms_prune.bench.gains import WORTH, BreakEven, break_even
from lmms_prune.bench.schedules import PARTS, ScheduleTiming

_COLOURS = {"tower": "#7f7f7f", "selection": "#d62728", "prefill": "#1f77b4", "decode": "#aec7e8"}
_CAPTION = (
    "ideal: the speed-up that the FLOPs promise; realised: the unpruned model's time over this one's; fraction: "
    f"realised / ideal; ≥ {WORTH}x: the numbers of new tokens at which so much is realised"
)


def tables(measured: Sequence[ScheduleTiming], title: str) -> list[Table]:
    """A table for each case, in milliseconds."""
    ends = _ends(measured)
    made = []
    for case, group in groupby(measured, key=lambda one: one.case):
        heading = f"{title}\nbatch {case.batch}, {case.text_tokens} text tokens, {case.new_tokens} new tokens"
        table = Table(title=heading, box=box.SIMPLE, padding=0, pad_edge=False, caption=_CAPTION)
        table.add_column("schedule", overflow="fold")
        # Broken, so that 80 columns hold them.
        gained = ("ideal", "real-\nised", "frac-\ntion", f"≥ {WORTH}x")
        for head in ("ms ± 95 %", "tower", "select", "prefill", "decode", *gained):
            table.add_column(head, justify="right", no_wrap=True)
        for one in group:
            time = f"{_ms(one.seconds)} ±{_ms((one.high - one.low) / 2)}"
            gains = ["", "", "", ""]
            if one.schedule != "none":
                speedups = [f"{one.ideal_speedup:.2f}x", f"{one.realised_speedup:.2f}x"]
                gains = [*speedups, f"{one.realised_fraction:.0%}", str(ends[_line(one)])]
            name = one.schedule.replace(",", ",\n")
            table.add_row(name, time, *(_ms(one.parts[part]) for part in PARTS), *gains)
        if peaks := [one.peak_bytes for one in measured if one.case == case and one.peak_bytes is not None]:
            table.caption = f"{_CAPTION}\npeak memory in GiB, line by line: " + ", ".join(
                f"{peak / 2**30:.2f}" for peak in peaks
            )
        made.append(table)
    return made


def described(measured: Sequence[ScheduleTiming]) -> dict[str, Any]:
    """For ``--json``, in the names of `ScheduleTiming` and `BreakEven`."""
    ends = [
        {"schedule": schedule, "batch": batch, "text_tokens": text, **asdict(end)}
        for (schedule, batch, text), end in _ends(measured).items()
        if schedule != "none"
    ]
    return {"runs": [asdict(one) for one in measured], "break_even": ends}


def chart(measured: Sequence[ScheduleTiming], path: Path, title: str) -> None:
    """Draw each schedule's time as a bar of its parts, with its interval: a panel for each case."""
    from lmms_prune.terminal.drawing import pyplot, save

    cases = list(dict.fromkeys(one.case for one in measured))
    names = list(dict.fromkeys(one.schedule for one in measured))
    figure, panels = pyplot.subplots(
        len(cases), 1, figsize=(8.5, 1.3 + len(cases) * (0.75 + 0.33 * len(names))), squeeze=False, layout="constrained"
    )
    for case, panel in zip(cases, panels[:, 0], strict=True):
        here = [one for one in measured if one.case == case]
        for place, one in enumerate(here):
            left = 0.0
            for part in PARTS:
                width = one.parts[part] * 1e3
                panel.barh(place, width, left=left, color=_COLOURS[part], label=part if place == 0 else None)
                left += width
            error = [[1e3 * (one.seconds - one.low)], [1e3 * (one.high - one.seconds)]]
            panel.errorbar(one.seconds * 1e3, place, xerr=error, color="black", capsize=3, linewidth=1)
            said = (
                "" if one.schedule == "none" else f"  {one.realised_speedup:.2f}x ({one.ideal_speedup:.2f}x by FLOPs)"
            )
            panel.text(max(left, one.high * 1e3), place, said, va="center", fontsize=8)
        panel.set_yticks(range(len(here)), [one.schedule for one in here], fontsize=8)
        panel.invert_yaxis()
        panel.margins(x=0.28)
        panel.set_title(f"batch {case.batch}, {case.text_tokens} text and {case.new_tokens} new tokens", fontsize=9)
    panels[-1, 0].set_xlabel("milliseconds")
    figure.legend(*panels[0, 0].get_legend_handles_labels(), fontsize=8, loc="outside lower center", ncols=len(PARTS))
    figure.suptitle(title, fontsize=10)
    save(figure, path, dpi=120)


def _line(one: ScheduleTiming) -> tuple[str, int, int]:
    return one.schedule, one.case.batch, one.case.text_tokens


def _ends(measured: Sequence[ScheduleTiming]) -> dict[tuple[str, int, int], BreakEven]:
    """Where each schedule's gain ends or begins, at each batch and text length."""
    lines: dict[tuple[str, int, int], list[ScheduleTiming]] = {}
    for one in measured:
        lines.setdefault(_line(one), []).append(one)
    return {key: break_even(points, lines[("none", *key[1:])]) for key, points in lines.items()}


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.{1 if seconds < 1 else 0}f}"
