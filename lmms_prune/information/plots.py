"""Plots of measured information; each is written as PNG and as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from PIL import Image

from lmms_prune.information.horizon import LITTLE, Horizon
from lmms_prune.terminal import drawing
from lmms_prune.terminal.drawing import mpl, pyplot, wrapped

# Legend names and styles of the two references and the control in a plot of kept information.
KEPT: dict[str, tuple[str, dict[str, str]]] = {
    "most": ("most possible (oracle)", {"color": "black", "linestyle": ":"}),
    "mean": ("as many average tokens", {"color": "grey", "linestyle": "--"}),
    "random": ("random", {"color": "black"}),
}


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
    figure, (above, below) = pyplot.subplots(2, 1, figsize=(7.5, 6.5), sharex=True, layout="constrained")
    for task, group in layers.groupby("task", sort=False):
        [line] = above.plot(group.layer, group["mean"], marker="o", markersize=3, label=task)
        above.fill_between(group.layer, group.low, group.high, color=line.get_color(), alpha=0.15)
        below.plot(group.layer, group.variance, marker="o", markersize=3, color=line.get_color())
    above.axhline(0, color="grey", linewidth=0.8)
    above.set_ylabel("mean information (probability, 95 %)")
    below.set_ylabel("variance over visual tokens")
    below.set_xlabel("decoder layer")
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    above.legend(fontsize=8, ncols=2)
    above.set_title(title, fontsize=10)
    return save(figure, path)


def draw_heatmaps(
    image: Image.Image, maps: Sequence[tuple[int, np.ndarray]], title: str, path: Path, columns: int = 4
) -> list[Path]:
    """Draw the information of an image's visual tokens over the image, one panel per layer: the paper's Figure 7b.

    Red raises the answer's probability, blue lowers it. Each panel has its own scale, given in its title.
    """
    lines = -(-(len(maps) + 1) // columns)
    wide = image.width / image.height
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(2.4 * columns, lines * (2.4 / wide + 0.45) + 0.4), squeeze=False, layout="constrained"
    )
    for panel in axes.flat:
        panel.axis("off")
    panels = iter(axes.flat)
    first = next(panels)
    first.imshow(image)
    first.set_title("what the model sees", fontsize=8)
    for layer, values in maps:
        panel = next(panels)
        most = float(np.abs(values).max()) or 1.0
        panel.imshow(image.convert("L"), cmap="gray", extent=(0, values.shape[1], values.shape[0], 0), alpha=0.45)
        panel.imshow(
            values, cmap="RdBu_r", vmin=-most, vmax=most, alpha=0.65, extent=(0, values.shape[1], values.shape[0], 0)
        )
        panel.set_title(f"layer {layer}, ±{most:.2g}", fontsize=8)
    figure.suptitle(wrapped(title, figure, 9), fontsize=9)
    return save(figure, path)


def draw_kept(kept: pd.DataFrame, title: str, path: Path) -> list[Path]:
    """Plot the sum of information that each method keeps at each layer, one panel per keep: Figures 5 and 12."""
    keeps = list(kept["keep"].unique())
    figure, panels = pyplot.subplots(
        1, len(keeps), figsize=(1.5 + 4.2 * len(keeps), 4), squeeze=False, layout="constrained"
    )
    averaged = kept.groupby(["keep", "method", "layer"], sort=False).information.mean().reset_index()
    for keep, panel in zip(keeps, panels[0], strict=True):
        selected = averaged[averaged["keep"] == keep]
        for method, group in selected.groupby("method", sort=False):
            name, style = KEPT.get(str(method), (method, {}))
            panel.plot(group.layer, group.information, marker="o", markersize=3, label=name, **style)
        panel.set_title(_keep_title(keep), fontsize=9)
        panel.set_xlabel("decoder layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0, 0].set_ylabel("information kept (sum over tokens)")
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return save(figure, path)


def _keep_title(keep: float | str) -> str:
    """The title of a panel: a ratio, or a count such as ``60t``."""
    return f"keeps {str(keep)[:-1]} tokens" if str(keep).endswith("t") else f"keeps {float(keep):.0%}"


def draw_horizon(horizon: Horizon, title: str, path: Path) -> list[Path]:
    """Plot the score without visual tokens from each layer on, mean information, and the horizon: Figure 8."""
    figure, panel = pyplot.subplots(figsize=(7, 4), layout="constrained")
    layers = horizon.layers
    panel.axhline(layers.full.iloc[0], color="tab:blue", linestyle=":", linewidth=1, label="unpruned")
    panel.plot(
        layers.layer, layers.score, color="tab:blue", marker="o", markersize=3, label="all visual tokens removed"
    )
    panel.set_ylabel("score", color="tab:blue")
    panel.set_xlabel("decoder layer")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.axvspan(horizon.low, horizon.high, color="grey", alpha=0.15, label="95 % of the horizon")
    panel.axvline(horizon.layer, color="black", label=f"horizon: layer {horizon.layer}")
    axes = [panel]
    if horizon.by_divergence is not None:
        axes.append(other := panel.twinx())
        other.plot(layers.layer, layers["mean"], color="tab:red", marker="s", markersize=3, label="mean information")
        other.axhline(0, color="tab:red", linewidth=0.5)
        other.axhspan(-LITTLE, LITTLE, color="tab:red", alpha=0.07, label=f"information below {LITTLE}")
        other.set_ylabel("mean information (probability)", color="tab:red")
        panel.axvline(
            horizon.by_divergence, color="grey", linestyle="--", label=f"VTW's criterion {horizon.by_divergence}"
        )
    handles = [line for axis in axes for line in axis.get_legend_handles_labels()[0]]
    figure.legend(handles=handles, fontsize=8, loc="outside lower center", ncols=4)
    panel.set_title(title, fontsize=10)
    return save(figure, path)


def draw_horizons(horizons: Sequence[Horizon], title: str, path: Path) -> list[Path]:
    """Plot all tasks of a model in one panel, with their horizons as lines of the same colours: Figure 9.

    Scores without visual tokens are in percent of each task's unpruned score, so that tasks of different scales compare.
    """
    figure, panel = pyplot.subplots(figsize=(7.5, 4.5), layout="constrained")
    panel.axhline(100, color="grey", linestyle=":", linewidth=1)
    for horizon in horizons:
        layers, full = horizon.layers, float(horizon.layers.full.iloc[0])
        if full == 0:  # nothing is right, so no share of it can be drawn
            continue
        label = f"{horizon.task}: {horizon.layer}"
        [line] = panel.plot(layers.layer, 100 * layers.score / full, marker="o", markersize=3, label=label)
        panel.axvspan(horizon.low, horizon.high, color=line.get_color(), alpha=0.06)
        panel.axvline(horizon.layer, color=line.get_color(), linestyle="--", linewidth=1.2)
    panel.set_ylabel("score without visual tokens, % of unpruned")
    panel.set_xlabel("decoder layer (dashed: the horizon, shaded: its 95 %)")
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    panel.set_title(title, fontsize=10)
    return save(figure, path)


def draw_methods(scores: pd.DataFrame, full: float, title: str, path: Path) -> list[Path]:
    """Plot the scores of methods as the only stage, by its layer, one panel per keep: Figures 1, 2 and 10."""
    keeps = list(scores["keep"].unique())
    figure, panels = pyplot.subplots(
        1, len(keeps), figsize=(1.5 + 4.2 * len(keeps), 4), squeeze=False, sharey=True, layout="constrained"
    )
    for keep, panel in zip(keeps, panels[0], strict=True):
        panel.axhline(full, color="grey", linestyle=":", label="unpruned")
        for method, group in scores[scores["keep"] == keep].groupby("method", sort=False):
            style = {"color": "black"} if method == "random" else {}
            panel.plot(group.layer, group.score, marker="o", markersize=3, label=method, **style)
        panel.set_title(_keep_title(keep), fontsize=9)
        panel.set_xlabel("decoder layer")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0, 0].set_ylabel("score")
    panels[0, 0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return save(figure, path)
