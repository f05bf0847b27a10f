"""Plots of measured information; each is written as PNG and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from PIL import Image

from lmms_prune.information.aggregate import interval
from lmms_prune.information.horizon import LITTLE, Horizon
from lmms_prune.leaderboard.benchmarks import BENCHMARKS, ORDER, TASKS
from lmms_prune.terminal import drawing
from lmms_prune.terminal.appearance import COLOURS, of_method, of_series
from lmms_prune.terminal.drawing import mpl, pyplot, wrapped

# Legend names and styles of the two references in a plot of kept information. They are no methods, so they have no marker.
REFERENCES: dict[str, tuple[str, dict[str, Any]]] = {
    "most": ("most possible (oracle)", {"color": COLOURS["ink"], "linestyle": ":"}),
    "mean": ("as many average tokens", {"color": COLOURS["grey"], "linestyle": "--"}),
}
BAND = 0.13  # opacity of a 95 % interval


def task_title(task: str) -> str:
    """A benchmark's name, with the task's own name if it is not the benchmark's usual task; else the task's name."""
    benchmark = TASKS.get(task)
    if benchmark is None:
        return task
    return benchmark.name if task == benchmark.tasks[0] else f"{benchmark.name} ({task})"


def save(figure: Any, path: Path) -> list[Path]:
    """Write a figure to `path` with the endings .png and .svg; returns both paths."""
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    # No date, and element names from a fixed salt: the same numbers must give the same bytes.
    with mpl.rc_context({"svg.hashsalt": path.name}):
        drawing.save(figure, files[0], dpi=130)
        drawing.save(figure, files[1], dpi=130, metadata={"Date": None})
    return files


def draw_layers(layers: pd.DataFrame, title: str, path: Path) -> list[Path]:
    """Plot mean information with its interval, and variance over tokens, per layer: the paper's Figures 7a and 8."""
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7.5, 7), sharex=True, layout="constrained")
    for task, group in layers.groupby("task", sort=False):
        style = _task_style(str(task))
        above.plot(group.layer, group["mean"], markersize=4, label=task_title(str(task)), **style)
        above.fill_between(group.layer, group.low, group.high, color=style["color"], alpha=BAND, linewidth=0)
        below.plot(group.layer, group.variance, markersize=4, **style)
    above.axhline(0, color="grey", linewidth=0.8)
    above.set_ylabel("mean information of a visual token\n(probability; band: 95 %)")
    below.set_ylabel("variance over visual tokens\n(probability²)")
    _number_layers(below)
    _legend_below(figure, above)
    figure.suptitle(wrapped(title, figure, 10), fontsize=10)
    return save(figure, path)


def draw_heatmaps(
    image: Image.Image, maps: Sequence[tuple[int, np.ndarray]], title: str, path: Path, columns: int = 4
) -> list[Path]:
    """Draw the information of an image's visual tokens over the image, one panel per layer: the paper's Figure 7b.

    Red raises the answer's probability, blue lowers it. All panels have one scale, that of the colour bar, so that a layer
    without information is pale; each title has the layer's own largest value.
    """
    lines = -(-(len(maps) + 1) // columns)
    wide = image.width / image.height
    figure, axes = pyplot.subplots(
        lines,
        columns,
        figsize=(2.4 * columns + 0.9, lines * (2.4 / wide + 0.45) + 0.7),
        squeeze=False,
        layout="constrained",
    )
    for panel in axes.flat:
        panel.axis("off")
    panels = iter(axes.flat)
    first = next(panels)
    first.imshow(image)
    first.set_title("what the model sees", fontsize=8)
    most = max((float(np.abs(values).max()) for _, values in maps), default=0.0) or 1.0
    drawn = None
    for layer, values in maps:
        panel = next(panels)
        extent = (0, values.shape[1], values.shape[0], 0)
        panel.imshow(image.convert("L"), cmap="gray", extent=extent, alpha=0.45)
        drawn = panel.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.65, extent=extent)
        panel.set_title(f"layer {layer}, at most ±{float(np.abs(values).max()):.2g}", fontsize=8)
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=axes, shrink=0.8, pad=0.02)
        bar.set_label("information of a visual token\n(change of the right answer's probability)", fontsize=8)
        bar.ax.tick_params(labelsize=8)
    figure.suptitle(wrapped(title, figure, 9), fontsize=9)
    return save(figure, path)


