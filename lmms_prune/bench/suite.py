"""Runs the suite's parts one after another until the time is up; what is measured is written at once."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

from lmms_prune.bench.page import html
from lmms_prune.bench.parts import Part
from lmms_prune.harness.circumstances import OtherLoad
from lmms_prune.record.files import make_folder, read_text, write
from lmms_prune.record.redaction import redacted

_GRACE = 10.0  # seconds between asking a part to end and ending it
_TAIL = 1500  # characters of a failed part's output that are kept
_PACKAGES = f"{Path(__file__).parents[2]}{os.sep}"
PROGRAM = (str(Path(sys.executable).with_name("lmms-prune")),)


class SuiteError(ValueError):
    """A folder whose results cannot be added to, or a device that this machine lacks; the message says why."""


@dataclass(frozen=True)
class Outcome:
    """What became of a part.

    Args:
        state: "done"; "failed", with `error`; "stopped" when the time was up; "skipped" because too little time was left;
            "absent" if this machine cannot run it.
        title: what the part measures.
        kind: what `result` holds.
        command: the command that measures it again.
        seconds: how long it ran.
        guessed: the seconds for which it was planned.
        date: when it ended.
        other_load: the share (0 to 1) of the cores' time that was busy while it ran, other than by this suite.
        error: why there is no result, or why it is one of a failure.
        result: the JSON that its command printed.
    """

    state: Literal["done", "failed", "stopped", "skipped", "absent"]
    title: str
    kind: str
    command: str
    seconds: float = 0.0
    guessed: float = 0.0
    date: str = ""
    other_load: float | None = None
    error: str = ""
    result: Mapping[str, Any] | None = None


@dataclass
class Suite:
    """The suite's results so far, as they are on disk.

    Args:
        folder: where they are written.
        facts: what they depend on; see `lmms_prune.bench.machine`.
        small: whether they are of the demo's models.
        secrets: values that no file may contain.
        outcomes: of each part, by its name.
    """

    folder: Path
    facts: Mapping[str, str]
    small: bool
    secrets: Collection[str]
    outcomes: dict[str, Outcome]

    @classmethod
    def of(cls, folder: Path, facts: Mapping[str, str], small: bool, secrets: Collection[str] = ()) -> Suite:
        """Return what an earlier call has left in the folder, or an empty suite.

        Raises:
            SuiteError: the file there is damaged, or its results are of another card, version or commit.
            WriteError: the folder cannot be made.
        """
        suite = cls(folder, facts, small, secrets, {})
        make_folder(folder)
        if suite.json_path.exists():
            suite._read()
        return suite

    @property
    def json_path(self) -> Path:
        """Results of different cards, and of both sizes, have different files."""
        card = re.sub(r"[^a-z0-9]+", "-", self.facts["card"].lower().partition(",")[0]).strip("-")
        name = "cpu" if card == "none" else card
        return self.folder / f"suite-{name}{'-small' if self.small else ''}.json"

    @property
    def page_path(self) -> Path:
        """The page of the same results."""
        return self.json_path.with_suffix(".html")

    def record(self, name: str, outcome: Outcome) -> None:
        """Keep a part's outcome, and write JSON and page.

        Raises:
            WriteError: a file cannot be written.
        """
        self.outcomes[name] = outcome
        parts = {name: asdict(outcome) for name, outcome in self.outcomes.items()}
        content = {"format": 1, "small": self.small, "facts": dict(self.facts), "parts": parts}
        write(self.json_path, json.dumps(content, indent=1) + "\n")
        write(self.page_path, html(content))

    def _read(self) -> None:
        path, advice = self.json_path, "give another --out, or move that file away"
        try:
            content = json.loads(read_text(path))
            self.outcomes = {name: Outcome(**fields) for name, fields in content["parts"].items()}
            facts = dict(content["facts"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SuiteError(f"{path} cannot be added to ({type(error).__name__}: {error}); {advice}.") from error
        for name in {**facts, **self.facts}:
            before, now = facts.get(name, "unknown"), self.facts.get(name, "unknown")
            if before != now:
                raise SuiteError(f"{path} was measured with {name} {before}, and now it is {now}; {advice}.")


def run_suite(
    suite: Suite,
    parts: Sequence[Part],
    minutes: float,
    progress: Callable[[str], None],
    program: Sequence[str] = PROGRAM,
    ended: Callable[[int, float], None] = lambda number, seconds_left: None,
) -> None:
    """Run all parts that have no result yet, in order, and record each as soon as it has ended.

    A part is skipped if it would need more time than is left, and stopped when the time is up. Failures do not stop
    the others.

    Args:
        suite: holds the results of earlier calls, and gets those of this one.
        parts: the parts.
        minutes: after which nothing runs any more.
        progress: called with a line for each part.
        program: the command line before a part's words.
        ended: called with the number of parts that have ended, and the seconds that the others take by a guess.
    """
    end = time.monotonic() + 60 * minutes
    for number, part in enumerate(parts, 1):
        ended(number - 1, sum(later.seconds for later in parts[number - 1 :]))
        if part.name in suite.outcomes and suite.outcomes[part.name].state == "done":
            progress(f"{number}/{len(parts)} {part.name}: is there")
            continue
        remaining = end - time.monotonic()
        command = _clean(shlex.join(["lmms-prune", *part.words]), suite.secrets)
        about = Outcome("absent", part.title, part.kind, command, guessed=part.seconds, error=part.absent)
        if part.absent:
            outcome = about
        elif remaining < part.seconds:
            reason = f"needs about {part.seconds:.0f} s by a guess, and {max(remaining, 0):.0f} s were left"
            outcome = replace(about, state="skipped", error=reason)
        else:
            progress(
                f"{number}/{len(parts)} {part.name}: about {part.seconds:.0f} s by a guess, of the {remaining:.0f} s left"
            )
            outcome = _run(about, [*program, *part.words], remaining, suite.secrets)
        if outcome.state != "done":
            progress(f"{number}/{len(parts)} {part.name}: {outcome.state}: {outcome.error}")
        suite.record(part.name, outcome)


def _run(about: Outcome, command: Sequence[str], remaining: float, secrets: Collection[str]) -> Outcome:
    """Run a part until it ends, or until `left` seconds have passed."""
    start, load = time.monotonic(), OtherLoad()
    pipe = subprocess.PIPE
    # A group of its own, so that what the part has started is ended with it.
    process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, errors="replace", start_new_session=True)
    in_time = True
    try:
        output, errors = process.communicate(timeout=remaining)
    except subprocess.TimeoutExpired:
        in_time = False
    finally:
        _end(process)
    if not in_time:
        output, errors = process.communicate()
    seconds = time.monotonic() - start
    about = replace(about, seconds=seconds, date=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    if not in_time:
        return replace(about, state="stopped", error=f"was not done after {remaining:.0f} s, the time left")
    result = _json(_clean(output, secrets))
    measured = replace(about, other_load=load.share(), result=result)
    if process.returncode == 0 and result is not None:
        return replace(measured, state="done")
    last_words = _clean(errors, secrets).strip()[-_TAIL:] or "it printed no JSON"
    failures = (result or {}).get("failures")
    reason = f"{len(failures)} checks failed, the first: {failures[0]}" if failures else last_words
    return replace(measured, state="failed", error=f"exit code {process.returncode}: {reason}")


def _end(process: subprocess.Popen[str]) -> None:
    """End a part and all that it has started: ask first, so that temporary folders are removed."""
    for number, patience in ((signal.SIGINT, _GRACE), (signal.SIGKILL, None)):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)


def _json(output: str) -> dict[str, Any] | None:
    """Return the JSON object in the last line, if there is one."""
    with suppress(ValueError, IndexError):
        content = json.loads(output.strip().splitlines()[-1])
        return content if isinstance(content, dict) else None
    return None


def _clean(text: str, secrets: Collection[str]) -> str:
    """Return a text without secrets, and without the folder that this package lies in."""
    return redacted(text, secrets).replace(_PACKAGES, "").replace(f"{Path.home()}{os.sep}", "~/")
