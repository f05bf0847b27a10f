"""Progress of long commands, on stderr: a bar with the time left on a terminal, in a log a line from time to time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

Item = TypeVar("Item")
# A log has a line of a command after ten seconds, so that a short one leaves none, and later whenever it is this much older.
LOG_SECONDS, LOG_SHARE = 10.0, 0.05


class Progress:
    """How many of its steps a command has done, and how long the others will take at the rate so far.

    Args:
        what: what the steps are, in words: "documents", "evaluations".
        total: the number of steps; `expect` adds more.
        shown: False in all processes of a launcher but the first.
        log: whether a log has lines of it; False where the command prints lines of its own.
        live: whether a thread moves the clock between two steps; False where its CPU time would be measured with the rest.
    """

    def __init__(self, what: str, total: int = 0, *, shown: bool = True, log: bool = True, live: bool = True) -> None:
        self.console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._what, self._running, self._live = what, "", live
        self._done, self._total = 0, total
        self._log = shown and log and not self.console.is_terminal
        self._start = self._last_line = time.monotonic()
        self._counted_from: tuple[float, int] | None = None  # the time and the steps that the rate is counted from
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        self._bar = Bar(
            *(*columns, TimeElapsedColumn(), TextColumn("{task.fields[left]}", markup=False)),
            console=self.console,
            transient=True,
            auto_refresh=live,
            disable=not (shown and self.console.is_terminal),
            # What is printed on the same terminal stands above the bar; what goes to a file stays there.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._task = self._bar.add_task(what, total=total or None, left="")

    def __enter__(self) -> Progress:
        self._start = self._last_line = time.monotonic()
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def expect(self, steps: int) -> None:
        """Add steps that are to come."""
        self._total += steps
        self._draw()

    def begin(self, running: str) -> None:
        """Say what is running now."""
        self._running = running
        self._draw()

    def advance(self, steps: int = 1) -> None:
        """Count steps that have ended."""
        self.update(self._done + steps)

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items, each of which is a step that has ended when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def count(self, done: int, total: int) -> None:
        """Set how many steps have ended, and how many there are: what functions that know both call."""
        self._total = total
        self.update(done)

    def update(self, done: int, seconds_left: float | None = None) -> None:
        """Set how many steps have ended.

        Args:
            done: their number.
            seconds_left: an estimate that knows more than the rate so far.
        """
        if self._counted_from is None and done:
            # Steps that an earlier call has done took none of this one's time.
            self._counted_from = (self._start, 0) if done <= 1 else (time.monotonic(), done)
        self._done = done
        self._draw(seconds_left)

    def say(self, line: str) -> None:
        """Print a line that stays: above the bar, or in the log."""
        self.console.print(line)

    def _draw(self, seconds_left: float | None = None) -> None:
        now = time.monotonic()
        start, before = self._counted_from or (now, 0)
        left = time_left(self._done - before, self._total - before, now - start)
        left = left if seconds_left is None else in_words(seconds_left)
        text = ": ".join(filter(None, (self._what, self._running)))
        self._bar.update(self._task, description=text, completed=self._done, total=self._total or None, left=left)
        if not self._live:
            self._bar.refresh()
        if self._log and self._done and now - self._last_line >= max(LOG_SECONDS, LOG_SHARE * (now - self._start)):
            self._last_line = now
            self.say(f"{text}: {self._done} of {self._total}{left and f', {left}'}")


def time_left(done: int, total: int, seconds: float) -> str:
    """How long the rest will take at the rate so far, in words; empty before the first step, in the first second and at the end."""
    if not 0 < done < total or seconds < 1:
        return ""
    return in_words(seconds * (total - done) / done)


def in_words(seconds: float) -> str:
    """A remaining time, rounded as it would be said."""
    return f"about {seconds / 60:.0f} min left" if seconds >= 90 else f"about {seconds:.0f} s left"
