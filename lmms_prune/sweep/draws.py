"""Documents drawn at random (``--sample``) instead of the first of each task, for every command that evaluates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from lmms_prune.sweep.jobs import Job, SweepError
from lmms_prune.terminal.console import fail

if TYPE_CHECKING:
    from lmms_prune.harness.documents import Draw

Sample = Annotated[
    int | None, typer.Option(min=1, help="So many documents of each task, drawn at random, instead of the first.")
]
SampleSeed = Annotated[int, typer.Option(min=0, help="Seed of --sample.")]


def draw_of(sample: int | None, seed: int, limit: int | None) -> Draw | None:
    """The draw of ``--sample`` and ``--sample-seed``; None without it."""
    from lmms_prune.harness.documents import Draw

    if sample is not None and limit is not None:
        fail(
            f"--sample {sample} and --limit {limit}: the first draws documents at random, the second takes the first ones."
        )
    if sample is None and seed:
        fail(f"--sample-seed {seed}: nothing is drawn; give --sample too.")
    return None if sample is None else Draw(sample, seed)


def draw_jobs(jobs: Sequence[Job], draw: Draw) -> list[Job]:
    """Restrict the jobs of a sweep to documents drawn from each task, the same ones in all configurations.

    Raises:
        SweepError: a file skips documents, which a draw cannot.
        ArgumentError: a task that does not exist, or from which so many cannot be drawn.
    """
    from lmms_prune.harness.documents import document_numbers

    for job in jobs:
        if job.settings.get("offset"):
            raise SweepError(
                f"{job}: its file says offset: {job.settings['offset']}; --sample draws from all documents, so leave one out."
            )
    drawn: dict[tuple[str, str, tuple[str, ...]], Mapping[str, Sequence[int]]] = {}
    restricted = []
    for job in jobs:
        include = job.settings["include_path"]
        key = (job.task, str(job.settings["model"]), (include,) if isinstance(include, str) else tuple(include))
        if key not in drawn:
            drawn[key] = document_numbers([job.task], key[1], include=key[2], draw=draw)
        restricted.append(with_documents(job, drawn[key][job.task], draw.described))
    return restricted


def with_documents(job: Job, numbers: Sequence[int], sample: str) -> Job:
    """The job on the documents with these numbers; `sample` says how they were drawn, and is recorded in the results."""
    own = {"documents": list(numbers), "sample": sample, "limit": len(numbers)}
    return replace(job, settings={**job.settings, **own})
