"""What a model's steps have left so far: rows of its table, scores by layer, measured information, kept information, times."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import pandas as pd

from lmms_prune.information.aggregate import by_sample
from lmms_prune.information.layer_sweep import acts_at, single_stage
from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.compare import Draws
from lmms_prune.leaderboard.entries import Entry, entries
from lmms_prune.leaderboard.reader import SamplesReader
from lmms_prune.leaderboard.records import Problem
from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.rows import TableRow
from lmms_prune.leaderboard.samples import Samples, SamplesError
from lmms_prune.leaderboard.table import leaderboard
from lmms_prune.record.files import read_text
from lmms_prune.record.information import InformationError, Store
from lmms_prune.reproduce.chain import ORACLE, ModelPlan
from lmms_prune.reproduce.runner import OUTPUT
from lmms_prune.schedule import Schedule

RESAMPLES = 1000
SEED = 0


@dataclass(frozen=True)
class TableEvidence:
    """The evaluated rows of a table.

    Args:
        rows: as the leaderboard has them, by schedule.
        entries: the same before comparison, by schedule.
        draws: resampled scores.
        tasks: the columns.
    """

    rows: Mapping[str, TableRow]
    entries: Mapping[str, Entry]
    draws: Draws
    tasks: tuple[str, ...]


LayerScores = dict[str, Samples]
"""The samples of one task by schedule; all are of the same documents."""


@dataclass
class Evidence:
    """What one model's steps have left. Everything is read when it is first asked for.

    Args:
        plan: the model's plan.
        steps: the folder of the steps' records.
        problems: what could not be read.
    """

    plan: ModelPlan
    steps: Path
    reader: SamplesReader = field(default_factory=SamplesReader)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def table(self) -> TableEvidence | None:
        """The table's rows; None if no evaluation is there."""
        if not self.plan.table.is_dir():
            return None
        results = read_results([self.plan.table])
        board = leaderboard(results, resamples=RESAMPLES, seed=SEED, reader=self.reader)
        self.problems += [str(problem) for problem in board.problems]
        if not board.models:
            return None
        unused: list[Problem] = []
        own = entries(results.records, unused, self.reader)
        rows = {row.runs[0].schedule or "": row for row in board.models[0].rows}
        by_schedule = {entry.schedule or "": entry for entry in own}
        return TableEvidence(rows, by_schedule, Draws(own, RESAMPLES, SEED, self.reader), board.models[0].tasks)

    @cached_property
    def layers(self) -> dict[str, LayerScores]:
        """Scores of single stages and of the removal of all visual tokens, by task."""
        return self._scores(self.plan.horizon)

    @cached_property
    def oracle(self) -> dict[str, LayerScores]:
        """Scores of the oracle and its control, by task."""
        return self._scores(self.plan.oracle)

    def _scores(self, folder: Path) -> dict[str, LayerScores]:
        if not (folder / "runs").is_dir():
            return {}
        results = read_results([folder / "runs"])
        self.problems += [str(problem) for problem in results.problems]
        scores: dict[str, LayerScores] = {}
        for record in results.records:
            for name, task in record.tasks.items():
                if record.schedule is None or task.samples is None:
                    continue
                try:
                    scores.setdefault(name, {})[record.schedule] = self.reader.read(task.samples, TASKS[name])
                except (SamplesError, OSError) as error:
                    self.problems.append(str(error))
        # What an earlier command with other documents has left cannot be compared with the unpruned run.
        return {
            name: {text: samples for text, samples in runs.items() if samples.signature == runs["none"].signature}
            for name, runs in scores.items()
            if "none" in runs
        }

    @cached_property
    def information(self) -> pd.DataFrame | None:
        """Mean and variance of information by document and layer; None if nothing is measured."""
        store = Store(self.plan.information)
        try:
            return by_sample(store.read())
        except InformationError:
            return None

    @cached_property
    def kept(self) -> pd.DataFrame | None:
        """Information that each method keeps, by document, layer and keep; None if it is not there."""
        path = self.plan.information / "kept.csv"
        if not path.is_file():
            return None
        return pd.read_csv(path, dtype={"keep": str})

    def output(self, step: str) -> dict[str, Any] | None:
        """The JSON that a step has printed; None if it has not finished."""
        try:
            return json.loads(read_text(self.steps / step / OUTPUT))
        except (OSError, ValueError):
            return None


def removed_at(scores: LayerScores, depth: int) -> dict[int, Samples] | None:
    """The scores without visual tokens from each layer on; None if a layer is missing."""
    removed = {layer: scores[f"vtw@{layer}"] for layer in range(depth) if f"vtw@{layer}" in scores}
    return removed if len(removed) == depth else None


def single_stages(scores: LayerScores, keep: str, methods: Sequence[str]) -> dict[str, dict[int, Samples]]:
    """The scores of methods as the only stage, by method and layer.

    Args:
        scores: one task's samples by schedule. Those of other methods, options and keeps, which an earlier command may have
            left in the same folder, are passed over.
        keep: a ratio or a count such as ``60t``.
        methods: names with options or without.
    """
    names = {_identity(_example(method, keep)): method for method in methods}
    by_method: dict[str, dict[int, Samples]] = {}
    for text, samples in scores.items():
        method = names.get(_identity(text))
        if method is not None:
            by_method.setdefault(method, {})[Schedule.parse(text).stages[0].layer] = samples
    return by_method


def _example(method: str, keep: str) -> str:
    """A schedule with a method as its only stage."""
    layer = next(layer for layer in count() if acts_at(method, layer))
    return single_stage(method, layer, keep) + (";of=." if method == ORACLE else "")


def _identity(text: str) -> tuple[object, ...] | None:
    """What distinguishes a schedule's only stage besides its layer; None for another schedule.

    Where an oracle's measurements lay when it ran is no part of it: a folder may have been moved since.
    """
    stages = Schedule.parse(text).stages
    if len(stages) != 1:
        return None
    stage = stages[0]
    options = tuple((name, value) for name, value in stage.options if (stage.spec.kind, name) != ("oracle", "of"))
    return stage.method, type(stage.keep), stage.keep, options, stage.per
