"""Running the cells and counting the results of their checks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lmms_prune.certificate.case import Case
from lmms_prune.certificate.cells import Cell, impossible, schedule
from lmms_prune.certificate.checks import CHECKS, TIMES, CheckFunction, Result
from lmms_prune.certificate.models import Models
from lmms_prune.certificate.prompts import BATCHES


@dataclass(frozen=True)
class CellFailure:
    """A check that a cell did not pass."""

    cell: Cell
    schedule: str
    check: str
    reason: str


@dataclass
class Certificate:
    """The counted results of all cells.

    Args:
        title: the model that is certified.
        outside: what the certificate does not cover, in words.
        cells: how many were run, by method.
        passed: how many checks were passed, by method and check.
        skipped: how many cells cannot be run, by method and reason.
        unchecked: how many checks do not apply, by check and reason.
        notes: how many checks noted something, by check, type and note.
        deviations: the largest one, by check and type.
        limits: of logits' deviations, by family, type and attention kernel.
        failures: all checks that were not passed.
        seconds: time that the cells took.
    """

    title: str = ""
    outside: Sequence[str] = ()
    cells: dict[str, int] = field(default_factory=dict)
    passed: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: dict[tuple[str, str], int] = field(default_factory=dict)
    unchecked: dict[tuple[str, str], int] = field(default_factory=dict)
    notes: dict[tuple[str, str, str], int] = field(default_factory=dict)
    deviations: dict[tuple[str, str], float] = field(default_factory=dict)
    limits: dict[tuple[str, str, str], float] = field(default_factory=dict)
    failures: list[CellFailure] = field(default_factory=list)
    seconds: float = 0.0

    def possible(self, cells: Iterable[Cell]) -> list[Cell]:
        """The cells that can be run; the others are counted with their reason."""
        kept = []
        for cell in cells:
            if reason := impossible(cell):
                self.skipped[cell.method, reason] = self.skipped.get((cell.method, reason), 0) + 1
            else:
                kept.append(cell)
        return kept

    def add(self, cell: Cell, dtype: str, text: str, results: Iterable[Result]) -> None:
        """Count a cell that was run."""
        self.cells[cell.method] = self.cells.get(cell.method, 0) + 1
        passed = self.passed.setdefault(cell.method, {})
        for result in results:
            check = result.check
            if result.skipped:
                self.unchecked[check, result.skipped] = self.unchecked.get((check, result.skipped), 0) + 1
                continue
            if result.note:
                self.notes[check, dtype, result.note] = self.notes.get((check, dtype, result.note), 0) + 1
            if result.deviation is not None:
                self.deviations[check, dtype] = max(self.deviations.get((check, dtype), 0.0), result.deviation)
            if result.reason:
                self.failures.append(CellFailure(cell, text, check, result.reason))
            else:
                passed[check] = passed.get(check, 0) + 1


def certify(
    cells: Sequence[Cell],
    models: Mapping[str, Models],
    certificate: Certificate,
    counted: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run `cells` and add their results to `certificate`.

    Args:
        cells: that can be run; neighbours that differ in the batch alone share their runs.
        models: for each family.
        certificate: the certificate to fill.
        counted: called with the number of cells that have run, and of all.
    """
    began = time.perf_counter()
    last, case = None, None
    for number, cell in enumerate(cells, 1):
        subject = models[cell.family].get(cell.dtype, cell.attention)
        shared = (cell.family, cell.dtype, cell.attention, cell.positions, cell.method, cell.stage_layer, cell.stages)
        if case is None or shared != last:
            last, case = shared, Case(subject, schedule(cell, subject.layers), cell.positions)
        certificate.limits[cell.family, subject.dtype, cell.attention] = TIMES * subject.noise
        certificate.add(cell, subject.dtype, str(case.schedule), examine(case, cell.batch))
        counted(number, len(cells))
    certificate.seconds += time.perf_counter() - began


def examine(case: Case, name: str, checks: Mapping[str, CheckFunction] = CHECKS) -> list[Result]:
    """The checks of one case with the batch `name`.

    What the product refuses or asserts, and what a library cannot run, is a failure of the check like any other.
    """
    results = []
    for check, look in checks.items():
        try:
            results.append(look(case, BATCHES[name], name))
        except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            message = str(error).strip().splitlines() or ["no message"]
            results.append(Result(check, f"{type(error).__name__}: {message[0]}"))
    return results
