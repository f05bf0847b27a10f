"""A sweep as jobs of a cluster, one for each configuration, through submitit."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lmms_prune.harness.failures import read_log
from lmms_prune.record.redaction import redacted
from lmms_prune.sweep.results import seconds_if_complete
from lmms_prune.sweep.run import Outcome
from lmms_prune.sweep.units import SweepError, Unit

CLUSTERS = ("slurm", "local")
_EVERY = 2.0  # seconds between two looks at the jobs


def run_jobs(
    units: Sequence[Unit],
    paths: Sequence[Path],
    options: Mapping[str, object],
    cluster: str,
    parameters: Sequence[str],
    secrets: Collection[str],
) -> Generator[Outcome]:
    """Submit a job for each configuration that is not complete, and tell of its units as they are finished.

    Args:
        units: of all configurations, in one folder.
        paths: of the files, as the command was given them.
        options: of the command, to be passed on; None is left out.
        cluster: one of `CLUSTERS`.
        parameters: ``name=value`` for submitit.
        secrets: values that no file may hold. Jobs have them from the environment that they inherit.

    Raises:
        SweepError: submitit is not there, or does not take something; or a job's files would hold a secret.
    """
    waiting = []
    for unit in units:
        seconds = seconds_if_complete(unit)
        if seconds is None:
            waiting.append(unit)
        else:
            yield Outcome(unit, "skipped", seconds)
    if not waiting:
        return
    program = [str(Path(sys.executable).with_name("lmms-prune")), "sweep", *map(str, paths)]
    given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
    for text in (*program, *given, *parameters):
        if (shown := redacted(text, secrets)) != text:
            raise SweepError(
                f"--cluster {cluster}: '{shown}' holds a secret, which would be written to the jobs' files; set it as an "
                "environment variable, which jobs inherit."
            )
    submit = _submitter(waiting[0].out / ".jobs", cluster, parameters)
    jobs = {part: submit([*program, *given, "--shard", part]) for part in dict.fromkeys(unit.part for unit in waiting)}
    while waiting:
        # Asked before the results, so that a job that ends in between is not taken for a failure.
        ended = {part for part, job in jobs.items() if job.done()}
        for unit in list(waiting):
            seconds = seconds_if_complete(unit)
            if seconds is not None:
                yield Outcome(unit, "done", seconds)
            elif unit.part in ended:
                yield _unfinished(unit, jobs[unit.part], secrets)
            else:
                continue
            waiting.remove(unit)
        time.sleep(_EVERY if waiting else 0)


def _unfinished(unit: Unit, job: Any, secrets: Collection[str]) -> Outcome:
    """Of a unit that is not complete though its job has ended."""
    log = unit.partial / "log.txt"
    if job.exception() is None:
        return Outcome(unit, "busy")
    if log.is_file():
        return Outcome(unit, "failed", reason=f"{read_log(log).reason}\n  log: {log}")
    path = job.paths.stderr
    # What submitit and the shell have printed there, nothing of ours has read.
    reason = redacted(read_log(path).reason, secrets) if path.is_file() else job.state
    return Outcome(unit, "failed", reason=f"{reason}\n  log: {path}")


def _submitter(folder: Path, cluster: str, parameters: Sequence[str]) -> Callable[[list[str]], Any]:
    """What submits a command as a job.

    Raises:
        SweepError: see `run_jobs`.
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
