"""How a claim gets its mark: by an interval, with the undecided named."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lmms_prune.leaderboard.interval import Interval
from lmms_prune.leaderboard.samples import Samples, Stamp
from lmms_prune.reproduce import claims, information_claims, layer_claims, table_claims
from lmms_prune.reproduce.chain import ChainOptions, plan_model
from lmms_prune.reproduce.evidence import Evidence, single_stages
from lmms_prune.reproduce.items import ITEMS, Item
from lmms_prune.reproduce.marks import TOO_FEW, PaperClaim, Verdict
from lmms_prune.reproduce.models import studied_models

CLAIM = PaperClaim("It rains.", "abstract", "Above 0.")


def between(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, float(low), float(high), 0.5, 1.0)


@pytest.mark.parametrize(
    ("interval", "state", "words"),
    [
        (between(0.5, 2), "reproduced", "+1.2 points (+0.5 to +2.0)"),
        (between(-3, -1), "not reproduced", "-2.0 points (-3.0 to -1.0)"),
        (between(-1, 2), "not reproduced", "undecided: the interval is too wide"),
        (between(0, 0), "not reproduced", "no difference"),
        (None, "not run", "runs are missing"),
    ],
)
def test_above(interval: Interval | None, state: str, words: str) -> None:
    finding = CLAIM.above(0.0, interval, "here", "points")
    assert (finding.state, finding.where, finding.rule) == (state, "here", "Above 0.")
    assert words in finding.measured
    assert ("undecided" in finding.measured) == ("undecided" in words)


@pytest.mark.parametrize(
    ("interval", "state", "undecided"),
    [
        (between(-3, 1), "reproduced", False),
        (between(-3, 2), "not reproduced", True),
        (between(2, 3), "not reproduced", False),
        (None, "not run", False),
    ],
)
def test_below(interval: Interval | None, state: str, undecided: bool) -> None:
    finding = CLAIM.below(2.0, interval, "here", "points")
    assert finding.state == state
    assert ("undecided" in finding.measured) == undecided


def samples(right: np.ndarray) -> Samples:
    """One document each."""
    count = len(right)
    empty = np.arange(count)
    stamp = Stamp(0, 0, 0, 0)
    ones = np.ones(count)
    score = 100 * float(np.mean(right))
    args = ("same", 100.0 * right, ones, np.zeros(count, int), right > 0.5, empty, empty, empty, empty)
    return Samples(*args, score, count, 0, None, {}, stamp)


def evidence(tmp_path: Path, item: Item) -> Evidence:
    """Of the demo's first model that makes an item, with nothing there."""
    model = next(model for model in studied_models("demo", "") if model.makes(item))
    return Evidence(plan_model(model, tmp_path, ChainOptions((item,), limit=40)), tmp_path / "steps")


def layered(method_scores: dict[str, list[float]], keep: str, count: int = 400) -> dict[str, Samples]:
    """Scores of single stages by layer: the first share of the documents is right."""
    scores = {"none": samples(np.ones(count))}
    for method, shares in method_scores.items():
        for layer, share in enumerate(shares):
            right = (np.arange(count) < share * count).astype(float)
            options = ";of=/measured" if method == "information" else ""
            scores[f"{method}@{layer}:{keep}{options}"] = samples(right)
    return scores


def by_claim(findings: list[Verdict]) -> dict[str, list[str]]:
    states: dict[str, list[str]] = {}
    for finding in findings:
        states.setdefault(finding.claim, []).append(finding.state)
    return states


EARLY, LATE = [0.9] * 8, [0.9] * 4


