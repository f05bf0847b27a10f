"""One record for each finished evaluation, whatever files it came in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lmms_prune.record.accounting import TokenTotals


@dataclass(frozen=True)
class Problem:
    """Something among the results that cannot be used; the rest is."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


@dataclass(frozen=True)
class Source:
    """One results file: one process of lmms-eval.

    Args:
        path: of the file.
        date: when the run began, as the harness writes it; sorts.
        command: what repeats the run.
        facts: device, attention, dtype, code, the versions and what else changes times, as far as they were recorded.
        requests, seconds: answered, and the time their generation took.
        other_load: share of the cores' time that other programs took meanwhile; None if it was not recorded.
        unpruned: samples with an image that lost no visual token, though a schedule was to prune them.
    """

    path: Path
    date: str
    command: str
    facts: Mapping[str, str]
    requests: float = 0.0
    seconds: float = 0.0
    other_load: float | None = None
    unpruned: int = 0


@dataclass(frozen=True)
class TaskRecord:
    """One task of an evaluation.

    Args:
        task: lmms-eval's name.
        score: on the paper's scale, as the harness scored it; None if it did not, or recorded what is no score of the benchmark.
        fault: why what was recorded can be no score of the benchmark; "" if it can.
        answered, documents: how many documents were answered, of how many.
        samples: the samples file; None if none was logged.
        accounting: what the run's own averages say; None for a model without our record.
        asked: equal for the same prompts, data and generation settings.
        source: where it stands.
        target: the field that the task names as its target; "" where a function finds it.
    """

    task: str
    score: float | None
    answered: int
    documents: int
    samples: Path | None
    accounting: TokenTotals | None
    asked: str
    source: Source
    target: str = ""
    fault: str = ""


@dataclass(frozen=True)
class RunRecord:
    """A finished evaluation: one model with one set of settings, from one results file or from several.

    Args:
        wrapper: lmms-eval's name of the model, such as ``llava_pruned``.
        settings: every argument that can change an answer, the seed and the schedule as executed among them.
        ours: whether it is a run of this plugin; others have no schedule and no measured budget.
        tasks: by name.
    """

    wrapper: str
    settings: Mapping[str, str]
    ours: bool
    tasks: Mapping[str, TaskRecord]

    @property
    def model(self) -> str:
        """The checkpoint, with its revision where that is not the main one."""
        revision = self.settings.get("revision", "main")
        return self.settings["pretrained"] + ("" if revision == "main" else f"@{revision}")

    @property
    def schedule(self) -> str | None:
        return self.settings.get("schedule") if self.ours else None

    @property
    def seed(self) -> int:
        """Of our random draws; 0 for a model that is not ours."""
        return int(self.settings.get("seed", 0)) if self.ours else 0

    @property
    def sources(self) -> list[Source]:
        """Each results file once."""
        return list({task.source.path: task.source for task in self.tasks.values()}.values())

    def facts(self, name: str) -> set[str]:
        """All that its processes recorded under this name; "not recorded" where one did not."""
        return {source.facts.get(name, "not recorded") for source in self.sources}

    def key(self, without: Sequence[str] = ()) -> tuple[str, ...]:
        """Equal for runs with the same settings."""
        return (self.wrapper, *(f"{k}={v}" for k, v in sorted(self.settings.items()) if k not in without))
