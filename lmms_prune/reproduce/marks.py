"""Marks of claims: what a claim says, its rule, and the interval that decides it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from lmms_prune.leaderboard.interval import Interval

State = Literal["reproduced", "not reproduced", "not run"]
REPRODUCED: State = "reproduced"
NOT_REPRODUCED: State = "not reproduced"
NOT_RUN: State = "not run"

MARGIN = 2.0  # percent of the unpruned score; a smaller difference counts as none
ABSTRACT = "abstract of arXiv 2512.07580"
UNDECIDED = "undecided: the interval is too wide"
TOO_FEW = "too few documents for an interval: most of its categories have one image"


@dataclass(frozen=True)
class Verdict:
    """One claim on one model's run.

    Args:
        claim: what the paper says.
        source: where it says so.
        rule: what is reproduced, in numbers.
        state: the mark.
        where: model, task and keep.
        measured: the numbers that decide, with their interval; why it was not run.
    """

    claim: str
    source: str
    rule: str
    state: State
    where: str
    measured: str


@dataclass(frozen=True)
class PaperClaim:
    """A claim and the rule by which it counts as reproduced."""

    text: str
    source: str
    rule: str

    def finding(self, state: State, where: str, measured: str) -> Verdict:
        """The claim on one run."""
        return Verdict(self.text, self.source, self.rule, state, where, measured)

    def above(self, least: float, difference: Interval | None, where: str, unit: str, what: str = "") -> Verdict:
        """Reproduced if the whole interval lies above `least`."""
        if difference is None:
            return self.finding(NOT_RUN, where, what or "runs are missing")
        state = REPRODUCED if difference.low > least else NOT_REPRODUCED
        undecided = "no difference" if difference.low == difference.high == least else ""
        undecided = UNDECIDED if difference.low <= least < difference.high else undecided
        return self.finding(state, where, joined(what, printed(difference, unit), undecided))

    def below(self, most: float, difference: Interval | None, where: str, unit: str, what: str = "") -> Verdict:
        """Reproduced if the whole interval lies below `most`."""
        if difference is None:
            return self.finding(NOT_RUN, where, what or "runs are missing")
        state = REPRODUCED if difference.high < most else NOT_REPRODUCED
        undecided = UNDECIDED if difference.low < most <= difference.high else ""
        return self.finding(state, where, joined(what, printed(difference, unit), undecided))


def printed(value: Interval, unit: str) -> str:
    """An interval in words."""
    digits = 4 if unit == "probability" else 1
    shown = (f"{number:+.{digits}f}" for number in (value.value, value.low, value.high))
    first, low, high = shown
    return f"{first} {unit} ({low} to {high})"


def joined(*parts: str) -> str:
    """The parts that are not empty, as one text."""
    return "; ".join(part for part in parts if part)
