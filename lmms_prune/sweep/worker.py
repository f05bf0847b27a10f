"""The process that evaluates, as the sweep sees it."""

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

from lmms_prune.harness.evaluate import FINISHED, STARTED
from lmms_prune.harness.failures import Failure, read_log
from lmms_prune.record.redaction import printed, redacted, redacted_lines
from lmms_prune.sweep.units import SweepError, Unit


class Worker:
    """One process, or one launcher with its processes, that evaluates units whose weights are the same.

    Args:
        launch: what starts Python, such as "torchrun --nproc_per_node 2"; "" for one plain process.
        secrets: that no log may hold.

    Raises:
        SweepError: there is no such launcher.
    """

    def __init__(self, launch: str, secrets: Collection[str]) -> None:
        start = shlex.split(launch) or [sys.executable]
        # Launchers are installed beside this Python, which need not be the shell's.
        if (beside := Path(sys.executable).parent / start[0]).is_file():
            start[0] = str(beside)
        command = [*start, "-m", "lmms_prune.harness.evaluate"]
        self._used = False
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT)
        except OSError as error:
            raise SweepError(f"--launch {launch}: {start[0]}: {error.strerror}.") from None
        # One pipe takes all that its processes print, in order; logs are written on this side of it.
        self._lines = redacted_lines(printed(self._process), secrets)
        self._marks = {mark: redacted(mark, secrets) for mark in (STARTED, FINISHED)}

    def evaluate(self, unit: Unit) -> Failure | None:
        """Evaluate `unit` into its partial folder, which is there and empty.

        Returns:
            None, or why it failed; then the process is of no use any more.
        """
        own = {"output_path": str(unit.partial), "model_args": with_journal(unit)}
        job = json.dumps({**unit.settings, **own}, default=str)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended; what it printed says why
            self._process.stdin.write(job.encode() + b"\n")
            self._process.stdin.flush()
        log, begun = unit.partial / "log.txt", False
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
                    file.flush()  # it can be followed, and ends with what was printed last
        except OSError as error:
            return Failure(f"its log cannot be written: {error.strerror}", True, "run")
        code = self._process.wait()
        # A signal may have come from anywhere.
        failure = read_log(log, before_any_run=not begun and not self._used and code > 0)
        return replace(failure, reason=f"{failure.reason or 'it printed nothing'} (exit code {code})")

    def close(self, *, at_once: bool = False) -> None:
        """End the process: when it has finished, or `at_once`."""
        if at_once:
            self._process.terminate()
        try:
            # What it prints after its evaluations is of none of them, but a full pipe would keep it from ending.
            self._process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # what was written last may never have been read
                stream.close()


def with_journal(unit: Unit) -> str | dict[str, Any]:
    """The unit's ``model_args``, a text or a mapping, with its journal."""
    given = unit.settings.get("model_args") or ""
    if isinstance(given, str):
        return f"{given.strip().rstrip(', ')},journal={unit.journal}".lstrip(",")
    return {**given, "journal": str(unit.journal)}
