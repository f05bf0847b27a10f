"""The suite's results as tables: one section for each kind of part."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmms_prune.bench.ratios import legend, signs

GIB = 2**30


@dataclass
class Section:
    """One table of the page.

    Args:
        title: its heading.
        note: how to read it.
        header: names of the columns; the first ones, `texts` in number, hold text.
        texts: see `header`.
        rows: cells as text.
        bars: for the plot: a label, the ideal speed-up, and the realised one with its interval and signs.
        marks: of all ratios in the table.
    """

    title: str
    note: str
    header: Sequence[str]
    texts: int = 2
    rows: list[list[str]] = field(default_factory=list)
    bars: list[dict[str, Any]] = field(default_factory=list)
    marks: list[Sequence[str]] = field(default_factory=list)

    @property
    def legend(self) -> list[str]:
        """One line for each mark that occurs."""
        return legend(self.marks)


def sections(content: Mapping[str, Any]) -> list[Section]:
    """Return the tables of the suite's JSON, in the order of `KINDS`; kinds without a result are left out."""
    tables = []
    for kind, (empty, add) in KINDS.items():
        section = empty()
        for part in content["parts"].values():
            if part["kind"] == kind and part["result"] is not None:
                add(section, part)
        if section.rows:
            tables.append(section)
    return tables


def _schedules() -> Section:
    note = (
        "Ideal: the speed-up that the FLOPs promise, with encoder and decode steps. Realised: the unpruned model's time over "
        "the schedule's. Memory: the highest that was allocated, and by arithmetic: weights, cache and one layer's activations."
    )
    gains = ("batch", "new tokens", "ms", "ideal", "realised", "95 %", "realised / ideal")
    return Section("Speed-up", note, ("model", "schedule", *gains, "peak GiB", "by arithmetic"))


def _add_schedules(section: Section, part: Mapping[str, Any]) -> None:
    compiled = ", compiled" if part["result"].get("compiled") else ""
    model = part["result"]["model"].partition(",")[0].rpartition("/")[2] + compiled
    for run in part["result"]["runs"]:
        unpruned, mark = run["schedule"] == "none", signs(run["marks"])
        case, peak = run["case"], run["peak_bytes"]
        bounds = f"{run['realised_low']:.2f}–{run['realised_high']:.2f}"
        realised = (f"{run['realised_speedup']:.2f}x{mark}", bounds, f"{run['realised_fraction']:.0%}{mark}")
        section.rows.append(
            [
                model,
                run["schedule"],
                str(case["batch"]),
                str(case["new_tokens"]),
                _ms(run["seconds"]),
                *(("", "", "", "") if unpruned else (f"{run['ideal_speedup']:.2f}x", *realised)),
                "–" if peak is None else f"{peak / GIB:.2f}",
                f"{run['predicted_peak_bytes'] / GIB:.2f}",
            ]
        )
        section.marks.append(run["marks"])
        if not unpruned:
            group = f"{model}, batch {case['batch']}"
            bar = {"order": (model, case["batch"]), "group": group, "label": run["schedule"], "sign": mark}
            ends = {"ideal": run["ideal_speedup"], "low": run["realised_low"], "high": run["realised_high"]}
            section.bars.append({**bar, **ends, "realised": run["realised_speedup"]})
    # Parts run by their value; readers look for a model and a batch.
    section.rows.sort(key=lambda row: (row[0], int(row[2])))
    section.bars.sort(key=lambda bar: bar["order"])


def _selection() -> Section:
    note = "Time of one stage's selection for the whole batch, as a share of all decoder layers' prefill."
    return Section("Selection", note, ("model", "method", "batch", "at layer", "ms", "of one layer", "of the prefill"))


def _add_selection(section: Section, part: Mapping[str, Any]) -> None:
    result = part["result"]
    for timing in sorted(result["methods"], key=lambda timing: timing["seconds"]):
        mark = signs(timing["marks"])
        shares = (f"{timing['of_layer']:.2%}{mark}", f"{timing['of_prefill']:.3%}{mark}")
        where = (result["family"], timing["method"], str(result["batch"]), str(timing["layer"]))
        section.rows.append([*where, _ms(timing["seconds"]), *shares])
        section.marks.append(timing["marks"])


def _throughput() -> Section:
    note = "From a document to its score, relative to lmms-eval's own wrapper, which answers one at a time; no start, no loading."
    return Section("Samples through lmms-eval", note, ("model", "task", "batch", "samples/s", "relative", "95 %"))


def _add_throughput(section: Section, part: Mapping[str, Any]) -> None:
    for run in part["result"]["runs"]:
        relative = f"{run['relative']:.2f}x{signs(run['marks'])}"
        bounds = _bounds(run, 2)
        name, per_second = run["name"], f"{run['per_second']:.1f}"
        section.rows.append([name, part["result"]["task"], run["batch_size"], per_second, relative, bounds])
        section.marks.append(run["marks"])


def _information() -> Section:
    note = "Measuring all visual tokens at all layers together, relative to one full run for each of them."
    return Section(
        "Information", note, ("model", "units", "layers", "together, s", "full runs, s", "relative", "95 %"), 1
    )


def _add_information(section: Section, part: Mapping[str, Any]) -> None:
    result = part["result"]
    bounds = _bounds(result, 1)
    cells = (str(result["units"]), str(result["layers"]), f"{result['seconds']:.2f}", f"{result['runs_seconds']:.1f}")
    model = result["model"].partition(",")[0].rpartition("/")[2]
    section.rows.append([model, *cells, f"{result['ratio']:.1f}x{signs(result['marks'])}", bounds])
    section.marks.append(result["marks"])


def _doctor() -> Section:
    note = "Every method, compared with a reference that removes nothing and only masks, in the prefill and 16 decode steps."
    return Section("Certificate", note, ("part", "attention", "types", "cells", "failed checks", "seconds"), 3)


def _add_doctor(section: Section, part: Mapping[str, Any]) -> None:
    result = part["result"]
    kernels = sorted({limit["attention"] for limit in result["limits"]})
    dtypes = sorted({limit["dtype"] for limit in result["limits"]})
    counts = (result["cells"], len(result["failures"]), round(result["seconds"]))
    section.rows.append([part["title"], ", ".join(kernels), ", ".join(dtypes), *map(str, counts)])


def _bounds(ratio: Mapping[str, Any], digits: int) -> str:
    """Return an interval as text; one run has none, nor has the baseline itself."""
    return "–" if ratio["low"] == ratio["high"] else f"{ratio['low']:.{digits}f}–{ratio['high']:.{digits}f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.{2 if seconds < 0.1 else 0}f}"


Add = Callable[[Section, Mapping[str, Any]], None]
KINDS: Mapping[str, tuple[Callable[[], Section], Add]] = {
    "schedules": (_schedules, _add_schedules),
    "selection": (_selection, _add_selection),
    "throughput": (_throughput, _add_throughput),
    "information": (_information, _add_information),
    "doctor": (_doctor, _add_doctor),
}
"""For each kind of part, an empty table and a function that adds one part's result to it."""
