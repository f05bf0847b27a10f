"""A verification as text and as JSON: what holds, what is contradicted, what cannot be verified, and what no check can."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from lmms_prune.leaderboard.sharing import PathNames
from lmms_prune.leaderboard.verify.checks import CHECKS
from lmms_prune.leaderboard.verify.findings import Finding
from lmms_prune.leaderboard.verify.verdicts import Verification, VerifiedRun, name_of_run, sentence


def as_json(verified: Verification, names: PathNames) -> dict[str, Any]:
    """Return a verification as JSON values; paths are replaced as on a leaderboard."""
    return names.shared(
        {
            "passed": verified.passed,
            "rows": [_row(run) for run in verified.runs],
            "problems": [{"path": problem.path, "message": problem.message} for problem in verified.problems],
            "checks": [{"name": check.name, "proves": check.proves, "cannot": check.cannot} for check in CHECKS],
        }
    )


def _row(run: VerifiedRun) -> dict[str, Any]:
    return {
        "model": run.run.model,
        "schedule": run.run.schedule or run.run.wrapper,
        "seed": run.run.seed,
        "submitted": run.submitter,
        "results": name_of_run(run.run),
        "contradicted": [asdict(finding) for finding in run.contradicted],
        "unverified": [asdict(finding) for finding in run.unverified],
        "holds": sum(finding.state == "holds" for finding in run.findings),
    }


def as_text(verified: Verification, names: PathNames) -> str:
    """Return a verification as lines for a terminal."""
    lines = list(names.shared(list(_lines(verified))))
    return "\n".join(lines) + "\n"


def _lines(verified: Verification) -> Iterator[str]:
    for run in verified.runs:
        states = [finding.state for finding in run.findings]
        verdict = "REFUSED" if run.contradicted else "verified"
        counts = ", ".join(f"{states.count(state)} {state}" for state in ("holds", "contradicted", "unverified"))
        submitted = f" ({run.submitter})" if run.submitter else ""
        yield f"{verdict}: {run.run.model}, {run.run.schedule or run.run.wrapper}, seed {run.run.seed}{submitted}: {counts}"
        yield f"    {name_of_run(run.run)}"
        yield from (f"    CONTRADICTED {text}" for text in _merged(run.contradicted))
        yield from (f"    unverified {text}" for text in _merged(run.unverified))
    yield ""
    yield "What no check can verify:"
    yield from (f"    {check.name}: {check.cannot}" for check in CHECKS)


def _merged(findings: list[Finding]) -> list[str]:
    return list(dict.fromkeys(map(sentence, findings)))
