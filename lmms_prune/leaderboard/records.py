"""Records of finished evaluations, one each, whichever files their results came from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from lmms_prune.record.accounting import TokenTotals


@dataclass(frozen=True)
class Problem:
    """A file or folder among the results that cannot be used; the others still are."""

    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.path}: {self.message}"


@dataclass(frozen=True)
class Source:
    """One results file: one process of lmms-eval.

    Args:
        path: path of the file.
        date: start of the run, as lmms-eval writes it; sorts chronologically.
        command: the command that repeats the run.
        facts: recorded device, attention, dtype, code, versions and other facts that change times.
        requests, seconds: number of answered requests, and the seconds that their generation took.
        other_load: share of the cores' time that other programs took meanwhile; None if not recorded.
        unpruned: number of samples with an image that lost no visual token although a schedule should have pruned it.
        submitter, packed: who packed it, and the day on which; "" outside a pack.
        peak_memory: bytes at the peak. peak_memory_of: of the GPUs or of the process; as in `Circumstances`.
    """

    path: Path
    date: str
    command: str
    facts: Mapping[str, str]
    requests: float = 0.0
    seconds: float = 0.0
    other_load: float | None = None
    unpruned: int = 0
    submitter: str = ""
    packed: str = ""
    peak_memory: int | None = None
    peak_memory_of: str = ""


@dataclass(frozen=True)
class TaskRecord:
    """One task of an evaluation.

    Args:
        task: lmms-eval's name.
        score: the harness's score, on the paper's scale; None if there is none, or an impossible one.
        fault: why the recorded score is impossible; "" if it is possible.
        answered, documents: number of answered documents, and of all documents.
        samples: path of the samples file; None if none was logged.
        accounting: token accounting by the run's own averages; None for a model without our record.
        asked: a digest that is equal for equal prompts, data and generation settings.
        source: the results file.
        target: the field that the task names as its target; "" if a function computes it.
        factor: what the recorded number was multiplied by to give `score`.
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
    factor: float = 100.0

    def times(self, factor: float) -> TaskRecord:
        """Return the same on the scale of another factor: whether a task's scores are shares may show in a later file."""
        score = None if self.score is None else self.score * factor / self.factor
        return self if factor == self.factor else replace(self, score=score, factor=factor)


@dataclass(frozen=True)
class RunRecord:
    """A finished evaluation: one model with one set of settings, from one results file or from several.

    Args:
        wrapper: lmms-eval's name of the model, such as ``llava_pruned``.
        settings: every argument that can change an answer, including the seed and the executed schedule.
        ours: whether this plugin ran it; other runs have no schedule and no measured budget.
        tasks: task records by name.
    """

    wrapper: str
    settings: Mapping[str, str]
    ours: bool
    tasks: Mapping[str, TaskRecord]

    @property
    def model(self) -> str:
        """Return the checkpoint, with its revision unless that is "main", and with its adapter if it has one."""
        revision = self.settings.get("revision", "main")
        model = self.settings["pretrained"] + ("" if revision == "main" else f"@{revision}")
        if adapter := self.settings.get("peft") if self.ours else None:
            # Adapters of one name, such as "checkpoint-500", are told apart by their content.
            model += f"+{PurePath(adapter).name}@{self.settings.get('peft_sha256', '')[:8]}"
        return model

    @property
    def schedule(self) -> str | None:
        return self.settings.get("schedule") if self.ours else None

    @property
    def seed(self) -> int:
        """Return the seed of our random draws; 0 for a model that is not ours."""
        return int(self.settings.get("seed", 0)) if self.ours else 0

    @property
    def sources(self) -> list[Source]:
        """Return each results file once."""
        return list({task.source.path: task.source for task in self.tasks.values()}.values())

    def facts(self, name: str) -> set[str]:
        """Return the values that the processes recorded for a fact; "not recorded" for a process without one."""
        return {source.facts.get(name, "not recorded") for source in self.sources}

    def key(self, without: Sequence[str] = ()) -> tuple[str, ...]:
        """Return a tuple that is equal for runs with equal settings, those named in `without` excluded."""
        return (self.wrapper, *(f"{k}={v}" for k, v in sorted(self.settings.items()) if k not in without))