def draw_kept(kept: pd.DataFrame, title: str, path: Path) -> list[Path]:
    """Plot the sum of information that each method keeps at each layer, one panel per keep: Figures 5 and 12.

    Args:
        kept: the table of `kept_information`; the band is the 95 % interval of the mean over its documents. A table of
            means has one line per method, keep and layer, and is drawn without bands.
        title: above the figure.
        path: of the files, without an ending.
    """
    keeps = list(kept["keep"].unique())
    figure, panels = pyplot.subplots(
        1, len(keeps), figsize=(1.5 + 4.2 * len(keeps), 4.6), squeeze=False, layout="constrained"
    )
    banded = len(kept) > len(kept[["keep", "method", "layer"]].drop_duplicates())
    for keep, panel in zip(keeps, panels[0], strict=True):
        for number, (method, lines) in enumerate(kept[kept["keep"] == keep].groupby("method", sort=False)):
            by_layer = lines.groupby("layer").information
            name, style = REFERENCES.get(str(method)) or (str(method), of_method(str(method)).line)
            panel.plot(by_layer.mean().index, by_layer.mean(), markersize=_sized(number), label=name, **style)
            if banded:
                spans = {layer: interval(values.tolist(), 1000, 0) for layer, values in by_layer}
                low, high = zip(*spans.values(), strict=True)
                panel.fill_between(list(spans), low, high, color=style["color"], alpha=BAND, linewidth=0)
        panel.set_title(_keep_title(keep), fontsize=9)
        _number_layers(panel)
    band = "; band: 95 %" if banded else ""
    panels[0, 0].set_ylabel(f"information kept\n(probability, sum over kept tokens{band})")
    _legend_below(figure, panels[0, 0])
    figure.suptitle(wrapped(title, figure, 10), fontsize=10)
    return save(figure, path)


def _task_style(task: str) -> dict[str, Any]:
    """The colour and marker of a benchmark, in all figures the same."""
    if (benchmark := TASKS.get(task)) in BENCHMARKS:
        return of_series(BENCHMARKS.index(benchmark)).line
    return of_series(len(BENCHMARKS) + ORDER.get(task, 0)).line


def _number_layers(panel: Any) -> None:
    panel.set_xlabel("decoder layer")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _sized(number: int) -> float:
    """The marker size of a panel's line number `number`: where lines coincide, the earlier ones' markers look out."""
    return max(3.5, 8 - 1.2 * number)


def _legend_below(figure: Any, *panels: Any) -> None:
    """One legend for all panels, below them: it hides no data."""
    handles = [handle for panel in panels for handle in panel.get_legend_handles_labels()[0]]
    # A line of text of 8 points is about half as wide as it is high, and each entry has a sample of its line.
    longest = max((len(str(handle.get_label())) for handle in handles), default=1)
    fitting = int(figure.get_figwidth() * 72 / (8 * 0.55 * longest + 42))
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=min(6, max(1, fitting)))


def _keep_title(keep: float | str) -> str:
    """The title of a panel: a ratio, or a count such as ``60t``."""
    return f"keeps {str(keep)[:-1]} tokens" if str(keep).endswith("t") else f"keeps {float(keep):.0%}"


