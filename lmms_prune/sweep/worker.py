"""The process that evaluates, as the sweep sees it."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from lmms_prune.harness.evaluate import FINISHED
from lmms_prune.sweep.units import SweepError, Unit

_OURS = "lmms-prune: error:"
_ERROR = re.compile(r"[A-Za-z_][\w.]*(Error|Exception|Exit)\b")


class Worker:
    """One process, or one launcher with its processes, that evaluates units whose weights are the same.

    Args:
        launch: what starts Python, such as "torchrun --nproc_per_node 2"; "" for one plain process.

    Raises:
        SweepError: there is no such launcher.
    """

    def __init__(self, launch: str) -> None:
        start = shlex.split(launch) or [sys.executable]
        # Launchers are installed beside this Python, which need not be the shell's.
        if (beside := Path(sys.executable).parent / start[0]).is_file():
            start[0] = str(beside)
        command = [*start, "-m", "lmms_prune.harness.evaluate"]
        # What is printed outside of evaluations; it is gone with the process.
        self._log = TemporaryFile()  # noqa: SIM115
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True)
        except OSError as error:
            self._log.close()
            raise SweepError(f"--launch {launch}: {start[0]}: {error.strerror}.") from None

    def evaluate(self, unit: Unit) -> str | None:
        """Evaluate `unit` into its partial folder, which is there and empty.

        Returns:
            None, or why it failed; then the process is no more.
        """
        log = unit.partial / "log.txt"
        own = {"output_path": str(unit.partial), "model_args": with_journal(unit)}
        job = {"settings": {**unit.settings, **own}, "log": str(log)}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(job, default=str) + "\n")
            self._process.stdin.flush()
            # Launchers may print lines of their own.
            if any(line.strip() == FINISHED for line in self._process.stdout):
                return None
        except BrokenPipeError:
            pass
        code = self._process.wait()
        if not log.is_file():  # it ended before it came to the unit
            self._log.seek(0)
            log.write_bytes(self._log.read())
        return f"{why(log) or 'it printed nothing'} (exit code {code})"

    def close(self, *, at_once: bool = False) -> None:
        """End the process: when it has finished, or `at_once`."""
        if at_once:
            self._process.terminate()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(BrokenPipeError):  # what was written last may never have been read
                stream.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()


def with_journal(unit: Unit) -> str | dict[str, Any]:
    """The unit's ``model_args``, a text or a mapping, with its journal."""
    given = unit.settings.get("model_args") or ""
    if isinstance(given, str):
        return f"{given.strip().rstrip(', ')},journal={unit.journal}".lstrip(",")
    return {**given, "journal": str(unit.journal)}


def why(log: Path) -> str:
    """Why a run failed: our own message, which may take several lines, else the last error, else the last line."""
    text = log.read_text(encoding="utf-8", errors="replace").strip()
    if _OURS in text:
        return text[text.rindex(_OURS) + len(_OURS) :].strip()
    lines = [line.strip() for line in text.splitlines()]
    return next((line for line in reversed(lines) if _ERROR.match(line)), lines[-1] if lines else "")
