"""The rows of Tables 1 to 3 for a model: the paper's schedules, with depths and budgets scaled where the model is another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from lmms_prune.configs.table import ROWS, PaperRow
from lmms_prune.efficiency.estimate import prompt_sizes
from lmms_prune.errors import ScheduleError
from lmms_prune.leaderboard.published import PublishedCost, PublishedRow, published, published_costs
from lmms_prune.reproduce.models import StudiedModel
from lmms_prune.schedule import Schedule, Stage

_STEP = 0.01  # by which a scaled budget grows until every row can meet it


@dataclass(frozen=True)
class RowPlan:
    """One evaluation of a table: a row with one seed.

    Args:
        printed: the paper's row.
        schedule: what is evaluated.
        seed: the seed of random draws.
    """

    printed: PublishedRow
    schedule: Schedule
    seed: int = 0

    @property
    def stem(self) -> str:
        """A file name, which sorts by budget and row."""
        budget = self.printed.budget.zfill(5) if self.printed.budget else "unpruned"
        return f"{budget}_{self.printed.name}-{self.seed}".replace("unpruned_unpruned", "unpruned")

    @property
    def label(self) -> str:
        """The row's name with its budget."""
        return f"{self.printed.name} {self.printed.budget}".strip()


def table_rows(model: StudiedModel, seeds: int, quick: bool = False) -> list[RowPlan]:
    """The evaluations of a model's table.

    Args:
        model: the model.
        seeds: runs of each row that draws at random.
        quick: only the unpruned row, and per method of the first budget the method alone and with random.

    Raises:
        ScheduleError: a schedule cannot be scaled to the model.
    """
    printed = {_key(row.name, row.budget): row for row in published() if row.table == model.number}
    plans: list[RowPlan] = []
    for row in ROWS.values():
        if row.model != model.table.model or row.control or row.seed >= max(1, seeds):
            continue
        match = printed.get(_key(_base(row), row.budget))
        if match is not None:
            plans.append(RowPlan(match, Schedule.parse(row.text), row.seed))
    if quick:
        first = next(row.budget for row in printed.values() if row.budget)
        names = ("unpruned", "DART", "DART+Random", "DivPrune", "DivPrune+Random")
        plans = [plan for plan in plans if plan.printed.name in names and plan.printed.budget in ("", first)]
    if not model.scaled:
        return plans
    return [replace(plan, schedule=schedule) for plan, schedule in zip(plans, scaled(model, plans), strict=True)]


def _base(row: PaperRow) -> str:
    """A row's name without the number of its seed."""
    name, _, seed = row.name.rpartition("-")
    return name if seed.isdigit() and name else row.name


def _key(name: str, budget: str) -> tuple[str, str]:
    """What a row of the paper and its configuration have in common."""
    digits = "".join(letter for letter in budget if letter.isdigit())
    return name.lower(), "" if name == "unpruned" else digits


def scaled(model: StudiedModel, plans: Sequence[RowPlan]) -> list[Schedule]:
    """The plans' schedules with layers and keeps scaled to a model.

    The first keep of a method alone or with a second stage is then solved, so that all rows of a budget keep equally many
    tokens: the paper's share of all, or the smallest larger one that every such row can meet (with few layers, those before
    the first stage weigh more). Rows with other stages keep what the scaling gives.
    """
    shares = {plan.printed.budget: _share(model, plan.printed.budget) for plan in plans}
    schedules = [_with_layers(model, plan.schedule) for plan in plans]
    for budget, share in shares.items():
        group = [i for i, plan in enumerate(plans) if plan.printed.budget == budget and _is_solvable(schedules[i])]
        while group:
            try:
                solved = [_solved(model, schedules[i], share) for i in group]
            except ScheduleError:
                share += _STEP
                if share > 1:
                    raise
                continue
            for i, schedule in zip(group, solved, strict=True):
                schedules[i] = schedule
            break
    for schedule in schedules:
        schedule.check(model.sizes.layers, [model.sizes.example_tokens])
    return schedules


def _share(model: StudiedModel, budget: str) -> float:
    """A budget of the paper as a share of all visual tokens."""
    number = float("".join(letter for letter in budget if letter.isdigit()) or 100)
    return number / (model.reference.tokens_per_image or 100)


def _with_layers(model: StudiedModel, schedule: Schedule) -> Schedule:
    """A schedule with layers scaled to the model's depth, and counts as ratios."""
    tokens = model.reference.tokens_per_image
    stages: list[Stage] = []
    for stage in schedule.stages:
        lowest = max(stage.spec.lowest_layer, stages[-1].layer + 1 if stages else 0)
        layer = max(lowest, round(stage.layer * model.sizes.layers / model.reference.layers))
        keep = stage.keep
        if isinstance(keep, int) and keep and tokens:
            keep = round(Decimal(keep) / tokens, 4)
        stages.append(Stage(stage.method, layer, keep, stage.options))
    return Schedule(tuple(stages))


def _is_solvable(schedule: Schedule) -> bool:
    """Whether the first keep can be solved: a method alone, or with random or VTW after it."""
    stages = schedule.stages
    return 1 <= len(stages) <= 2 and not stages[0].spec.drops_all and all(s.spec.kind == "control" for s in stages[1:])


def _solved(model: StudiedModel, schedule: Schedule, share: float) -> Schedule:
    first, *others = schedule.stages
    unknown = Schedule((replace(first, keep=None), *others))
    return unknown.solve(f"{min(share, 1.0):.4f}", prompt_sizes(model.sizes))


@dataclass(frozen=True)
class CostPlan:
    """One row of Table 3: the printed costs, and the schedule that is timed on a model."""

    printed: PublishedCost
    schedule: Schedule


def cost_rows(model: StudiedModel, plans: Sequence[RowPlan]) -> list[CostPlan]:
    """The rows of Table 3 for a model: the paper's measured schedules, or where they are scaled those of its table's rows."""
    rows = []
    for printed in published_costs():
        schedule = Schedule.parse(printed.schedule)
        if model.scaled:
            scaled_rows = [plan.schedule for plan in plans if _is_row(plan, printed)]
            if not scaled_rows:
                continue
            schedule = scaled_rows[0]
        rows.append(CostPlan(printed, schedule))
    return rows


def cost_plans(plans: Sequence[RowPlan]) -> list[RowPlan]:
    """Those of a table's evaluations whose accuracy Table 3 prints."""
    return [plan for plan in plans if any(_is_row(plan, printed) for printed in published_costs())]


def _is_row(plan: RowPlan, printed: PublishedCost) -> bool:
    return (plan.printed.name, plan.printed.budget) == (printed.name, printed.budget)
