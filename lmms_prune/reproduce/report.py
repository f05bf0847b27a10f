"""The report: every item with its table or figure, its claims and their marks, as one self-contained page."""

from __future__ import annotations

from base64 import b64encode
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from lmms_prune import __version__
from lmms_prune.leaderboard import page as leaderboard_page
from lmms_prune.record.files import write
from lmms_prune.record.redaction import redacted
from lmms_prune.reproduce.chain import ModelPlan, Step
from lmms_prune.reproduce.claims import BY_KIND
from lmms_prune.reproduce.evidence import Evidence
from lmms_prune.reproduce.figures import ReportPicture, pictures
from lmms_prune.reproduce.information_claims import stronger_finding
from lmms_prune.reproduce.items import Item
from lmms_prune.reproduce.marks import NOT_REPRODUCED, NOT_RUN, REPRODUCED, Verdict
from lmms_prune.reproduce.runner import StepRecord, Surroundings, is_finished, read_record
from lmms_prune.reproduce.table_claims import cost_findings
from lmms_prune.reproduce.tables import ReportTable, cost_table, score_table

_FOLDER = Path(__file__).parent
_SHARED = Path(leaderboard_page.__file__).parent
_STYLES = (_SHARED / "page.css", _SHARED / "document.css", _FOLDER / "page.css")
_STATES = (REPRODUCED, NOT_REPRODUCED, NOT_RUN)


@dataclass
class ItemReport:
    """One item as the page shows it.

    Args:
        item: the item.
        findings: its claims on every model.
        tables, figures: what it shows.
        unfinished: steps of it that are not finished, with the reason.
    """

    item: Item
    findings: list[Verdict] = field(default_factory=list)
    tables: list[ReportTable] = field(default_factory=list)
    figures: list[ReportPicture] = field(default_factory=list)
    unfinished: dict[str, str] = field(default_factory=dict)

    @property
    def missing(self) -> dict[str, list[str]]:
        """Unfinished steps by reason."""
        return by_reason(self.unfinished)

    @property
    def counts(self) -> dict[str, int]:
        """Claims by mark."""
        counted = Counter(finding.state for finding in self.findings)
        return {state: counted[state] for state in _STATES if counted[state]}

    @property
    def claims(self) -> dict[tuple[str, str, str], list[Verdict]]:
        """Findings by claim, source and rule."""
        grouped: dict[tuple[str, str, str], list[Verdict]] = {}
        for finding in self.findings:
            grouped.setdefault((finding.claim, finding.source, finding.rule), []).append(finding)
        return grouped


def make_report(
    items: Sequence[Item], plans: Sequence[ModelPlan], steps: Sequence[Step], around: Surroundings, path: Path
) -> tuple[dict[str, int], list[str]]:
    """Write the page of what is there.

    Args:
        items: the items, in the page's order.
        plans: the models' plans.
        steps: all steps.
        around: where they run.
        path: the page's file.

    Returns:
        the claims by mark, and the names of unfinished steps.

    Raises:
        WriteError: the page cannot be written.
    """
    studied = [Evidence(plan, around.out / "steps") for plan in plans]
    unfinished = {step.name: _reason(step, around) for step in steps if not is_finished(step, around)}
    reports = [_item_report(item, studied, steps, unfinished, around) for item in items]
    problems = list(dict.fromkeys(problem for evidence in studied for problem in evidence.problems))
    text = html(reports, plans, steps, unfinished, problems, around)
    write(path, redacted(text, around.secrets))
    counted = Counter(finding.state for report in reports for finding in report.findings)
    return {state: counted[state] for state in _STATES}, list(unfinished)


def _reason(step: Step, around: Surroundings) -> str:
    """Why a step counts as unfinished."""
    record = read_record(around.step_folder(step))
    if record.state == "done":
        return "it was finished by another version or with other options"
    pieces = step.finished_pieces()
    there = f"{min(pieces, step.pieces)} of {step.pieces} runs are there" if pieces and step.pieces > 1 else ""
    return "; ".join(part for part in (record.state, record.reason, there) if part)


