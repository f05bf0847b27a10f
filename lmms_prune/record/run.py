"""The report of one of our runs in lmms-eval's results: ``config.batch_sizes[0]``. Without torch.

lmms-eval copies the values of a model's ``batch_sizes`` into the results' config as they are: the one place for what it does
not record by itself (its throughput section takes numbers only).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from lmms_prune.record.accounting import written
from lmms_prune.record.averages import Averages, TaskAverages
from lmms_prune.record.results import ResultsError

VERSIONS = ("lmms-prune", "lmms-eval", "torch", "transformers")
"""The packages whose versions each run records under their names."""


@dataclass(frozen=True)
class Provenance:
    """The origin of the answers, in addition to the settings.

    Args:
        versions: of the packages `VERSIONS`.
        code: a digest of this package's modules and tasks.
        commit: of the checkout, as git describes it; None where it is none.
        device: its name. attention: transformers' kernel. dtype: of the weights.
    """

    versions: Mapping[str, str] = field(default_factory=dict)
    code: str | None = None
    commit: str | None = None
    device: str | None = None
    attention: str | None = None
    dtype: str | None = None


@dataclass(frozen=True)
class Circumstances:
    """Circumstances that change a run's time but not its answers.

    Args:
        batch_size: that was asked for: a number or "auto".
        machine: the processor, with the number of cores that may be used.
        threads: of torch. processes: of the evaluation.
        largest_batch: that there was; None before anything was answered.
        other_load: share of the cores' time that other programs took meanwhile; None where that is not known.
    """

    batch_size: int | str | None = None
    machine: str | None = None
    threads: str | None = None
    processes: str | None = None
    largest_batch: int | None = None
    other_load: float | None = None


@dataclass(frozen=True)
class RunReport:
    """The report of a run.

    Args:
        settings: all that can change an answer, by the names of the model's arguments, as texts.
        provenance: what made the answers.
        circumstances: what changes times.
        averages: over all samples of the first process; None before anything was answered.
        tasks: the averages of each task.
        unpruned_samples: samples with an image that lost no visual token, though a schedule was to prune them.
        resumed: samples whose answers an earlier process had left in the journal.
        cut_images: samples with an image whose file is cut short or damaged.
        beyond_positions: samples that are longer than the model's positions.
    """

    settings: Mapping[str, str]
    provenance: Provenance = Provenance()
    circumstances: Circumstances = Circumstances()
    averages: Averages | None = None
    tasks: Mapping[str, TaskAverages] = field(default_factory=dict)
    unpruned_samples: int = 0
    resumed: int = 0
    cut_images: int = 0
    beyond_positions: int = 0

    @property
    def schedule(self) -> str | None:
        """As it was executed, every "?" solved."""
        return self.settings.get("schedule")

    @property
    def facts(self) -> dict[str, str]:
        """Provenance and circumstances as texts, by their names, as far as they are known; load and largest batch aside."""
        circumstances = self.circumstances
        size = None if circumstances.batch_size is None else str(circumstances.batch_size)
        if size == "auto":
            size = f"auto, at most {circumstances.largest_batch}"
        known = {**_flat(self.provenance), "batch_size": size}
        known |= {name: getattr(circumstances, name) for name in ("machine", "threads", "processes")}
        return {name: value for name, value in known.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as stored in the results, provenance and circumstances at the top level, unknown values left out."""
        outcome = {name: getattr(self, name) for name in _COUNTS}
        parts = {**_flat(self.provenance), **asdict(self.circumstances)}
        return {
            "schedule": self.schedule,
            "settings": dict(self.settings),
            **{name: value for name, value in parts.items() if value is not None},
            **outcome,
            "averages": written(self.averages),
            "tasks": {name: written(task) for name, task in self.tasks.items()},
        }

    @classmethod
    def of_results(cls, results: Mapping[str, Any]) -> RunReport | None:
        """The report in the content of a results file; None for a model that is not ours.

        Raises:
            ResultsError: its settings are damaged.
            ArithmeticError, LookupError, TypeError, ValueError, AttributeError: something else of it is.
        """
        for entry in results["config"].get("batch_sizes") or []:
            if isinstance(entry, dict) and ("settings" in entry or "identity" in entry):
                return cls.read(entry)
        return None

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> RunReport:
        """What `to_dict` has written, or a version of before, which wrote its settings as one text, ``identity``.

        Raises:
            as `of_results`.
        """
        texts = {name: value for name, value in entry.items() if isinstance(value, str)}
        load, averages = entry.get("other_load"), entry.get("averages")
        size, largest = entry.get("batch_size"), entry.get("largest_batch")
        return cls(
            settings=read_settings(entry),
            provenance=Provenance(
                {name: texts[name] for name in VERSIONS if name in texts},
                **{name: texts.get(name) for name in ("code", "commit", "device", "attention", "dtype")},
            ),
            circumstances=Circumstances(
                batch_size=size if size is None or isinstance(size, int) else str(size),
                **{name: texts.get(name) for name in ("machine", "threads", "processes")},
                largest_batch=None if largest is None else int(largest),
                other_load=None if load is None else float(load),
            ),
            averages=Averages.read(averages) if averages else None,
            tasks={str(name): TaskAverages.read(task) for name, task in entry.get("tasks", {}).items()},
            **{name: int(entry.get(name) or 0) for name in _COUNTS},
        )


_COUNTS = ("unpruned_samples", "resumed", "cut_images", "beyond_positions")


def _flat(provenance: Provenance) -> dict[str, Any]:
    parts = asdict(provenance)
    return {**parts.pop("versions"), **parts}


def settings_text(settings: Mapping[str, str]) -> str:
    """Settings as one text, equal where they are equal; records of before have them in this form alone, as ``identity``."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def read_settings(entry: Mapping[str, Any]) -> dict[str, str]:
    """The settings of a record, by name, whether it has them so or, from a version of before, as one text.

    Raises:
        ResultsError: neither is there, or it names no checkpoint.
    """
    known = entry.get("settings")
    if isinstance(known, Mapping):
        settings = {str(name): str(value) for name, value in known.items()}
    else:
        settings = {}
        # A template at the text's end may hold commas, so the first of a name counts.
        for piece in re.split(r", (?=[a-z_]+=)", str(entry.get("identity", ""))):
            name, _, value = piece.partition("=")
            settings.setdefault(name, value)
    if "pretrained" not in settings or not settings.get("seed", "0").isdigit():
        what = "settings" if "settings" in entry else "identity"
        raise ResultsError(f"damaged: its {what} {'are' if what == 'settings' else 'is'} {entry.get(what)!r}.")
    return settings