@pytest.mark.parametrize(
    ("random", "divprune", "deep", "shallow"),
    [
        ([0.5] * 8 + [0.9] * 4, EARLY + LATE, "reproduced", "reproduced"),
        ([0.5] * 12, EARLY + LATE, "not reproduced", "reproduced"),
        (EARLY + LATE, EARLY + LATE, "reproduced", "not reproduced"),
        (EARLY + LATE, [0.5] * 12, "reproduced", "not reproduced"),
    ],
    ids=["as the paper", "better to the end", "equal throughout", "worse throughout"],
)
def test_methods_against_random(
    tmp_path: Path, random: list[float], divprune: list[float], deep: str, shallow: str
) -> None:
    item = ITEMS["fig1"]
    own = evidence(tmp_path, item)
    keeps = own.plan.item_keeps(item)
    own.__dict__["layers"] = {
        "textvqa_val": {
            k: v for keep in keeps for k, v in layered({"random": random, "divprune": divprune}, keep).items()
        }
    }
    states = by_claim(list(layer_claims.method_findings(item, own)))
    assert states[layer_claims._NO_BETTER.text] == [deep] * len(keeps)
    assert states[layer_claims._BETTER_EARLY.text] == [shallow] * len(keeps)


def test_options_tell_methods_apart_and_leftovers_are_passed_over(tmp_path: Path) -> None:
    """Another order of DART, another keep and a method that was not asked for may lie in the same folder."""
    item, keep = ITEMS["fig1"], "0.25"
    (model, *_) = studied_models("demo", "")
    options = ChainOptions((item,), limit=40, methods="dart,dart;order=reference", keeps=keep)
    own = Evidence(plan_model(model, tmp_path, options), tmp_path / "steps")
    scores = layered({"random": [0.5] * 12, "dart": [0.4] * 12, "fastv": [0.9] * 12}, keep)
    scores = {text: run for text, run in scores.items() if not text.startswith(("dart@0:", "fastv@0:"))}
    scores |= {f"dart@{n}:{keep};order=reference": samples(np.ones(400)) for n in range(1, 12)}
    scores |= {f"dart@{n}:0.5": samples(np.ones(400)) for n in range(1, 12)}
    by_method = single_stages(scores, keep, own.plan.methods)
    assert {name: sorted(by_layer) for name, by_layer in by_method.items()} == {
        "random": [*range(12)],
        "dart": [*range(1, 12)],
        "dart;order=reference": [*range(1, 12)],
    }
    assert {run.score for run in by_method["dart"].values()} == {40.0}
    assert {run.score for run in by_method["dart;order=reference"].values()} == {100.0}
    own.__dict__["layers"] = {"textvqa_val": scores}
    (deep, shallow) = layer_claims.method_findings(item, own)
    assert (deep.state, shallow.state) == ("not reproduced", "reproduced")
    assert deep.measured.startswith("highest: dart;order=reference; +50.0 %")


def test_a_missing_layer_leaves_a_claim_open(tmp_path: Path) -> None:
    item = ITEMS["fig1"]
    own = evidence(tmp_path, item)
    (keep, *_) = own.plan.item_keeps(item)
    scores = layered({"random": [0.9] * 12, "divprune": [0.9] * 12}, keep)
    del scores[f"divprune@10:{keep}"]
    own.__dict__["layers"] = {"textvqa_val": scores}
    first = next(
        finding for finding in layer_claims.method_findings(item, own) if finding.claim == layer_claims._NO_BETTER.text
    )
    assert (first.state, first.measured) == ("not run", "runs are missing")


