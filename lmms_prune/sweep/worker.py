"""The evaluating process of a sweep, seen from the sweep."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from lmms_prune.harness.argument_text import extended
from lmms_prune.harness.evaluate import FINISHED, STARTED
from lmms_prune.harness.failures import Failure, read_log
from lmms_prune.record.redaction import printed, redacted, redacted_lines
from lmms_prune.sweep.jobs import Job, SweepError


class Worker:
    """One process, or one launcher with its processes, that evaluates jobs with the same weights.

    Args:
        launch: the command that starts Python, such as "torchrun --nproc_per_node 2"; "" for one plain process.
        secrets: values that no log may contain.

    Raises:
        SweepError: the launcher does not exist.
    """

    def __init__(self, launch: str, secrets: Collection[str]) -> None:
        start = shlex.split(launch) or [sys.executable]
        # Prefer the launcher in this Python's folder: the shell may find one of another environment.
        if (launcher := Path(sys.executable).parent / start[0]).is_file():
            start[0] = str(launcher)
        command = [*start, "-m", "lmms_prune.harness.evaluate"]
        self._used = False
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
        except OSError as error:
            raise SweepError(f"--launch {launch}: {start[0]}: {error.strerror}.") from None
        # One pipe keeps the output of all its processes in order; this side redacts it and writes the logs.
        self._lines = redacted_lines(printed(self._process), secrets)
        self._marks = {mark: redacted(mark, secrets) for mark in (STARTED, FINISHED)}

    def evaluate(self, job: Job) -> Failure | None:
        """Evaluate `job` into its partial folder, which exists and is empty.

        Returns:
            None, or why it failed; after a failure the process cannot be used again.
        """
        overrides = {"output_path": str(job.partial), "model_args": with_journal(job)}
        request = json.dumps({**job.settings, **overrides}, default=str)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended; its output says why
            self._process.stdin.write(request.encode() + b"\n")
            self._process.stdin.flush()
        log, begun = job.partial / "log.txt", False
        try:
            with log.open("w", encoding="utf-8", newline="") as file:
                for line in self._lines:
                    if line.strip() == self._marks[FINISHED]:
                        self._used = True
                        return None
                    if line.strip() == self._marks[STARTED]:
                        begun = True
                        continue
                    file.write(line)
                    file.flush()  # so that the log can be followed, and is complete after a crash
        except OSError as error:
            return Failure(f"its log cannot be written: {error.strerror}", True, "run")
        code = self._process.wait()
        # A negative code is a signal, which says nothing about the environment: anyone may have sent it.
        failure = read_log(log, before_any_run=not begun and not self._used and code > 0)
        return replace(failure, reason=f"{failure.reason or 'it printed nothing'} (exit code {code})")

    def close(self, *, at_once: bool = False) -> None:
        """End the process: when it has finished, or `at_once`."""
        if at_once:
            self._process.terminate()
        try:
            # Its last output belongs to no job, but must be read: a full pipe would keep the process from ending.
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # the process may have ended before it read the last request
                stream.close()


def with_journal(job: Job) -> str | dict[str, Any]:
    """The job's ``model_args``, a text or a mapping, with the path of its journal added."""
    model_args = job.settings.get("model_args") or ""
    if isinstance(model_args, str):
        return extended(model_args, {"journal": job.journal})
    return {**model_args, "journal": str(job.journal)}
