"""An evaluation of two documents by a real process of lmms-eval, with the demo's LLaVA under a hybrid schedule."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from lmms_prune.certificate.libraries import printed
from lmms_prune.harness.failures import Failure
from lmms_prune.harness.installation import InstallationCheck, fixing_command, reinstall
from lmms_prune.record.run import RunReport
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.console import SECRETS

_WHAT = "evaluation of two documents"
_TASK = "lmms_prune_two_documents"
_SCHEDULE = Schedule.parse("dart@1:0.44,random@8:0.1")


def two_documents() -> list[InstallationCheck]:
    """Check that lmms-eval evaluates a model and that as many visual tokens are kept as the schedule says.

    Returns:
        the library checks made inside its process, if it got that far, then the evaluation's own check.
    """
    try:
        from lmms_prune.demo.models import MODELS, DemoError, model_arguments, sizes, weights
        from lmms_prune.demo.processes import DemoRun, RunError, evaluate
    except ImportError as error:
        return [
            InstallationCheck(_WHAT, "failed", f"cannot be started: {error}", fixing_command(str(error), "lmms-prune"))
        ]
    start = time.monotonic()
    with TemporaryDirectory() as folder:
        try:
            options = {
                "model": MODELS[0].family.model_name,
                "model_args": f"schedule={_SCHEDULE},{model_arguments(MODELS[0], weights(MODELS[0]))}",
                "tasks": _TASK,
                "include_path": str(Path(__file__).with_name("task")),
            }
            run = DemoRun(options, Path(folder) / "results")
            [outcome] = evaluate([run], Path(folder), Path(folder), None, SECRETS.get(), lambda done: None)
        except DemoError as error:
            return [InstallationCheck(_WHAT, "failed", str(error), reinstall("lmms-prune"))]
        except FileNotFoundError as error:
            return [
                InstallationCheck(
                    _WHAT, "failed", f"lmms-eval itself cannot be started: {error}", reinstall("lmms-eval")
                )
            ]
        except RunError as error:
            outcome = error
        examined = printed(run.log.read_text(encoding="utf-8", errors="replace"))
    if isinstance(outcome, RunError):
        return [*examined, refused(outcome.failure)]
    model = sizes()
    assert model.tokens_per_image is not None
    planned = float(_SCHEDULE.avg_visual_tokens(model.layers, [model.tokens_per_image]))
    return [*examined, judged(outcome, planned, time.monotonic() - start)]


def not_tried(unsupported: Sequence[InstallationCheck]) -> InstallationCheck:
    """Return the failed check for unsupported versions, with which every model is refused."""
    reasons = [f"{check.what} {check.detail}: {check.fix}" for check in unsupported]
    return InstallationCheck(_WHAT, "failed", "\n".join(["is not tried, as every model is refused.", *reasons]))


def refused(failure: Failure) -> InstallationCheck:
    """Return the failed check of a run without results: our own message names the fix, else lmms-eval is at fault."""
    if failure.ours:
        return InstallationCheck(_WHAT, "failed", failure.reason)
    reason = failure.reason or "it printed nothing"
    return InstallationCheck(_WHAT, "failed", f"lmms-eval itself fails: {reason}", fixing_command(reason, "lmms-eval"))


def judged(results: Mapping[str, Any], planned: float, seconds: float) -> InstallationCheck:
    """Check lmms-eval's results.

    Args:
        results: as in its file.
        planned: visual tokens a layer, the average that the schedule says.
        seconds: that it took.
    """
    answered = round(results["results"][_TASK]["answered,none"] * results["n-samples"][_TASK]["effective"])
    report = RunReport.of_results(results)
    averages = None if report is None else report.averages
    if averages is None:
        return InstallationCheck(_WHAT, "failed", "its results hold no averages of ours", reinstall("lmms-prune"))
    kept = averages.avg_visual_tokens
    detail = f"{answered} answered in {seconds:.0f} seconds, with {kept:.2f} visual tokens a layer"
    if answered != 2 or abs(kept - planned) > 1e-6:
        wrong = f"{detail}; 2 and {planned:.2f} were to be expected"
        return InstallationCheck(_WHAT, "failed", wrong, reinstall("lmms-prune"))
    return InstallationCheck(_WHAT, "ok", detail)
