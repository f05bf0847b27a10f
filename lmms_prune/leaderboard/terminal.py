"""Printing the tables on a terminal, fitted to its width."""

from __future__ import annotations

import io
from collections.abc import Iterator

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from lmms_prune.leaderboard.grids import TextTable, grids, only_columns
from lmms_prune.leaderboard.notes import MARKED, footnotes
from lmms_prune.leaderboard.rows import Leaderboard

# Where not all columns fit, these come first: what decides is seen without scrolling.
_FIRST = ("tokens", "Rel", "Acc")


def show(board: Leaderboard, with_details: bool, console: Console) -> None:
    """Print the tables; columns that do not fit are continued below, with the first column repeated."""
    for grid in grids(board, with_details, marked=True):
        show_table(grid, console)
    cells = [cell for model in board.models for row in model.rows for cell in row.cells.values()]
    marked = [MARKED] if any(cell.comparison is not None and cell.comparison.mark for cell in cells) else []
    for line in [*marked, *footnotes(board, with_details)]:
        console.print(Text(line))


def show_table(grid: TextTable, console: Console) -> None:
    """Print one table with its notes, fitted to the width."""
    for part in _fitting(grid, console):
        # rich would fold a title of the table itself to the table's width.
        console.print(Text(part.title, style="bold"))
        console.print(_rich(part))
    for note in [*grid.notes, ""] if grid.notes else []:
        console.print(Text(note))


def terminal(board: Leaderboard, with_details: bool) -> str:
    """Return the tables as plain text, without a limit on the width."""
    stream = io.StringIO()
    show(board, with_details, Console(file=stream, width=1000, highlight=False, force_terminal=False))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _fitting(grid: TextTable, console: Console) -> Iterator[TextTable]:
    title, rest = grid.title, list(range(1, len(grid.columns)))
    if set(_FIRST) <= set(grid.columns) and _width(grid, console) > console.width:
        rest.sort(key=lambda i: _FIRST.index(grid.columns[i]) if grid.columns[i] in _FIRST else len(_FIRST))
    while rest:
        count = len(rest)
        while count > 1 and _width(only_columns(grid, [0, *rest[:count]]), console) > console.width:
            count -= 1
        part = only_columns(grid, [0, *rest[:count]])
        yield TextTable(title, part.columns, part.lines)
        title, rest = f"{grid.title} (continued)", rest[count:]


def _width(grid: TextTable, console: Console) -> int:
    return Measurement.get(console, console.options.update(max_width=10_000), _rich(grid)).maximum


def _rich(grid: TextTable) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for i, column in enumerate(grid.columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for line in grid.lines:
        if line.heading:
            table.add_section()
            table.add_row(Text(line.heading, style="italic"))
        else:
            # Line breaks between stages and before spreads keep the columns narrow.
            texts = [
                text.replace(",", ",\n") if i == 0 else text.replace(" ±", "\n±") for i, text in enumerate(line.cells)
            ]
            table.add_row(*(Text(text, style="bold" if i in line.bold else "") for i, text in enumerate(texts)))
    return table
