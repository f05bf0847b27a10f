"""The report of an lmms-prune run, stored in lmms-eval's results as ``config.batch_sizes[0]``. Without torch.

lmms-eval copies the values of a model's ``batch_sizes`` unchanged into the config of the results. No other part of the
results takes arbitrary values from a model: the throughput section takes numbers only.
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
"""Packages whose versions each run records, each under the name of the package."""

GPU_MEMORY, PROCESS_MEMORY = "GPU", "process"
"""Of what a peak of memory is: allocated on the GPUs, or resident in the process where there is none."""


@dataclass(frozen=True)
class Provenance:
    """What determines the answers besides the settings. None: not known.

    Args:
        versions: versions of the packages `VERSIONS`, by package name.
        code: digest of this package's modules and tasks.
        commit: commit of the checkout, as `git describe` prints it; None outside a git checkout.
        device: name of the device.
        attention: attention implementation of transformers.
        dtype: dtype of the weights.
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
        batch_size: requested batch size: a number or "auto".
        machine: the processor, with the number of usable cores.
        threads: number of torch's threads.
        processes: number of processes of the evaluation.
        largest_batch: samples in the largest batch; None before the first answer.
        other_load: share of the cores' time that other programs used during the run; None if not known.
        peak_memory: bytes at the run's peak, of the process that used most, with the weights; None before the first answer.
        peak_memory_of: of what: `GPU_MEMORY` (allocated by torch; several GPUs are added) or `PROCESS_MEMORY` (resident set size).
    """

    batch_size: int | str | None = None
    machine: str | None = None
    threads: str | None = None
    processes: str | None = None
    largest_batch: int | None = None
    other_load: float | None = None
    peak_memory: int | None = None
    peak_memory_of: str | None = None


@dataclass(frozen=True)
class RunReport:
    """The report of a run.

    Args:
        settings: every model argument that can change an answer, as text, by the argument's name.
        provenance: what determines the answers besides the settings.
        circumstances: what changes the run's time.
        averages: averages over all samples of the first process; None before the first answer.
        tasks: averages of each task.
        unpruned_samples: samples with an image that kept every visual token although the schedule has stages.
        resumed: samples whose answers were read from the journal of an earlier process.
        cut_images: samples with an image whose file is truncated or damaged.
        beyond_positions: samples that are longer than the model's maximum number of positions.
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
        """The executed schedule, with every "?" solved."""
        return self.settings.get("schedule")

    @property
    def facts(self) -> dict[str, str]:
        """Known provenance and circumstances as texts, by name, except numbers of the run itself."""
        circumstances = self.circumstances
        size = None if circumstances.batch_size is None else str(circumstances.batch_size)
        if size == "auto":
            size = f"auto, at most {circumstances.largest_batch}"
        known = {**_flat(self.provenance), "batch_size": size}
        known |= {name: getattr(circumstances, name) for name in ("machine", "threads", "processes")}
        return {name: value for name, value in known.items() if value is not None}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as stored in the results.

        Provenance and circumstances are at the top level; unknown values are omitted.
        """
        counts = {name: getattr(self, name) for name in _COUNTS}
        parts = {**_flat(self.provenance), **asdict(self.circumstances)}
        return {
            "schedule": self.schedule,
            "settings": dict(self.settings),
            **{name: value for name, value in parts.items() if value is not None},
            **counts,
            "averages": written(self.averages),
            "tasks": {name: written(task) for name, task in self.tasks.items()},
        }

    @classmethod
    def of_results(cls, results: Mapping[str, Any]) -> RunReport | None:
        """Read the report from the content of a results file; None for a model of another package.

        Raises:
            ResultsError: the report's settings are damaged.
            ArithmeticError, LookupError, TypeError, ValueError, AttributeError: another part of the report is damaged.
        """
        for entry in results["config"].get("batch_sizes") or []:
            if isinstance(entry, dict) and ("settings" in entry or "identity" in entry):
                return cls.read(entry)
        return None

    @classmethod
    def read(cls, entry: Mapping[str, Any]) -> RunReport:
        """Read what `to_dict` wrote.

        Reports of older versions, which have their settings as one text called ``identity``, are read too.

        Raises:
            the errors of `of_results`.
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
                peak_memory=None if entry.get("peak_memory") is None else int(entry["peak_memory"]),
                peak_memory_of=texts.get("peak_memory_of"),
            ),
            averages=Averages.read(averages) if averages else None,
            tasks={str(name): TaskAverages.read(task) for name, task in entry.get("tasks", {}).items()},
            **{name: int(entry.get(name) or 0) for name in _COUNTS},
        )


_COUNTS = ("unpruned_samples", "resumed", "cut_images", "beyond_positions")


def _flat(provenance: Provenance) -> dict[str, Any]:
    """Return the provenance as one mapping, with each package's version under the package's name."""
    parts = asdict(provenance)
    return {**parts.pop("versions"), **parts}


def settings_text(settings: Mapping[str, str]) -> str:
    """Format settings as one text; equal settings give equal texts.

    Older records have their settings only in this form, as ``identity``.
    """
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def read_settings(entry: Mapping[str, Any]) -> dict[str, str]:
    """Read the settings of a record, by name. Older records have them as one text, ``identity``.

    Raises:
        ResultsError: the settings are missing, name no checkpoint, or have a seed that is not a number.
    """
    recorded = entry.get("settings")
    if isinstance(recorded, Mapping):
        settings = {str(name): str(value) for name, value in recorded.items()}
    else:
        settings = {}
        # A chat template at the end of the text may contain text like ", name=", so the first value of a name counts.
        for piece in re.split(r", (?=[a-z_]+=)", str(entry.get("identity", ""))):
            name, _, value = piece.partition("=")
            settings.setdefault(name, value)
    if "pretrained" not in settings or not settings.get("seed", "0").isdigit():
        key = "settings" if "settings" in entry else "identity"
        raise ResultsError(f"damaged: its {key} {'are' if key == 'settings' else 'is'} {entry.get(key)!r}.")
    return settings
