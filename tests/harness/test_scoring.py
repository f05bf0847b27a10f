"""Answers scored again with the scorers of lmms-eval's tasks, from what samples files have."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from lmms_prune.harness.scoring import TaskScorer, UnscorableError

PLAIN = {"task": "x", "output_type": "generate_until", "doc_to_target": "answer", "dataset_path": "x"}
EXACT = [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True, "ignore_case": True}]
ANLS = [{"metric": "anls", "aggregation": "mean", "higher_is_better": True}]

OWN_SCORERS = """
def by_target(doc, results):
    return {"acc": float(doc["answer"] in results[0])}

def by_more(doc, results):
    return {"acc": float(doc.get("more") == results[0])}

def by_field(doc, results):
    return {"acc": float("kind" in doc and doc["kind"] == results[0])}
"""


@pytest.fixture
def functions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of users' own scorers: one that scores here, and one that names a service."""
    (tmp_path / "own_scorers.py").write_text(OWN_SCORERS, encoding="utf-8")
    (tmp_path / "judged_scorers.py").write_text(f"# asks openai\n{OWN_SCORERS}", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield lambda name: import_module(name)
    for name in ("own_scorers", "judged_scorers"):
        sys.modules.pop(name, None)


def scored(config: dict[str, Any], logged: dict[str, Any], answer: str) -> dict[str, Any]:
    scorer = TaskScorer({**PLAIN, **config})
    return scorer.metrics(scorer.document(logged), answer)


def test_metrics_read_the_target_as_it_was() -> None:
    assert scored({"metric_list": EXACT}, {"target": "Yes"}, "yes") == {"exact_match": 1.0}
    assert scored({"metric_list": EXACT}, {"target": "Yes"}, "no") == {"exact_match": 0.0}
    listed = {"target": "['alpha', 'beta']"}
    assert scored({"metric_list": ANLS}, listed, "beta") == {"anls": 1.0}
    assert scored({"metric_list": ANLS}, listed, "wrong") == {"anls": 0.0}


def test_own_scorers_that_read_what_is_recorded_are_called(functions: Any) -> None:
    config = {"process_results": functions("own_scorers").by_target, "metric_list": []}
    assert scored(config, {"target": "a"}, "a b") == {"acc": 1.0}
    config["process_results"] = functions("own_scorers").by_field
    assert scored(config, {"target": "a", "acc": {"kind": "k", "score": 1.0}}, "k") == {"acc": 1.0}
    assert not TaskScorer({**PLAIN, **config}).decisive


@pytest.mark.parametrize(("name", "field"), [("by_more", "more"), ("by_field", "kind")])
def test_a_scorer_that_reads_more_is_named_with_the_field(name: str, field: str, functions: Any) -> None:
    config = {"process_results": getattr(functions("own_scorers"), name), "metric_list": []}
    with pytest.raises(UnscorableError, match=f"its scorer reads '{field}', which samples files do not have"):
        scored(config, {"target": "a"}, "a")


def test_a_scorer_that_may_ask_a_judge_is_never_called(functions: Any) -> None:
    config = {"process_results": functions("judged_scorers").by_target, "metric_list": []}
    with pytest.raises(UnscorableError, match="may ask a judge over the network"):
        TaskScorer({**PLAIN, **config})


def test_a_target_that_is_computed_and_another_output_are_refused() -> None:
    with pytest.raises(UnscorableError, match="its target is computed from the document"):
        scored({"metric_list": EXACT, "doc_to_target": "{{answer[0]}}"}, {"target": "a"}, "a")
    with pytest.raises(UnscorableError, match="not one of generated answers"):
        TaskScorer({**PLAIN, "output_type": "loglikelihood"})
