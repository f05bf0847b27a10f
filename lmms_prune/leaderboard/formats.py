"""Output formats of the leaderboard: terminal text, Markdown, CSV, JSON, LaTeX and HTML, one function each."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from lmms_prune.leaderboard.cost_table import cost_columns, paper_costs
from lmms_prune.leaderboard.grids import Line, TextTable, grids, scores
from lmms_prune.leaderboard.interval import Interval
from lmms_prune.leaderboard.notes import footnotes
from lmms_prune.leaderboard.records import RunRecord
from lmms_prune.leaderboard.rows import Leaderboard, TableRow
from lmms_prune.leaderboard.sharing import shared
from lmms_prune.leaderboard.terminal import terminal
from lmms_prune.record.redaction import redacted, redacted_values


def markdown(board: Leaderboard, with_details: bool) -> str:
    """Return the tables in GitHub's Markdown."""
    parts = [markdown_grid(grid) for grid in grids(board, with_details)]
    return "\n".join([*parts, *(f"* {line}" for line in footnotes(board, with_details))]) + "\n"


def markdown_grid(grid: TextTable) -> str:
    """Return one table in Markdown, with its title."""

    def joined(cells: Any) -> str:
        return "| " + " | ".join(cells) + " |"

    def row(line: Line) -> str:
        if line.heading:
            return joined([f"*{line.heading}*", *[""] * (len(grid.columns) - 1)])
        texts = [f"`{text}`" if i == 0 else text for i, text in enumerate(line.cells)]
        return joined(f"**{text}**" if i in line.bold else text for i, text in enumerate(texts))

    rule = joined([":--", *["--:"] * (len(grid.columns) - 1)])
    notes = [f"\n{note}" for note in grid.notes]
    return "\n".join([f"### {grid.title}", "", joined(grid.columns), rule, *map(row, grid.lines), *notes, ""])


def latex(board: Leaderboard, with_details: bool) -> str:
    """Return `tabular`s with booktabs rules: each model's scores, and its cost beside Table 3; details are not included."""
    tables = [table for model in board.models for table in (scores(model), paper_costs(model, board)) if table]
    return "\n".join(map(_latex_grid, tables))


