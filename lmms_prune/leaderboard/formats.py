"""The table as text: for a terminal, Markdown, CSV, JSON, LaTeX and a browser. Each format is one function of the leaderboard."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields, is_dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from lmms_prune.leaderboard.grids import Line, TextTable, grids, scores
from lmms_prune.leaderboard.notes import footnotes
from lmms_prune.leaderboard.page.render import html
from lmms_prune.leaderboard.records import RunRecord
from lmms_prune.leaderboard.rows import Leaderboard, TableRow
from lmms_prune.leaderboard.sharing import shared
from lmms_prune.leaderboard.statistics import Interval
from lmms_prune.leaderboard.terminal import terminal
from lmms_prune.record.redaction import redacted, redacted_values


def markdown(board: Leaderboard, with_details: bool) -> str:
    """Tables that GitHub renders."""
    parts = [markdown_grid(grid) for grid in grids(board, with_details)]
    return "\n".join([*parts, *(f"* {line}" for line in footnotes(board, with_details))]) + "\n"


def markdown_grid(grid: TextTable) -> str:
    """One table with its title."""

    def joined(cells: Any) -> str:
        return "| " + " | ".join(cells) + " |"

    def row(line: Line) -> str:
        if line.heading:
            return joined([f"*{line.heading}*", *[""] * (len(grid.columns) - 1)])
        texts = [f"`{text}`" if place == 0 else text for place, text in enumerate(line.cells)]
        return joined(f"**{text}**" if i in line.bold else text for i, text in enumerate(texts))

    rule = joined([":--", *["--:"] * (len(grid.columns) - 1)])
    notes = [f"\n{note}" for note in grid.notes]
    return "\n".join([f"### {grid.title}", "", joined(grid.columns), rule, *map(row, grid.lines), *notes, ""])


def latex(board: Leaderboard, with_details: bool) -> str:
    """One `tabular` of scores a model, with booktabs rules; it has no place for details."""
    return "\n".join(_latex_grid(scores(model)) for model in board.models)


def _latex_grid(grid: TextTable) -> str:
    lines = [f"% {grid.title}", rf"\begin{{tabular}}{{l{'r' * (len(grid.columns) - 1)}}}", r"\toprule"]
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
    plain = {"%": r"\%", "&": r"\&", "_": r"\_", "#": r"\#", "×": r"$\times$", "…": r"\dots", "$": r"\$"}
    return "".join(plain.get(letter, letter) for letter in text)


def as_csv(board: Leaderboard, with_details: bool) -> str:
    """A line a row; for each task the score and all that is known of it beside the baseline."""
    rows = [
        _flat(model.title, budget.title, row)
        for model in board.models
        for budget in model.budgets
        for row in budget.rows
    ]
    names = dict.fromkeys(name for row in rows for name in row)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(names), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _flat(model: str, budget: str, row: TableRow) -> dict[str, Any]:
    """One row without nesting."""
    plain: dict[str, Any] = {"model": model, "budget": budget, "schedule": row.label, "kind": row.kind}
    plain |= {"seeds": " ".join(map(str, row.seeds)), "baseline": row.baseline}
    plain |= {one.name: getattr(row.cost, one.name) for one in fields(row.cost)}
    plain |= {"acc": row.acc, "rel": row.rel, "rel_sd": row.rel_sd, "above_blind": row.above_blind}
    plain |= _spread("rel_minus_100", row.rel_interval)
    control = row.random
    plain["random_control"] = None if control is None else control.other
    plain["against_random"] = None if control is None else control.verdict
    plain |= _spread("rel_minus_random", None if control is None else control.difference)
    plain |= {"missing": " ".join(row.missing), "marks": "; ".join(row.marks)}
    for task, cell in row.cells.items():
        found = cell.comparison
        plain |= {task: cell.score, f"{task}_sd": cell.sd, f"{task}_published": cell.published}
        plain |= {f"{task}_{name.replace('-', '_')}": value for name, value in cell.extras.items()}
        plain |= {f"{task}_retention": cell.retention, f"{task}_above_blind": cell.above_blind}
        plain |= _spread(f"{task}_difference", None if found is None else found.difference)
        for name in ("p", "p_holm", "worse", "better", "units", "agreement", "detectable", "verdict"):
            plain[f"{task}_{name}"] = None if found is None else getattr(found, name)
    return plain


def _spread(name: str, found: Interval | None) -> dict[str, float | None]:
    """The columns of a difference; empty ones where there is none."""
    parts = (None, None, None) if found is None else (found.value, found.low, found.high)
    return dict(zip((name, f"{name}_low", f"{name}_high"), parts, strict=True))


def as_json(board: Leaderboard, with_details: bool, secrets: Collection[str] = ()) -> str:
    """All that there is, always; without secrets."""
    return json.dumps(redacted_values(described(board), secrets), indent=1, ensure_ascii=False) + "\n"


def described(value: Any) -> Any:
    """Anything of a leaderboard in JSON's types; what is no number is null."""
    if isinstance(value, RunRecord):
        about = {"wrapper": value.wrapper, "settings": dict(value.settings)}
        files = [{"path": str(source.path), "command": source.command, **source.facts} for source in value.sources]
        return {**about, "samples": {name: described(one.samples) for name, one in value.tasks.items()}, "files": files}
    if is_dataclass(value):
        return {one.name: described(getattr(value, one.name)) for one in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): described(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(one) for one in value]
    if isinstance(value, float) and not isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


Format = Callable[[Leaderboard, bool, Collection[str]], str]


def _for_others(form: Callable[[Leaderboard, bool], str]) -> Format:
    """`form` without anybody's folders and secrets."""

    def clean(board: Leaderboard, with_details: bool, secrets: Collection[str] = ()) -> str:
        return redacted(form(shared(board), with_details), secrets)

    return clean


def _json_for_others(board: Leaderboard, with_details: bool, secrets: Collection[str] = ()) -> str:
    return as_json(shared(board), with_details, secrets)


FORMATS: dict[str, Format] = {
    "table": _for_others(terminal),
    "markdown": _for_others(markdown),
    "csv": _for_others(as_csv),
    "json": _json_for_others,
    "latex": _for_others(latex),
    "html": html,
}
"""By the name after ``--format``: functions of the leaderboard, of whether every benchmark's statistics are asked for, and of
values that the text may not hold beside what is known by its form."""
