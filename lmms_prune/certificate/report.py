"""A certificate as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from lmms_prune.certificate.runner import Certificate

_SHOWN, _NAMED = 20, 6  # failures printed in full; methods named in one line


def described(certificate: Certificate) -> dict[str, Any]:
    """Return the whole certificate as JSON values, for ``--json``."""
    return {
        "title": certificate.title,
        "cells": sum(certificate.cells.values()),
        "checks": sum(sum(passed.values()) for passed in certificate.passed.values()) + len(certificate.failures),
        "failures": [
            {
                "cell": str(failure.cell),
                "schedule": failure.schedule,
                "check": failure.check,
                "reason": failure.reason,
            }
            for failure in certificate.failures
        ],
        "methods": {
            method: {"cells": count, "passed": certificate.passed[method]}
            for method, count in certificate.cells.items()
        },
        "not_run": [
            {"method": method, "reason": reason, "cells": count}
            for (method, reason), count in certificate.skipped.items()
        ],
        "not_checked": [
            {"check": check, "reason": reason, "cells": count}
            for (check, reason), count in certificate.unchecked.items()
        ],
        "noted": [
            {"check": check, "dtype": dtype, "note": note, "cells": count}
            for (check, dtype, note), count in certificate.notes.items()
        ],
        "largest_deviations": [
            {"check": check, "dtype": dtype, "deviation": worst}
            for (check, dtype), worst in certificate.deviations.items()
        ],
        "limits": [
            {"family": family, "dtype": dtype, "attention": attention, "limit": limit}
            for (family, dtype, attention), limit in certificate.limits.items()
        ],
        "not_certified": list(certificate.outside),
        "seconds": round(certificate.seconds, 1),
    }


def tables(certificate: Certificate) -> Iterator[Table | str]:
    """Yield the certificate as tables and lines: by check, by method, what is not covered, failures and the verdict."""
    yield _by_check(certificate)
    yield _by_method(certificate)
    yield from _left_out(certificate)
    total, failed = sum(certificate.cells.values()), len({failure.cell for failure in certificate.failures})
    for failure in certificate.failures[:_SHOWN]:
        yield (f"[red]failed[/red] {failure.check}: {escape(failure.reason)}\n    {failure.schedule}  ({failure.cell})")
    if len(certificate.failures) > _SHOWN:
        yield f"… and {len(certificate.failures) - _SHOWN} more; --json lists all."
    if not total:
        yield "[red]not certified[/red]: none of the cells can be run."
        return
    verdict = "[red]not certified[/red]" if failed else "[green]certified[/green]"
    yield f"{verdict}: {total} cells, {failed} of them with failures, in {certificate.seconds:.0f} s."


def _by_check(certificate: Certificate) -> Table:
    dtypes = sorted({dtype for _, dtype in certificate.deviations})
    table = Table("check", "passed", "failed", *(f"largest, {dtype}" for dtype in dtypes), box=box.SIMPLE)
    table.title = escape(certificate.title)
    names = list(dict.fromkeys(check for passed in certificate.passed.values() for check in passed))
    for check in list(dict.fromkeys([*names, *(failure.check for failure in certificate.failures)])):
        passed = sum(counts.get(check, 0) for counts in certificate.passed.values())
        failed = sum(failure.check == check for failure in certificate.failures)
        worst = [certificate.deviations.get((check, dtype)) for dtype in dtypes]
        table.add_row(check, str(passed), str(failed), *("" if x is None else f"{x:.1e}" for x in worst))
    return table


def _by_method(certificate: Certificate) -> Table:
    table = Table("method", "cells", "failed", "not run", box=box.SIMPLE)
    for method in list(dict.fromkeys([*certificate.cells, *(name for name, _ in certificate.skipped)])):
        failed = len({failure.cell for failure in certificate.failures if failure.cell.method == method})
        skipped = sum(count for (name, _), count in certificate.skipped.items() if name == method)
        table.add_row(method, *(str(number) for number in (certificate.cells.get(method, 0), failed, skipped)))
    return table


def _left_out(certificate: Certificate) -> Iterator[str]:
    limits: dict[str, float] = {}
    for (_, dtype, _), limit in certificate.limits.items():
        limits[dtype] = max(limits.get(dtype, 0.0), limit)
    limits_text = ", ".join(f"{limit:.1e} in {dtype}" for dtype, limit in sorted(limits.items()))
    yield f"Allowed deviation of logits, relative to their norm (4 × rounding of the unpruned model): {limits_text}."
    for reason in dict.fromkeys(reason for _, reason in certificate.skipped):
        counts = {method: count for (method, why), count in certificate.skipped.items() if why == reason}
        names = ", ".join(counts) if len(counts) <= _NAMED else f"{len(counts)} methods"
        yield f"Not run: {sum(counts.values())} cells: {reason} ({names})."
    for (check, reason), count in certificate.unchecked.items():
        yield f"Not checked: {check} in {count} cells ({reason})."
    for (check, dtype, note), count in certificate.notes.items():
        yield f"Noted: {check} in {count} cells in {dtype}: {note}."
    for outside in certificate.outside:
        yield f"Not certified: {outside}."
