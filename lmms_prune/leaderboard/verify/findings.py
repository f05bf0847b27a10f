"""What a check finds: that a record holds, contradicts itself, or cannot be verified."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

State = Literal["holds", "contradicted", "unverified"]
Item = TypeVar("Item")


class NotRecordedError(ValueError):
    """A check needs something that the record lacks; the message says what."""


@dataclass(frozen=True)
class Doubt:
    """A reason why a record does not simply hold.

    Args:
        reason: a short text.
        contradicted: whether the record contradicts itself; otherwise it only cannot be verified.
    """

    reason: str
    contradicted: bool


@dataclass(frozen=True)
class Finding:
    """The outcome of one check for one task of a row, or for the whole row.

    Args:
        check: the check's name.
        state: whether the record holds.
        task: the task; "" for the whole row.
        reason: why it does not hold, or cannot be verified; "" if it holds.
    """

    check: str
    state: State
    task: str = ""
    reason: str = ""


def findings(check: str, task: str, doubts: Iterable[Doubt]) -> list[Finding]:
    """Return one finding for each doubt, and one that says that the record holds if there is none."""
    doubtful = [
        Finding(check, "contradicted" if doubt.contradicted else "unverified", task, doubt.reason) for doubt in doubts
    ]
    return doubtful or [Finding(check, "holds", task)]


def doubts_of(items: Iterable[Item], name: Callable[[Item], str], contradiction: Callable[[Item], str]) -> list[Doubt]:
    """Examine items one by one; contradictions of several items are one doubt, and so are equal gaps in their records.

    Args:
        items: documents, or whatever is examined.
        name: names an item.
        contradiction: returns the contradiction in an item, "" if there is none; raises `NotRecordedError` if the record
            does not suffice.
    """
    wrong: list[str] = []
    gaps: dict[str, int] = {}
    total = 0
    for item in items:
        total += 1
        try:
            if reason := contradiction(item):
                wrong.append(f"{name(item)}: {reason}" if not wrong else "")
        except NotRecordedError as error:
            gaps[str(error)] = gaps.get(str(error), 0) + 1
    doubts = [Doubt(f"{gap} ({count} of {total})", contradicted=False) for gap, count in gaps.items()]
    if wrong:
        others = f", and {len(wrong) - 1} more documents" if len(wrong) > 1 else ""
        doubts.insert(0, Doubt(wrong[0] + others, contradicted=True))
    return doubts


def close(recorded: float | int, derived: float | int, tolerance: float = 1e-9) -> bool:
    """Tell whether two numbers are equal except for rounding."""
    return abs(recorded - derived) <= tolerance * max(1.0, abs(recorded), abs(derived))
