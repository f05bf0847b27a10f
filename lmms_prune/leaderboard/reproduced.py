"""The paper's printed tables as a leaderboard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lmms_prune.leaderboard.benchmarks import acc, group_means, rel
from lmms_prune.leaderboard.published import contradictions, published, published_costs
from lmms_prune.leaderboard.rows import UNPRUNED, BudgetGroup, Leaderboard, ModelTable, ScoreCell, TableRow


def published_table() -> Leaderboard:
    """Return the paper's printed scores as a leaderboard, with Acc and Rel computed as for our runs."""
    models = []
    for model in dict.fromkeys(row.model for row in published()):
        printed = [row for row in published() if row.model == model]
        unpruned = next(row.by_task for row in printed if row.name == "unpruned")
        budgets: dict[str, list[TableRow]] = {}
        for row in printed:
            cells = {
                task: ScoreCell(value, published=value) for task, value in row.by_task.items() if value is not None
            }
            mean, share = acc(row.by_task), rel(row.by_task, unpruned)
            kind = UNPRUNED if row.name == "unpruned" else "pruned"
            title = {"": "unpruned", "50pct": "50 % of the tokens"}.get(row.budget, f"{row.budget} tokens")
            budgets.setdefault(title, []).append(
                TableRow(
                    row.name,
                    kind,
                    cells=cells,
                    acc=mean,
                    rel=share,
                    groups=group_means(row.by_task, unpruned),
                    published=row,
                )
            )
        groups = tuple(BudgetGroup(title, tuple(rows)) for title, rows in budgets.items())
        title = f"{model}, Table {printed[0].table} of arXiv 2512.07580"
        notes = (*_misprints([row for group in groups for row in group.rows]), *contradictions(printed[0].table))
        models.append(ModelTable(model, title, tuple(unpruned), groups, notes))
    return Leaderboard(tuple(models), published_costs=published_costs())


def _misprints(rows: Sequence[TableRow]) -> Iterator[str]:
    """Yield a note for each row whose printed scores give another Rel than the printed one."""
    for row in rows:
        printed = row.published
        if printed is not None and row.rel is not None and round(row.rel, 1) != printed.rel:
            yield f"The paper prints a Rel of {printed.rel} for {row.label} {printed.budget}; its scores give {row.rel:.3f}."
