"""A row of the table as the text of a ``--config`` file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from textwrap import wrap

from lmms_prune.configs.budget import claims, left
from lmms_prune.configs.table import MODELS, PAPER, ROWS, Row
from lmms_prune.models.architectures import architecture
from lmms_prune.record.files import write as write_file
from lmms_prune.schedule import Schedule

BATCH_SIZE = 8  # fits beside either model on a GPU of 40 GiB


def render(row: Row, folder: Path, include_path: str) -> str:
    """The text of a row's file.

    Args:
        row: of `ROWS`.
        folder: where the file will stand.
        include_path: the folder of this package's tasks, as the file names it.
    """
    model, schedule = MODELS[row.model], Schedule.parse(row.text)
    what = f"beside Table {model.table}" if row.control else f"Table {model.table}"
    title = f"{model.title}, {row.name} at {_in_words(row.budget)}: {PAPER}, {what}."
    comments = [title, f"Settings: {row.settings}.", _budget(row, schedule)]
    comments.append(f"Written by `lmms-prune configs`. To run: lmms-eval --config {folder / row.stem}.yaml")
    stages = "none" if not schedule.stages else f"[{', '.join(map(str, schedule.stages))}]"
    lines = [f"# {line}" for comment in comments for line in wrap(comment, 116)]
    lines += [f"model: {model.wrapper}", "model_args:", f"  pretrained: {model.pretrained}", f"  schedule: {stages}"]
    lines += [f"  seed: {row.seed}"]
    lines += [f"  # {model.about}"] if model.about else []
    lines += [f"  {name}: {value}" for name, value in model.arguments.items()]
    lines += [f"  batch_size: {BATCH_SIZE}", f"include_path: {include_path}", f"tasks: {model.tasks}"]
    lines += ["log_samples: true", f"output_path: results/{row.stem}"]
    return "\n".join(lines) + "\n"


def write(folder: Path, include_path: str) -> list[Path]:
    """Write every row's file below `folder`, and return the files.

    Raises:
        WriteError: one cannot be written.
    """
    written = []
    for row in ROWS.values():
        written.append(folder / f"{row.stem}.yaml")
        write_file(written[-1], render(row, folder, include_path))
    return written


def _in_words(budget: str) -> str:
    return budget.replace("t", " visual tokens a layer").replace("%", " % of the visual tokens a layer")


def _budget(row: Row, schedule: Schedule) -> str:
    """The comment that says what the row claims and what is left, as `lmms-prune check` reads it."""
    (claim,) = claims(f"# budget: {row.budget}")
    sizes = architecture(row.model)
    if schedule.at_most and sizes.tokens_per_image is None:
        return f"budget: {claim}"  # by how much less each image's own size decides
    really = left(schedule, sizes, claim.unit)
    return f"budget: {replace(claim, really=really)}"