def draw_horizon(horizon: Horizon, title: str, path: Path) -> list[Path]:
    """Plot the score without visual tokens from each layer on, mean information, and the horizon: Figure 8."""
    figure, panel = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    layers, removed = horizon.layers, of_method("vtw").line
    panel.axhline(layers.full.iloc[0], color=COLOURS["ink"], linestyle=":", linewidth=1, label="unpruned")
    panel.plot(layers.layer, layers.score, markersize=5, label="score, all visual tokens removed", **removed)
    if "score_low" in layers:
        panel.fill_between(
            layers.layer, layers.score_low, layers.score_high, color=removed["color"], alpha=BAND, label="its 95 %"
        )
    panel.set_ylabel(_score_unit(horizon.task))
    _number_layers(panel)
    panel.axvspan(horizon.low, horizon.high, color=COLOURS["sky"], alpha=0.2, label="95 % of the horizon")
    panel.axvline(horizon.layer, color=COLOURS["ink"], label=f"horizon: layer {horizon.layer}")
    axes = [panel]
    if horizon.by_divergence is not None:
        colour = COLOURS["vermilion"]
        axes.append(other := panel.twinx())
        other.plot(layers.layer, layers["mean"], color=colour, marker="s", markersize=3, label="mean information")
        other.axhline(0, color=colour, linewidth=0.5)
        other.axhspan(-LITTLE, LITTLE, color=colour, alpha=0.07, label=f"information below {LITTLE}")
        other.set_ylabel("mean information (probability)", color=colour)
        panel.axvline(
            horizon.by_divergence,
            color=COLOURS["purple"],
            linestyle="--",
            label=f"VTW's criterion: layer {horizon.by_divergence}",
        )
    _legend_below(figure, *axes)
    panel.set_title(wrapped(title, figure, 10), fontsize=10)
    return save(figure, path)


def _score_unit(task: str) -> str:
    benchmark = TASKS.get(task)
    return (
        "score (percent)"
        if benchmark is None or benchmark.best_score == 100
        else f"score (of {benchmark.best_score:g})"
    )


def draw_horizons(horizons: Sequence[Horizon], title: str, path: Path) -> list[Path]:
    """Plot all tasks of a model in one panel, with their horizons as lines of the same colours: Figure 9.

    Scores without visual tokens are in percent of each task's unpruned score, so that tasks of different scales compare.
    """
    figure, panel = pyplot.subplots(figsize=(7.5, 4.8), layout="constrained")
    panel.axhline(100, color="grey", linestyle=":", linewidth=1)
    for horizon in horizons:
        layers, full = horizon.layers, float(horizon.layers.full.iloc[0])
        if full == 0:  # nothing is right, so no share of it can be drawn
            continue
        label, style = f"{task_title(horizon.task)}: {horizon.layer}", _task_style(horizon.task)
        panel.plot(layers.layer, 100 * layers.score / full, markersize=4, label=label, **style)
        panel.axvspan(horizon.low, horizon.high, color=style["color"], alpha=0.06)
        panel.axvline(horizon.layer, color=style["color"], linestyle="--", linewidth=1.2)
    panel.set_ylabel("score without visual tokens (percent of unpruned)")
    _number_layers(panel)
    panel.set_xlabel("decoder layer (dashed: the horizon, shaded: its 95 %)")
    _legend_below(figure, panel)
    panel.set_title(wrapped(title, figure, 10), fontsize=10)
    return save(figure, path)


def draw_methods(scores: pd.DataFrame, full: float, title: str, path: Path) -> list[Path]:
    """Plot the scores of methods as the only stage, by its layer, one panel per keep: Figures 1, 2 and 10.

    Args:
        scores: columns method, layer, keep and score; with low and high, the 95 % interval is drawn as a band.
        full: the unpruned score.
        title: above the figure.
        path: of the files, without an ending.
    """
    keeps = list(scores["keep"].unique())
    figure, panels = pyplot.subplots(
        1, len(keeps), figsize=(1.5 + 4.2 * len(keeps), 4.6), squeeze=False, sharey=True, layout="constrained"
    )
    for keep, panel in zip(keeps, panels[0], strict=True):
        panel.axhline(full, color="grey", linestyle=":", label="unpruned")
        for number, (method, group) in enumerate(scores[scores["keep"] == keep].groupby("method", sort=False)):
            name = str(method).removesuffix(" (oracle)")
            style = of_method(name).line
            dotted = ":" if name != method else "-"  # an oracle knows the answers
            panel.plot(group.layer, group.score, dotted, markersize=_sized(number), label=method, **style)
            if "low" in group:
                panel.fill_between(group.layer, group.low, group.high, color=style["color"], alpha=BAND, linewidth=0)
        panel.set_title(_keep_title(keep), fontsize=9)
        _number_layers(panel)
    panels[0, 0].set_ylabel("score" + ("; band: its 95 %" if "low" in scores else ""))
    _legend_below(figure, panels[0, 0])
    figure.suptitle(wrapped(title, figure, 10), fontsize=10)
    return save(figure, path)