def _item_report(
    item: Item, studied: Sequence[Evidence], steps: Sequence[Step], unfinished: Mapping[str, str], around: Surroundings
) -> ItemReport:
    report = ItemReport(item)
    report.unfinished = {
        step.name: unfinished[step.name] for step in steps if item.name in step.items and step.name in unfinished
    }
    arithmetic = _arithmetic(studied, steps) if item.kind == "costs" else {}
    own = [evidence for evidence in studied if evidence.plan.model.makes(item)]
    for evidence in own:
        if item.kind == "costs":
            report.tables.append(cost_table(evidence, arithmetic))
            report.findings += cost_findings(evidence, arithmetic)
            continue
        if item.kind == "scores":
            report.tables.append(score_table(evidence))
        report.findings += BY_KIND[item.kind](item, evidence)
        report.figures += pictures(item, evidence)
    if item.kind == "horizons":
        report.findings.append(stronger_finding(item, own))
    return report


def _arithmetic(studied: Sequence[Evidence], steps: Sequence[Step]) -> dict[str, Mapping[str, float]]:
    """What ``lmms-prune schedule`` has printed for the rows of Table 3, by label."""
    printed = {cost.printed.label: cost.printed for evidence in studied for cost in evidence.plan.costs}
    outputs: dict[str, Mapping[str, float]] = {}
    for label in printed:
        output = studied[0].output(f"schedule-{label.replace(' ', '-')}")
        if output is not None:
            outputs[label] = output
    return outputs


def html(
    reports: Sequence[ItemReport],
    plans: Sequence[ModelPlan],
    steps: Sequence[Step],
    unfinished: Mapping[str, str],
    problems: Sequence[str],
    around: Surroundings,
) -> str:
    """Render the page."""
    style = "\n".join(path.read_text(encoding="utf-8") for path in _STYLES)
    environment = Environment(loader=FileSystemLoader(_FOLDER), autoescape=True, undefined=StrictUndefined)
    environment.filters["picture"] = _data_url
    records = {step.name: read_record(around.step_folder(step)) for step in steps}
    digest = b64encode(sha256(style.encode()).digest()).decode("ascii")
    return environment.get_template("page.html").render(
        reports=reports,
        models=[_about(plan) for plan in plans],
        demo=plans[0].model.demo,
        quick=plans[0].options.quick,
        limit=plans[0].options.limit,
        steps=[(step, records[step.name], _shown(step, around)) for step in steps],
        unfinished=by_reason(unfinished),
        problems=[_without_folders(problem, around) for problem in problems],
        states=_STATES,
        facts=_facts(records.values()),
        style=style,
        style_hash=f"sha256-{digest}",
    )


def by_reason(unfinished: Mapping[str, str]) -> dict[str, list[str]]:
    """Names of steps by the reason why they are not finished."""
    names: dict[str, list[str]] = {}
    for name, reason in unfinished.items():
        names.setdefault(reason, []).append(name)
    return names


def _about(plan: ModelPlan) -> dict[str, Any]:
    model = plan.model
    return {
        "name": model.name,
        "table": model.table.title,
        "layers": model.sizes.layers,
        "paper_layers": model.reference.layers,
        "scaled": model.scaled,
        "shallow": model.shallow,
        "deep": model.deep,
    }


def _facts(records: Any) -> dict[str, str]:
    """Versions, code and dates of the finished steps."""
    finished: list[StepRecord] = [record for record in records if record.state == "done"]
    facts = {name: value for record in finished for name, value in record.made_from.items()}
    dates = sorted(record.date[:10] for record in finished if record.date)
    own = {"lmms-prune": __version__, **facts}
    return own | ({"date": dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"} if dates else {})


def _shown(step: Step, around: Surroundings) -> str:
    """A step's command, without the folders of this machine."""
    return redacted(_without_folders(step.command, around), around.secrets)


def _without_folders(text: str, around: Surroundings) -> str:
    """A text in which the run's folder is OUT, and this package's is left out."""
    text = text.replace(str(around.out), "OUT").replace(f"{Path(__file__).parents[2]}/", "")
    return text.replace(str(Path.home()), "~")


def _data_url(picture: ReportPicture) -> str:
    return f"data:image/{picture.kind};base64,{b64encode(picture.data).decode('ascii')}"
