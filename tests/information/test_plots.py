"""What the figures show: one scale, one look for each method, intervals, and legends beside the data."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex, to_rgb
from PIL import Image

from lmms_prune.information import plots
from lmms_prune.leaderboard.benchmarks import BENCHMARKS
from lmms_prune.methods import METHODS
from lmms_prune.terminal.appearance import COLOURS, MARKERS, METHOD_APPEARANCE, of_method, of_series

# Machado, Oliveira and Fernandes (2009), severity 1: what an eye with that colour blindness sees, in linear RGB.
SEEN_AS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.01182, 0.04294, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.3039]],
}
XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def lab(colour: str, eye: str) -> np.ndarray:
    """CIE Lab of a colour as an eye sees it; a distance of 2 is just noticeable."""
    values = np.array(to_rgb(colour))
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    relative = XYZ @ np.clip(np.array(SEEN_AS[eye]) @ linear, 0, 1) / np.array([0.9505, 1, 1.089])
    x, y, z = np.where(relative > 0.008856, np.cbrt(relative), 7.787 * relative + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", SEEN_AS)
def test_every_eye_tells_the_colours_apart(eye: str) -> None:
    for first, second in combinations(COLOURS, 2):
        distance = np.linalg.norm(lab(COLOURS[first], eye) - lab(COLOURS[second], eye))
        assert distance > 11, f"{first} and {second}: {distance:.1f}"


def test_every_method_has_an_appearance_of_its_own() -> None:
    assert set(METHOD_APPEARANCE) == {*METHODS, "none"}
    assert len(set(METHOD_APPEARANCE.values())) == len(METHOD_APPEARANCE)
    assert all(look.colour in COLOURS and look.marker in MARKERS for look in METHOD_APPEARANCE.values())
    assert of_method("sgl;guide=x") == of_method("sgl")
    # A user's own method looks like no built-in one, and the same each time.
    assert of_method("mymethod") == of_method("mymethod")
    assert of_method("mymethod") not in METHOD_APPEARANCE.values()
    assert len({of_series(number) for number in range(56)}) == 56
    # The benchmarks of docs/finding.md stand in one figure with their bands, which have no markers.
    together = ("POPE", "GQA", "TextVQA", "InfoVQA", "DocVQA")
    assert len({of_series(i).colour for i, one in enumerate(BENCHMARKS) if one.name in together}) == len(together)


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The figures that are drawn, laid out, in place of their files."""
    kept: list[Any] = []

    def keep(figure: Any, path: Path) -> list[Path]:
        figure.canvas.draw()
        kept.append(figure)
        return []

    monkeypatch.setattr(plots, "save", keep)
    return kept


def test_heat_maps_have_one_scale_a_colour_bar_and_the_question(figures: list[Any], tmp_path: Path) -> None:
    """A layer whose tokens are worth nothing must be pale where another's are worth everything."""
    maps = [(0, np.full((2, 2), 0.99)), (11, np.full((2, 2), -0.00017))]
    plots.draw_heatmaps(Image.new("RGB", (56, 56)), maps, "GQA: What is red?", tmp_path / "x")
    [figure] = figures
    scales = [panel.images[-1].get_clim() for panel in figure.axes[1:3]]
    assert scales == [(-0.99, 0.99)] * 2
    strong, weak = (panel.images[-1].to_rgba(panel.images[-1].get_array())[0, 0, :3] for panel in figure.axes[1:3])
    assert strong[0] - strong[2] > 0.2  # red
    assert np.ptp(weak) < 0.02  # without colour
    assert figure.axes[2].get_title() == "layer 11, at most ±0.00017"
    assert figure.get_suptitle() == "GQA: What is red?"
    assert "probability" in figure.axes[-1].get_ylabel()


def kept_lines() -> pd.DataFrame:
    lines = [
        {"sample": f"s{number}", "keep": 0.1, "layer": layer, "method": method, "information": float(number + layer)}
        for number in range(4)
        for layer in range(3)
        for method in ("mean", "random", "dart")
    ]
    return pd.DataFrame(lines)


def method_lines() -> pd.DataFrame:
    lines = [
        {"method": method, "layer": layer, "keep": 0.1, "score": 50.0, "low": 40.0, "high": 60.0}
        for method in ("random", "dart", "information (oracle)")
        for layer in range(3)
    ]
    return pd.DataFrame(lines)


@pytest.mark.parametrize(
    "draw",
    [
        lambda path: plots.draw_kept(kept_lines(), "t", path),
        lambda path: plots.draw_methods(method_lines(), 60.0, "t", path),
    ],
    ids=["kept", "methods"],
)
def test_a_method_looks_the_same_everywhere_and_has_its_interval(
    draw: Callable[[Path], Any], figures: list[Any], tmp_path: Path
) -> None:
    draw(tmp_path / "x")
    [figure] = figures
    [panel] = figure.axes
    lines = {line.get_label(): line for line in panel.lines}
    for method in ("random", "dart"):
        look = of_method(method).line
        assert (to_hex(lines[method].get_color()), lines[method].get_marker()) == (look["color"], look["marker"])
    heights = [np.ptp(band.get_paths()[0].vertices[:, 1]) for band in panel.collections]
    assert len(heights) == 3
    assert min(heights) > 0


def test_means_without_documents_have_no_bands(figures: list[Any], tmp_path: Path) -> None:
    means = kept_lines().groupby(["keep", "layer", "method"], as_index=False).information.mean()
    plots.draw_kept(means, "t", tmp_path / "x")
    assert not figures[0].axes[0].collections
    assert "95 %" not in figures[0].axes[0].get_ylabel()


def test_legends_hide_no_data_and_tasks_are_named_in_words(figures: list[Any], tmp_path: Path) -> None:
    tasks = [*(benchmark.tasks[0] for benchmark in BENCHMARKS), "prune_pope", "my_task"]
    lines = [(task, layer, 0.1, 0.05, 0.15, 0.01) for task in tasks for layer in range(3)]
    plots.draw_layers(
        pd.DataFrame(lines, columns=["task", "layer", "mean", "low", "high", "variance"]), "t", tmp_path / "x"
    )
    plots.draw_methods(method_lines(), 60.0, "t", tmp_path / "x")
    for figure in figures:
        [legend] = figure.legends
        box, width = legend.get_window_extent(), figure.bbox.width
        assert 0 <= box.x0 < box.x1 <= width
        assert not any(panel.get_legend() or box.overlaps(panel.get_window_extent()) for panel in figure.axes)
    names = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert sorted(names) == sorted([*(one.name for one in BENCHMARKS), "POPE (prune_pope)", "my_task"])
    looks = {(line.get_color(), line.get_marker()) for line in figures[0].axes[1].lines}
    assert len(looks) == len(BENCHMARKS) + 1  # the variant of POPE looks like POPE
