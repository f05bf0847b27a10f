"""Runs a sweep on a cluster through submitit, one cluster job for each configuration.

A cluster job evaluates all `Job`s of its configuration, one for each task.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_prune.harness.failures import read_log
from lmms_prune.record.redaction import redacted
from lmms_prune.sweep.jobs import Job, SweepError
from lmms_prune.sweep.results import seconds_if_complete
from lmms_prune.sweep.run import JobOutcome

CLUSTERS = ("slurm", "local")
_POLL_SECONDS = 2.0  # between two looks at the cluster jobs


def run_on_cluster(
    jobs: Sequence[Job],
    paths: Sequence[Path],
    options: Mapping[str, object],
    cluster: str,
    parameters: Sequence[str],
    secrets: Collection[str],
) -> Generator[JobOutcome]:
    """Submit a cluster job for each incomplete configuration, and yield each job's outcome as it finishes.

    Args:
        jobs: the jobs of all configurations, all with the same results folder.
        paths: the configuration files, as written on the command line.
        options: the command's options to pass on to each cluster job; those that are None are omitted.
        cluster: one of `CLUSTERS`.
        parameters: ``name=value`` for submitit.
        secrets: values that no file may contain. Cluster jobs get them from the environment that they inherit.

    Raises:
        SweepError: submitit is not installed or rejects a parameter, or a cluster job's files would contain a secret.
    """
    waiting = []
    for job in jobs:
        seconds = seconds_if_complete(job)
        if seconds is None:
            waiting.append(job)
        else:
            yield JobOutcome(job, "skipped", seconds)
    if not waiting:
        return
    program = [str(Path(sys.executable).with_name("lmms-prune")), "sweep", *map(str, paths)]
    arguments = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    refuse_secrets([*program, *arguments, *parameters], cluster, secrets)
    submit = submitter(waiting[0].out / ".jobs", cluster, parameters)
    submitted = {
        part: submit([*program, *arguments, "--shard", part]) for part in dict.fromkeys(job.part for job in waiting)
    }
    while waiting:
        # Read before the results: a cluster job that ends in between must not count as failed.
        ended = {part for part, cluster_job in submitted.items() if cluster_job.done()}
        for job in list(waiting):
            seconds = seconds_if_complete(job)
            if seconds is not None:
                yield JobOutcome(job, "done", seconds)
            elif job.part in ended:
                yield _unfinished(job, submitted[job.part], secrets)
            else:
                continue
            waiting.remove(job)
        time.sleep(_POLL_SECONDS if waiting else 0)


def refuse_secrets(words: Sequence[str], cluster: str, secrets: Collection[str]) -> None:
    """Refuse a command whose words hold a secret, since a cluster job's files have them.

    Raises:
        SweepError: names the word.
    """
    for text in words:
        if (shown := redacted(text, secrets)) != text:
            raise SweepError(
                f"--cluster {cluster}: '{shown}' holds a secret, which would be written to the jobs' files; set it as an "
                "environment variable, which jobs inherit."
            )


def _unfinished(job: Job, cluster_job: Any, secrets: Collection[str]) -> JobOutcome:
    """The outcome of a job that is incomplete although its cluster job has ended."""
    log = job.partial / "log.txt"
    if cluster_job.exception() is None:
        return JobOutcome(job, "busy")
    if log.is_file():
        return JobOutcome(job, "failed", reason=f"{read_log(log).reason}\n  log: {log}")
    path = cluster_job.paths.stderr
    # submitit and the shell write this file, so it has not been redacted yet.
    reason = redacted(read_log(path).reason, secrets) if path.is_file() else cluster_job.state
    return JobOutcome(job, "failed", reason=f"{reason}\n  log: {path}")


def submitter(folder: Path, cluster: str, parameters: Sequence[str]) -> Callable[[list[str]], Any]:
    """A function that submits a command as a cluster job, and returns submitit's job.

    Args:
        folder: of the jobs' files.
        cluster: one of `CLUSTERS`.
        parameters: ``name=value`` for submitit.

    Raises:
        SweepError: submitit is not installed or rejects a parameter.
    """
    if cluster not in CLUSTERS:
        raise SweepError(f"--cluster {cluster}: use {' or '.join(CLUSTERS)}.")
    try:
        import submitit
    except ImportError:
        raise SweepError(f"--cluster {cluster}: submitit is not installed; pip install 'lmms-prune[slurm]'.") from None
    wrong = [text for text in parameters if not re.fullmatch(r"[a-z_]\w*=.+", text)]
    if wrong:
        raise SweepError(f"--cluster-option {wrong[0]}: write name=value, such as slurm_partition=gpu.")
    pairs = (text.split("=", 1) for text in parameters)
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        executor.update_parameters(**{name: int(value) if value.isdigit() else value for name, value in pairs})
    except (RuntimeError, TypeError, ValueError, NameError) as error:
        raise SweepError(f"--cluster {cluster}: {str(error).strip()}") from None
    return lambda command: executor.submit(submitit.helpers.CommandFunction(command, verbose=False))
