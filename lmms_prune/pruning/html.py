"""A trace as HTML: the visual tokens that each stage keeps, as grids. It takes the colours of the page, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby, islice

from lmms_prune.pruning.trace import RowTrace, Trace, figures

_SHOWN_ROWS = 4
_CELL, _WIDEST = 7, 280  # pixels of a visual token, and of a grid


def trace_html(trace: Trace) -> str:
    """The figures of all rows, then the grids of the first ones."""
    parts = [f"<p><code>{escape(str(trace.schedule))}</code>: {escape(figures(trace.rows))}</p>"]
    stages = [str(stage) for stage in trace.schedule.stages]
    for row in trace.rows[:_SHOWN_ROWS]:
        title = "" if len(trace.rows) == 1 else f"<p>{escape(row.sample)}: {escape(figures([row]))}</p>"
        parts += [title, *_drawings(row, stages)]
    if (hidden := len(trace.rows) - _SHOWN_ROWS) > 0:
        parts.append(f"<p>… and {hidden} more rows</p>")
    return f"<div>{''.join(parts)}</div>"


def _drawings(row: RowTrace, stages: Sequence[str]) -> list[str]:
    """One line for each image: its grids after each stage."""
    lines = []
    for image, grids in enumerate(row.grids):
        drawings = []
        for stage, masks in zip(stages, row.masks, strict=False):
            if image >= len(masks) or len(masks[image]) != sum(rows * columns for rows, columns in grids):
                continue
            kept = [bool(value) for value in masks[image].tolist()]
            caption = f"{escape(stage)}<br>{sum(kept)} of {len(kept)}"
            drawings.append(figure("".join(_grids(kept, grids)), caption))
        lines.append(f"<div>{''.join(drawings)}</div>")
    return lines


def figure(content: str, caption: str) -> str:
    """A drawing above its caption, beside its neighbours."""
    style = "display:inline-block;vertical-align:top;margin:4px 12px 4px 0"
    return f'<figure style="{style}">{content}<figcaption>{caption}</figcaption></figure>'


def _grids(kept: Sequence[bool], grids: Sequence[tuple[int, int]]) -> list[str]:
    values = iter(kept)
    return [_svg([list(islice(values, columns)) for _ in range(rows)], columns) for rows, columns in grids]


def _svg(kept: Sequence[Sequence[bool]], columns: int) -> str:
    """One grid: kept tokens in blue, dropped ones in a grey that lets the page's colour through."""
    width = min(_WIDEST, _CELL * columns)
    height = round(width * len(kept) / columns)
    path = []
    for row, values in enumerate(kept):
        column = 0
        for value, run in groupby(values):
            length = len(list(run))
            path.append(f"M{column} {row}h{length}v1h-{length}z" if value else "")
            column += length
    background = f'<path fill="#888" fill-opacity=".25" d="M0 0h{columns}v{len(kept)}h-{columns}z"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {columns} {len(kept)}" '
        f'shape-rendering="crispEdges" style="margin-right:4px">{background}<path fill="#3b82f6" d="{"".join(path)}"/></svg>'
    )