def _latex_grid(grid: TextTable) -> str:
    lines = [
        *(f"% {text}" for text in (grid.title, *grid.notes)),
        rf"\begin{{tabular}}{{l{'r' * (len(grid.columns) - 1)}}}",
        r"\toprule",
    ]
    lines.append(" & ".join(map(_escaped, grid.columns)) + r" \\")
    for line in grid.lines:
        if line.heading:
            lines += [
                r"\midrule",
                rf"\multicolumn{{{len(grid.columns)}}}{{l}}{{\textit{{{_escaped(line.heading)}}}}} \\",
            ]
            continue
        texts = [_escaped(text).replace(" ±", r"\,$\pm$\,") for text in line.cells]
        lines.append(" & ".join(rf"\textbf{{{t}}}" if i in line.bold else t for i, t in enumerate(texts)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    plain = {
        "%": r"\%",
        "&": r"\&",
        "_": r"\_",
        "#": r"\#",
        "×": r"$\times$",
        "…": r"\dots",
        "$": r"\$",
        "↓": r"$\downarrow$",
    }
    return "".join(plain.get(letter, letter) for letter in text)


def csv_rows(board: Leaderboard) -> list[dict[str, Any]]:
    """Return the values of each row by column: costs, and each task's score and its comparison with the baseline."""
    return [
        {**_flat(model.title, budget.title, row), **cost_columns(row, board.times)}
        for model in board.models
        for budget in model.budgets
        for row in budget.rows
    ]


def as_csv(board: Leaderboard, with_details: bool) -> str:
    """Return `csv_rows` as lines."""
    rows = csv_rows(board)
    names = dict.fromkeys(name for row in rows for name in row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _flat(model: str, budget: str, row: TableRow) -> dict[str, Any]:
    """Flatten one row into CSV columns."""
    columns: dict[str, Any] = {"model": model, "budget": budget, "schedule": row.label, "kind": row.kind}
    columns |= {"seeds": " ".join(map(str, row.seeds)), "baseline": row.baseline}
    columns |= {part.name: getattr(row.cost, part.name) for part in fields(row.cost)}
    columns |= {"acc": row.acc, "rel": row.rel, "rel_sd": row.rel_sd, "above_blind": row.above_blind}
    columns |= _spread("rel_minus_100", row.rel_interval)
    for group, mean in row.groups.items():
        columns |= {f"{re.sub('[ -]', '_', group)}_acc": mean.acc, f"{re.sub('[ -]', '_', group)}_rel": mean.rel}
    control = row.random
    columns["random_control"] = None if control is None else control.other
    columns["against_random"] = None if control is None else control.verdict
    columns |= _spread("rel_minus_random", None if control is None else control.difference)
    columns |= {"missing": " ".join(row.missing), "marks": "; ".join(row.marks)}
    for task, cell in row.cells.items():
        comparison = cell.comparison
        columns |= {task: cell.score, f"{task}_sd": cell.sd, f"{task}_published": cell.published}
        columns |= {f"{task}_unlike_published": "; ".join(cell.unlike)}
        columns |= {f"{task}_{name.replace('-', '_')}": value for name, value in cell.extras.items()}
        columns |= {f"{task}_retention": cell.retention, f"{task}_above_blind": cell.above_blind}
        columns |= _spread(f"{task}_difference", None if comparison is None else comparison.difference)
        for name in ("p", "p_holm", "worse", "better", "units", "agreement", "detectable", "verdict"):
            columns[f"{task}_{name}"] = None if comparison is None else getattr(comparison, name)
    return columns


def _spread(name: str, difference: Interval | None) -> dict[str, float | None]:
    """Return the three columns of a difference: value, low, high; empty if there is none."""
    parts = (None, None, None) if difference is None else (difference.value, difference.low, difference.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), parts, strict=True))


def as_json(board: Leaderboard, with_details: bool, secrets: Collection[str] = ()) -> str:
    """Return the whole leaderboard as JSON, with or without `with_details`; secrets are redacted."""
    return json.dumps(redacted_values(described(board), secrets), indent=1, ensure_ascii=False) + "\n"


def described(value: Any) -> Any:
    """Convert any part of a leaderboard to JSON types; NaN and infinities become null."""
    if isinstance(value, RunRecord):
        about = {"wrapper": value.wrapper, "settings": dict(value.settings)}
        files = [{"path": str(source.path), "command": source.command, **source.facts} for source in value.sources]
        return {
            **about,
            "samples": {name: described(task.samples) for name, task in value.tasks.items()},
            "files": files,
        }
    if is_dataclass(value):
        return {part.name: described(getattr(value, part.name)) for part in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): described(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(part) for part in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


Format = Callable[[Leaderboard, bool, Collection[str]], str]


def _shareable(form: Callable[[Leaderboard, bool], str]) -> Format:
    """Wrap `form` so that its text has no paths of this machine and no secrets."""

    def clean(board: Leaderboard, with_details: bool, secrets: Collection[str] = ()) -> str:
        return redacted(form(shared(board), with_details), secrets)

    return clean


def _shareable_json(board: Leaderboard, with_details: bool, secrets: Collection[str] = ()) -> str:
    return as_json(shared(board), with_details, secrets)


def _html(board: Leaderboard, with_details: bool, secrets: Collection[str] = ()) -> str:
    # Imported here: only a page needs jinja2 and what reads samples, whose imports take as long as printing a table.
    from lmms_prune.leaderboard.page.render import html

    return html(board, with_details, secrets)


FORMATS: dict[str, Format] = {
    "table": _shareable(terminal),
    "markdown": _shareable(markdown),
    "csv": _shareable(as_csv),
    "json": _shareable_json,
    "latex": _shareable(latex),
    "html": _html,
}
"""Formats by the name after ``--format``. Arguments: the leaderboard, whether to include each benchmark's statistics, and
secret values to redact in addition to those recognised by their form."""