def test_categories_of_one_image_have_no_interval(tmp_path: Path) -> None:
    """Resampling within them always gives the same score, which would decide everything."""
    item = ITEMS["fig1"]
    own = evidence(tmp_path, item)
    (keep, *_) = own.plan.item_keeps(item)
    scores = layered({"random": [0.5] * 12, "divprune": [0.9] * 12}, keep, count=10)
    single = {text: replace(run, stratum=np.arange(10)) for text, run in scores.items()}
    own.__dict__["layers"] = {"textvqa_val": single}
    findings = [f for f in layer_claims.method_findings(item, own) if f", {keep} kept" in f.where]
    assert {(f.state, f.measured) for f in findings} == {("not run", TOO_FEW)}
    pairs = {text: replace(run, stratum=np.arange(10) // 2) for text, run in scores.items()}
    own.__dict__["layers"] = {"textvqa_val": pairs}
    assert "not run" not in {f.state for f in layer_claims.method_findings(item, own) if f", {keep} kept" in f.where}


def test_nothing_there_is_not_run(tmp_path: Path) -> None:
    for item in ITEMS.values():
        own = evidence(tmp_path, item)
        findings = list(
            table_claims.cost_findings(own, {}) if item.kind == "costs" else claims.BY_KIND[item.kind](item, own)
        )
        assert findings
        assert {finding.state for finding in findings} == {"not run"}


def test_oracle(tmp_path: Path) -> None:
    item = ITEMS["fig6"]
    own = evidence(tmp_path, item)
    keeps = own.plan.item_keeps(item)
    tables = {"information": EARLY + LATE, "random": [0.5] * 8 + [0.9] * 4}
    own.__dict__["oracle"] = {"textvqa_val": {k: v for keep in keeps for k, v in layered(tables, keep).items()}}
    findings = list(layer_claims.oracle_findings(item, own))
    assert {f.state for f in findings if "TextVQA" in f.where} == {"reproduced"}
    assert {f.state for f in findings if "MME" in f.where} == {"not run"}


def test_horizons_of_reading_against_general_tasks(tmp_path: Path) -> None:
    item = ITEMS["fig9"]
    own = evidence(tmp_path, item)

    def removed(horizon: int) -> dict[str, Samples]:
        scores = {"none": samples(np.ones(50))}
        scores |= {f"vtw@{layer}": samples(np.full(50, float(layer >= horizon))) for layer in range(12)}
        return scores

    tasks = own.plan.item_tasks(item)
    own.__dict__["layers"] = {task: removed(4 if i < 3 else 9) for i, task in enumerate(tasks)}
    (finding,) = information_claims.horizon_findings(item, own)
    assert finding.state == "reproduced"
    assert finding.measured.startswith("9.0 against 4.0; +5.0 layers (+5.0 to +5.0)")
    own.__dict__["layers"] = {task: removed(9 if i < 3 else 4) for i, task in enumerate(tasks)}
    assert next(information_claims.horizon_findings(item, own)).state == "not reproduced"
    del own.__dict__["layers"][tasks[0]]
    assert next(information_claims.horizon_findings(item, own)).measured == "horizons of 5 of 6 benchmarks are known"
    assert (
        "do not differ in capacity"
        in information_claims.stronger_finding(item, [own, evidence_of_other(tmp_path, item)]).measured
    )


def test_horizons_without_an_interval_decide_nothing(tmp_path: Path) -> None:
    """If no general benchmark has an interval, the difference of the groups has none either."""
    item = ITEMS["fig9"]
    (model, *_) = studied_models("demo", "")
    options = ChainOptions((item,), limit=40, quick=True)
    own = Evidence(plan_model(model, tmp_path, options), tmp_path / "steps")

    def removed(horizon: int, stratum: np.ndarray) -> dict[str, Samples]:
        scores = {"none": np.ones(50)} | {f"vtw@{n}": np.full(50, float(n >= horizon)) for n in range(12)}
        return {text: replace(samples(right), stratum=stratum) for text, right in scores.items()}

    own.__dict__["layers"] = {"mme": removed(4, np.arange(50)), "textvqa_val": removed(9, np.zeros(50, int))}
    (finding,) = information_claims.horizon_findings(item, own)
    assert (finding.state, finding.measured) == ("not run", TOO_FEW)


def evidence_of_other(tmp_path: Path, item: Item) -> Evidence:
    model = studied_models("demo", "")[1]
    return Evidence(plan_model(model, tmp_path, ChainOptions((item,), limit=40)), tmp_path / "steps")


def test_the_horizon_must_lie_before_the_end(tmp_path: Path) -> None:
    item = ITEMS["fig8"]
    own = evidence(tmp_path, item)
    scores = {"none": samples(np.ones(50))}
    vanishes = {**scores, **{f"vtw@{n}": samples(np.full(50, float(n >= 7))) for n in range(12)}}
    never = {**scores, **{f"vtw@{n}": samples(np.zeros(50)) for n in range(12)}}
    own.__dict__["layers"] = {"mme": vanishes, "pope": never}
    states = {
        finding.where.rpartition(" ")[2]: (finding.state, finding.measured)
        for finding in information_claims.vanishing_findings(item, own)
    }
    assert states["MME"] == ("reproduced", "layer 7 of 12 (7 to 7)")
    assert states["POPE"] == ("not reproduced", "layer 12 of 12 (12 to 12)")
    assert states["SQA"][0] == "not run"


def kept_lines(task: str, keep: str, early: float, late: float) -> pd.DataFrame:
    """Kept information of DART and of as many average tokens, on ten documents; it is DART's advantage that differs."""
    lines = []
    for sample in range(10):
        for layer in range(12):
            advantage = early if layer < 4 else late
            for method, value in (("mean", 0.0), ("most", 9.0), ("dart", 14 * advantage)):
                line = {"sample": f"{task}/test/{sample}", "task": task, "layer": layer, "keep": keep}
                lines.append({**line, "method": method, "kept": 14, "information": value})
    return pd.DataFrame(lines)


@pytest.mark.parametrize(
    ("early", "late", "deep", "shallow"),
    [(0.05, 0.0, "reproduced", "reproduced"), (0.0, 0.05, "not reproduced", "not reproduced")],
)
def test_kept_information(tmp_path: Path, early: float, late: float, deep: str, shallow: str) -> None:
    item = ITEMS["fig5"]
    own = evidence(tmp_path, item)
    keep = own.plan.item_keeps(item)[0]
    own.__dict__["kept"] = kept_lines("mme", keep, early, late)
    states = by_claim([f for f in information_claims.kept_findings(item, own) if f", {keep} kept" in f.where])
    assert states == {information_claims._KEEPS_NO_MORE.text: [deep], information_claims._KEEPS_MORE.text: [shallow]}


def test_random_is_no_method_that_keeps_more_than_random(tmp_path: Path) -> None:
    """Its draws may keep more by chance; the claims are about the other methods."""
    item = ITEMS["fig5"]
    own = evidence(tmp_path, item)
    keep = own.plan.item_keeps(item)[0]
    lucky = kept_lines("mme", keep, 0.05, 0.05)
    lucky = lucky[lucky.method == "dart"].assign(method="random")
    own.__dict__["kept"] = pd.concat([kept_lines("mme", keep, 0.0, 0.0), lucky])
    findings = [f for f in information_claims.kept_findings(item, own) if f", {keep} kept" in f.where]
    assert [finding.state for finding in findings] == ["reproduced", "not reproduced"]
    assert all("highest: dart" in finding.measured for finding in findings)


@pytest.mark.parametrize(
    ("late", "state"), [(0.1, "reproduced"), (0.9, "not reproduced"), ("around a half", "undecided")]
)
def test_variance(tmp_path: Path, late: float | str, state: str) -> None:
    item = ITEMS["fig7"]
    own = evidence(tmp_path, item)
    lines = [
        {
            "task": "mme",
            "sample": f"mme/test/{n}",
            "layer": layer,
            "variance": (1.0 if layer < 8 else late if isinstance(late, float) else float(n % 2)) * (1 + n / 10),
        }
        for n in range(10)
        for layer in range(12)
    ]
    own.__dict__["information"] = pd.DataFrame(lines)
    first, second = information_claims.variance_findings(item, own)
    assert (first.state, second.state) == (state.replace("undecided", "not reproduced"), "not run")
    assert ("undecided" in first.measured) == (state == "undecided")


def test_costs_by_arithmetic(tmp_path: Path) -> None:
    own = evidence(tmp_path, ITEMS["table3"])
    exact = {cost.printed.label: {"tflops": cost.printed.tflops, "kv_mib": cost.printed.mib} for cost in own.plan.costs}
    exact["FastV 64"] = {"tflops": 2.604, "kv_mib": 98.9}
    states = {
        f.where: f.state for f in table_claims.cost_findings(own, exact) if f.claim == table_claims._ARITHMETIC.text
    }
    assert len(states) == 9
    assert [where for where, state in states.items() if state != "reproduced"] == ["LLaVA-1.5-7B, FastV 64"]


def test_over_documents() -> None:
    same = information_claims.over_documents(np.full(5, 0.25))
    assert (same.value, same.low, same.high) == (0.25, 0.25, 0.25)
    wide = information_claims.over_documents(np.array([0.0, 1.0] * 50))
    assert wide.low < 0.5 < wide.high
    assert math.isclose(wide.high - wide.low, 0.2, rel_tol=0.2)
