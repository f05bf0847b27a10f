"""The pictures of the report, drawn by the commands' own plots from what is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
from PIL import Image

from lmms_prune.information.aggregate import by_layer
from lmms_prune.information.plots import draw_horizon, draw_horizons, draw_kept, draw_layers, draw_methods
from lmms_prune.reproduce.chain import CONTROL, ORACLE
from lmms_prune.reproduce.evidence import Evidence, LayerScores, single_stages
from lmms_prune.reproduce.information_claims import horizon_of
from lmms_prune.reproduce.items import Item
from lmms_prune.reproduce.layer_claims import column

_WIDEST = 900  # pixels of a picture
_COLOURS = 64


@dataclass(frozen=True)
class ReportPicture:
    """A picture of the report.

    Args:
        alt: what it shows, in words.
        data: a small PNG or WEBP.
        kind: "png" or "webp".
    """

    alt: str
    data: bytes
    kind: str


def pictures(item: Item, evidence: Evidence) -> list[ReportPicture]:
    """The pictures of a figure that can be drawn from what is there; none of a table."""
    draw = _BY_KIND.get(item.kind)
    if draw is None:
        return []
    with TemporaryDirectory() as folder:
        return list(draw(item, evidence, Path(folder)))


def _small(path: Path, alt: str, photo: bool = False) -> ReportPicture:
    """A drawn picture, reduced: few colours are enough for curves, and a photograph is compressed."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.thumbnail((_WIDEST, 2 * _WIDEST))
    stream = BytesIO()
    if photo:
        picture.save(stream, "WEBP", quality=60, method=5)
        return ReportPicture(alt, stream.getvalue(), "webp")
    picture.quantize(_COLOURS).save(stream, "PNG", optimize=True)
    return ReportPicture(alt, stream.getvalue(), "png")


def _stages(scores: LayerScores, keeps: Sequence[str], methods: Sequence[str]) -> pd.DataFrame:
    """The scores of single stages, one line each, as `draw_methods` reads them."""
    lines = [
        {
            "method": f"{method} (oracle)" if method == ORACLE else method,
            "layer": n,
            "keep": _keep(keep),
            "score": run.score,
        }
        for keep in keeps
        for method, by_layer in single_stages(scores, keep, methods).items()
        for n, run in sorted(by_layer.items())
    ]
    return pd.DataFrame(lines, columns=["method", "layer", "keep", "score"])


def _keep(keep: str) -> float | str:
    return keep if keep.endswith("t") else float(keep)


def _methods(item: Item, evidence: Evidence, folder: Path) -> Iterator[ReportPicture]:
    plan, oracle = evidence.plan, item.kind == "oracle"
    by_task, methods = (evidence.oracle, [ORACLE, CONTROL]) if oracle else (evidence.layers, evidence.plan.methods)
    for task in plan.item_tasks(item):
        scores = by_task.get(task)
        lines = None if scores is None else _stages(scores, plan.item_keeps(item), methods)
        if scores is None or lines is None or not len(lines):
            continue
        title = f"{plan.model.name}, {column(task)}"
        draw_methods(lines, scores["none"].score, title, folder / task)
        yield _small(folder / f"{task}.png", f"{title}: score of each method as the only stage, by its layer")


def _kept(item: Item, evidence: Evidence, folder: Path) -> Iterator[ReportPicture]:
    plan, kept = evidence.plan, evidence.kept
    if kept is None:
        return
    wanted = [keep if keep.endswith("t") else str(float(keep)) for keep in plan.item_keeps(item)]
    for task in plan.item_tasks(item):
        lines = kept[(kept.task == task) & kept["keep"].isin(wanted)]
        if not len(lines):
            continue
        title = f"{plan.model.name}, {column(task)}"
        draw_kept(lines, title, folder / f"kept-{task}")
        yield _small(folder / f"kept-{task}.png", f"{title}: information that each method keeps, by layer")


def _variance(item: Item, evidence: Evidence, folder: Path) -> Iterator[ReportPicture]:
    plan, table = evidence.plan, evidence.information
    tasks = plan.item_tasks(item)
    lines = None if table is None else table[table.task.isin(tasks)]
    if lines is None or not len(lines):
        return
    draw_layers(by_layer(lines), f"{plan.model.name}: information of visual tokens", folder / "layers")
    yield _small(folder / "layers.png", f"{plan.model.name}: mean and variance of information over tokens, by layer")
    for task in tasks:
        for path in sorted((plan.information / "heatmaps").glob(f"{task}-*.png"))[:1]:
            yield _small(
                path, f"{plan.model.name}, {column(task)}: information over an image, layer by layer", photo=True
            )


def _vanishing(item: Item, evidence: Evidence, folder: Path) -> Iterator[ReportPicture]:
    plan = evidence.plan
    for task in plan.item_tasks(item):
        horizon = horizon_of(evidence, task)
        if horizon is not None:
            title = f"{plan.model.name}, {column(task)}"
            draw_horizon(horizon, title, folder / f"horizon-{task}")
            yield _small(
                folder / f"horizon-{task}.png", f"{title}: score without visual tokens and mean information, by layer"
            )


def _horizons(item: Item, evidence: Evidence, folder: Path) -> Iterator[ReportPicture]:
    plan = evidence.plan
    horizons = [horizon for task in plan.item_tasks(item) if (horizon := horizon_of(evidence, task)) is not None]
    if horizons:
        title = f"{plan.model.name}: score without visual tokens, and horizons"
        draw_horizons(horizons, title, folder / "horizons")
        yield _small(folder / "horizons.png", title)


_BY_KIND: Mapping[str, Callable[[Item, Evidence, Path], Iterator[ReportPicture]]] = {
    "methods": _methods,
    "oracle": _methods,
    "kept": _kept,
    "variance": _variance,
    "vanishing": _vanishing,
    "horizons": _horizons,
}
