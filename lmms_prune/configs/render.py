"""Renders rows of `table` as ``--config`` files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from textwrap import wrap

from lmms_prune.configs.budget import claims, kept_average
from lmms_prune.configs.table import PAPER, ROWS, TABLES, PaperRow
from lmms_prune.models.architectures import architecture
from lmms_prune.record.files import write as write_file
from lmms_prune.schedule import Schedule

BATCH_SIZE = 8  # fits on a GPU of 40 GiB with either model


def render(row: PaperRow, folder: Path, include_path: str) -> str:
    """The text of a row's file.

    Args:
        row: a row of `ROWS`.
        folder: the folder that the file will be in.
        include_path: this package's task folder, as the file is to name it.
    """
    table, schedule = TABLES[row.model], Schedule.parse(row.text)
    title = f"{table.title}, {row.name} at {_in_words(row.budget)}: {_source(row)}."
    comments = [title, f"Settings: {row.settings}.", _budget(row, schedule)]
    comments.append(f"Written by `lmms-prune configs`. To run: lmms-eval --config {folder / row.stem}.yaml")
    stages = "none" if not schedule.stages else f"[{', '.join(map(str, schedule.stages))}]"
    lines = [f"# {line}" for comment in comments for line in wrap(comment, 116)]
    lines += [
        f"model: {table.family.model_name}",
        "model_args:",
        f"  pretrained: {table.family.checkpoint}",
        f"  schedule: {stages}",
    ]
    lines += [f"  seed: {row.seed}"]
    lines += [f"  # {table.about}"] if table.about else []
    lines += [f"  {name}: {value}" for name, value in table.arguments.items()]
    lines += [f"  batch_size: {BATCH_SIZE}", f"include_path: {include_path}", f"tasks: {table.tasks}"]
    lines += ["log_samples: true", f"output_path: results/{row.stem}"]
    return "\n".join(lines) + "\n"


def write(folder: Path, include_path: str) -> list[Path]:
    """Write every row's file to `folder`, and return the paths.

    Raises:
        WriteError: a file cannot be written.
    """
    written = []
    for row in ROWS.values():
        written.append(folder / f"{row.stem}.yaml")
        write_file(written[-1], render(row, folder, include_path))
    return written


def _source(row: PaperRow) -> str:
    """Where a row stands, or what it is for."""
    table = TABLES[row.model]
    if table.like:
        return "a control for this project's rows" if row.control else f"this project's row, not {PAPER}'s"
    return f"{PAPER}, {'a control for ' if row.control else ''}Table {table.number}"


def _in_words(budget: str) -> str:
    """A row's budget as part of a sentence."""
    return budget.replace("t", " visual tokens a layer").replace("%", " % of the visual tokens a layer")


def _budget(row: PaperRow, schedule: Schedule) -> str:
    """The comment with the claimed and the actual budget, as `lmms-prune check` reads it."""
    (claim,) = claims(f"# budget: {row.budget}")
    sizes = architecture(row.model)
    if schedule.at_most and sizes.tokens_per_image is None:
        return f"budget: {claim}"  # how much lower the actual value is depends on each image's size
    really = kept_average(schedule, sizes, claim.unit)
    return f"budget: {replace(claim, really=really)}"
