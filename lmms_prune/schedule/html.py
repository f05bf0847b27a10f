"""A schedule's stages as an HTML table. It takes the colours of the page, light or dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from lmms_prune.methods.spec import print_option
from lmms_prune.schedule.stage import ADAPTIVE, Stage, print_keep

_COLUMNS = ("stage", "method", "at the input of layer", "keeps", "options")


def table(stages: Sequence[Stage]) -> str:
    """The table, one row per stage; a sentence for no stage."""
    if not stages:
        return "<p>The empty schedule prunes nothing.</p>"
    rows = [_cells(number, stage) for number, stage in enumerate(stages, 1)]
    lines = [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    head = "".join(f"<th>{name}</th>" for name in _COLUMNS)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _cells(number: int, stage: Stage) -> tuple[str, ...]:
    options = [f"{name}={print_option(value)}" for name, value in stage.options]
    options += [] if stage.per == "image" else [f"per={stage.per}"]
    return str(number), stage.method, str(stage.layer), _keep(stage), "; ".join(options)


def _keep(stage: Stage) -> str:
    """What the stage keeps, in words."""
    if stage.keep == ADAPTIVE:
        return "as many as the method decides"
    if stage.keep is None:
        return "? (solved from a budget)"
    if stage.keep == 0:
        return "nothing"
    return f"{stage.keep} tokens" if isinstance(stage.keep, int) else f"{print_keep(stage.keep)} of the tokens"
