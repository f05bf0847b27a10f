"""Columns of tasks that are none of the paper's ten benchmarks: known by name, or by their YAML alone."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner
from written import write_run

from lmms_prune.cli import app
from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.rows import TableRow
from lmms_prune.leaderboard.samples import NoDocumentScoresError, read_samples
from lmms_prune.leaderboard.scorers import box_is_right, mmmu_is_right
from lmms_prune.leaderboard.table import leaderboard

GOOD, POOR = [1.0] * 10 + [0.0] * 2, [1.0] * 3 + [0.0] * 9


def write_other(
    folder: Path,
    values: Sequence[Any],
    schedule: str = "none",
    task: str = "own",
    *,
    score: float | None = None,
    aggregation: str = "mean",
    higher: bool | None = True,
    more: Mapping[str, float] | None = None,
    name: str = "quality,none",
) -> Path:
    """Write a run of a task that is not known: each document's logged `quality`, and the score that the harness made of them."""
    path = write_run(folder, {task: [0.0] * len(values)}, schedule, tokens=40)
    content = json.loads(path.read_text())
    mean = sum(values) / len(values) if score is None else score
    content["results"][task] = {"alias": task, name: mean, **(more or {})}
    names = ["quality", *(other.split(",")[0] for other in more or {})]
    direction = {} if higher is None else {"higher_is_better": higher}
    content["configs"][task]["metric_list"] = [
        {"metric": metric, "aggregation": aggregation, **direction} for metric in dict.fromkeys(names)
    ]
    path.write_text(json.dumps(content))
    samples = path.with_name(path.name.replace("_results.json", f"_samples_{task}.jsonl"))
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    for line in lines:
        del line["exact_match"]
        line["quality"] = values[line["doc_id"]]
        line["filtered_resps"] = json.dumps(values[line["doc_id"]])
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def rows_of(folder: Path, **options: Any) -> dict[str, TableRow]:
    board = leaderboard(read_results([folder]), resamples=200, **options)
    assert not board.problems
    [model] = board.models
    return {row.label: row for row in model.rows}


def command(*words: object, code: int = 0) -> str:
    # Its rows are made up, so that no check of `verify` can hold.
    made_up = ["--no-verify"] if words[0] == "gate" else []
    done = CliRunner().invoke(app, [*map(str, words), *made_up])
    assert done.exit_code == code, done.output
    return " ".join(done.output.split())


def test_a_task_of_ones_own_has_intervals_and_counts_only_if_asked(tmp_path: Path) -> None:
    write_other(tmp_path / "a", GOOD)
    write_other(tmp_path / "b", POOR, "random@2:0.4")
    row = rows_of(tmp_path)["random@2:0.4"]
    comparison = row.cells["own"].comparison
    assert comparison is not None
    assert (row.score("own"), comparison.difference.value) == (25.0, pytest.approx(25 - 1000 / 12))
    assert (comparison.worse, comparison.better, comparison.verdict) == (7, 0, "worse than unpruned")
    assert (row.acc, row.rel, row.marks) == (None, None, ())
    counted = rows_of(tmp_path, counted=["own"])["random@2:0.4"]
    assert (counted.acc, counted.rel) == (25.0, pytest.approx(30))
    assert counted.rel_interval is not None
    assert "Not in Acc and Rel: own (--count counts them, --details prints their intervals)." in command(
        "leaderboard", tmp_path, "--format", "markdown"
    )
    assert "| Acc | Rel |" in command("leaderboard", tmp_path, "--format", "markdown", "--count", "own")
    assert "own, drop" in command("gate", tmp_path, "--max-drop", "own=60", "--schedule", "random@2:0.4")
    message = command("gate", tmp_path, "--min-rel", "20", "--schedule", "random@2:0.4", code=1)
    assert "none of its tasks counts in Rel: --count own" in message
    command("gate", tmp_path, "--min-rel", "20", "--schedule", "random@2:0.4", "--count", "own")
    assert "no such task among the results. They have own" in command(
        "leaderboard", tmp_path, "--count", "owned", code=2
    )
    assert "own" in command("leaderboard", tmp_path, "--format", "html")
    write_other(tmp_path / "wrong" / "a", [0.0] * len(GOOD))
    write_other(tmp_path / "wrong" / "b", POOR, "random@2:0.4")
    options = ["--min-rel", "20", "--schedule", "random@2:0.4", "--count", "own"]
    message = command("gate", tmp_path / "wrong", *options, code=1)
    assert "its baseline scores 0 on own |" in message
    assert "--count own" not in message
    write_other(tmp_path / "alone", POOR, "random@2:0.4")
    message = command("gate", tmp_path / "alone", *options, code=1)
    assert "no unpruned run (schedule=none)" in message
    assert "--count own" not in message


def test_the_ten_benchmarks_alone_make_acc_and_rel(tmp_path: Path) -> None:
    for name, schedule, values in (("a", "none", GOOD), ("b", "random@2:0.4", POOR)):
        write_other(tmp_path / name, values, schedule)
        write_run(tmp_path / f"{name}2", {"gqa": [1.0, 0.0, 1.0, 1.0]}, schedule, tokens=40)
    row = rows_of(tmp_path)["random@2:0.4"]
    assert (row.acc, row.rel) == (75.0, 100.0)
    assert rows_of(tmp_path, counted=["own"])["random@2:0.4"].rel == pytest.approx((100 + 30) / 2)


def test_lower_is_better_where_the_yaml_says_so(tmp_path: Path) -> None:
    write_other(tmp_path / "a", [0.1] * 12, higher=False)
    write_other(tmp_path / "b", [0.6] * 11 + [0.1], "random@2:0.4", higher=False)
    row = rows_of(tmp_path)["random@2:0.4"]
    comparison = row.cells["own"].comparison
    assert comparison is not None
    assert (comparison.verdict, comparison.worse, comparison.better) == ("worse than unpruned", 11, 0)
    assert comparison.difference.value > 0
    assert row.cells["own"].retention is None
    printed = command("leaderboard", tmp_path, "--format", "markdown")
    assert "own ↓" in printed
    failed = command("gate", tmp_path, "--max-drop", "own=20", "--schedule", "random@2:0.4", code=1)
    assert "own ↓, rise | at most 20 | 45.8" in failed
    assert r"\downarrow" in command("leaderboard", tmp_path, "--format", "latex")
    assert "lower is better in own" in command("leaderboard", tmp_path, "--count", "own", code=2)


def test_the_best_of_a_budget_is_the_lowest_where_lower_is_better(tmp_path: Path) -> None:
    write_other(tmp_path / "a", [0.1] * 12, higher=False)
    for name, value, schedule in (("b", 0.6, "random@2:0.4"), ("c", 0.3, "stride@2:0.4")):
        write_other(tmp_path / name, [value] * 12, schedule, higher=False)
    assert "**30.0**" in command("leaderboard", tmp_path, "--format", "markdown")


@pytest.mark.parametrize("first", ["a", "z"])
def test_scores_beyond_one_are_printed_as_they_are_in_all_rows(tmp_path: Path, first: str) -> None:
    """Whichever file is read first, and also where it is the baseline's folder: no row in percent beside others."""
    write_other(tmp_path / first, [0.5, 1.5, 0.4] * 4)
    write_other(tmp_path / "m", [1.5, 2.5, 0.4] * 4, "random@2:0.4")
    rows = rows_of(tmp_path)
    assert {label: row.score("own") for label, row in rows.items()} == pytest.approx(
        {"none": 0.8, "random@2:0.4": 4.4 / 3}
    )
    comparison = rows["random@2:0.4"].cells["own"].comparison
    assert comparison is not None
    assert (comparison.worse, comparison.better, comparison.verdict) == (0, 8, "better than unpruned")
    del TASKS["own"]
    results, baseline = read_results([tmp_path / first]), None
    baseline = read_results([tmp_path / "m"])
    board = leaderboard(results, baseline, resamples=200)
    assert {row.label: row.score("own") for row in board.models[0].rows}["none"] == pytest.approx(0.8)


def test_a_score_that_is_no_mean_over_documents_is_a_column_without_interval(tmp_path: Path) -> None:
    for name, schedule, values, score in (("a", "none", GOOD, 0.9), ("b", "random@2:0.4", POOR, 0.5)):
        write_other(tmp_path / name, values, schedule, score=score, aggregation="<function f1 at 0x7f>")
    row = rows_of(tmp_path)["random@2:0.4"]
    assert (row.score("own"), row.cells["own"].unpruned, row.cells["own"].comparison) == (50.0, 90.0, None)
    assert row.marks == ("the score is no mean over the documents, so it has no interval: own",)
    assert not row.faults


def test_a_mean_that_its_documents_contradict_is_a_fault(tmp_path: Path) -> None:
    write_other(tmp_path / "a", GOOD, score=0.9)
    assert rows_of(tmp_path)["none"].faults == ("the samples give another score: own (83.33 instead of 90.00)",)


@pytest.mark.parametrize("logged", [None, "yes", {"prediction": "a"}, [1.0], float("nan")])
def test_a_task_without_a_score_of_each_document_is_a_column_without_interval(tmp_path: Path, logged: Any) -> None:
    for name, schedule, score in (("a", "none", 0.9), ("b", "random@2:0.4", 0.5)):
        write_other(tmp_path / name, [logged] * 12, schedule, score=score, aggregation="<function f1 at 0x7f>")
    row = rows_of(tmp_path)["random@2:0.4"]
    assert (row.score("own"), row.cells["own"].comparison, row.cost.avg_visual_tokens) == (50.0, None, 40.0)
    assert row.marks == ("the task logs no score of each document, so it has no interval: own",)
    command("leaderboard", tmp_path)
    assert "no score of each document" in command("leaderboard", tmp_path, "--strict", code=1)
    assert "own, drop" in command("gate", tmp_path, "--max-drop", "own=20", "--schedule", "random@2:0.4", code=1)


def test_several_filters_give_a_column_without_interval(tmp_path: Path) -> None:
    path = write_other(tmp_path / "a", GOOD, more={"quality,strict": 0.5})
    assert rows_of(tmp_path)["none"].marks == ("the task logs no score of each document, so it has no interval: own",)
    with pytest.raises(NoDocumentScoresError, match="2 filters score each document"):
        read_samples(path.with_name(path.name.replace("_results.json", "_samples_own.jsonl")), TASKS["own"])


def test_a_filter_of_another_name_is_read(tmp_path: Path) -> None:
    write_other(tmp_path / "a", GOOD, name="quality,flexible-extract")
    row = rows_of(tmp_path)["none"]
    assert (row.score("own"), row.marks) == (pytest.approx(1000 / 12), ())


def test_of_several_metrics_the_first_is_the_column_and_a_note_says_so(tmp_path: Path) -> None:
    write_other(tmp_path / "a", GOOD, more={"recall,none": 0.5})
    printed = command("leaderboard", tmp_path, "--format", "markdown")
    assert "own is quality, the first of its metrics; the others: recall." in printed


def test_nothing_is_left_out_with_exit_code_0(tmp_path: Path) -> None:
    path = write_other(tmp_path / "a", GOOD)
    write_run(tmp_path / "b", {"gqa": [1.0, 0.0]})
    content = json.loads(path.read_text())
    content["results"]["own"]["quality,none"] = "n/a"
    path.write_text(json.dumps(content))
    printed = command("leaderboard", tmp_path, "--format", "markdown", code=1)
    assert "own: cannot be a column: it has no score that is a number (quality is 'n/a')." in printed
    command("leaderboard", tmp_path, "--format", "markdown", "--benchmarks", "gqa")
    assert "cannot be a column" in command("gate", tmp_path, "--max-drop", "gqa=2", code=1)


def test_peak_memory_is_in_the_cost_table_and_named_as_what_it_is(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"gqa": [1.0, 0.0]}, peak=(3 * 2**29, "process"))
    write_run(tmp_path / "b", {"gqa": [1.0, 0.0]}, "random@2:0.4", tokens=40, peak=(20 * 2**30, "GPU"))
    write_run(tmp_path / "c", {"gqa": [1.0, 0.0]}, "stride@2:0.4", tokens=40)
    write_run(tmp_path / "d", {"gqa": [1.0, 0.0]}, "pool@2:0.4", tokens=40, peak=(2**30, "GPU"))
    write_run(tmp_path / "e", {"pope": [1.0, 0.0]}, "pool@2:0.4", tokens=40, peak=(2**30, "process"))
    rows = rows_of(tmp_path)
    peaks = {label: (row.cost.peak_gib, row.cost.peak_of) for label, row in rows.items()}
    unknown = (None, "")
    assert peaks == {
        "none": (1.5, "process"),
        "random@2:0.4": (20.0, "GPU"),
        "stride@2:0.4": unknown,
        "pool@2:0.4": unknown,
    }
    printed = command("leaderboard", tmp_path, "--format", "markdown")
    assert "| peak GiB, GPU | peak GiB, process |" in printed


def test_boxes_are_judged_as_the_harness_judges_them() -> None:
    from lmms_eval.tasks.refcoco.utils_rec import compute_accuracy

    draw = random.Random(0)
    seen = set()
    for _ in range(2000):
        truth = sorted(draw.random() for _ in range(2)) + sorted(draw.random() for _ in range(2))
        truth = [truth[0], truth[2], truth[1], truth[3]]
        given = [side + draw.gauss(0, 0.05) for side in truth] if draw.random() < 0.9 else [0, 0, 0, 0]
        right = box_is_right({"bbox": truth, "pred": given})
        assert right == compute_accuracy(truth, given, 0.5)
        seen.add(right)
    assert seen == {True, False}


def test_mmmu_answers_are_judged_as_the_harness_judges_them() -> None:
    from lmms_eval.tasks.mmmu.utils import evaluate_mmmu, parse_open_response

    draw = random.Random(0)
    texts = ["a", "B", "3", "3.0", "1,200", "the heart", "Heart", "is 3", "about 1200", "x = 3.004", "b ", ""]
    seen = set()
    for number in range(3000):
        kind = draw.choice(("multiple-choice", "open"))
        answer: Any = draw.choice(texts) if draw.random() < 0.7 else draw.sample(texts, 2)
        parsed: Any = draw.choice(["a", "B", "3"]) if kind != "open" else parse_open_response(draw.choice(texts))
        item = {"id": number, "question_type": kind, "answer": answer, "parsed_pred": [parsed]}
        right = mmmu_is_right(json.loads(json.dumps(item)))
        assert right == bool(evaluate_mmmu([item])[1]["acc"]), item
        seen.add((kind, right))
    assert len(seen) == 4


def test_mmstar_is_the_mean_over_its_categories(tmp_path: Path) -> None:
    from lmms_eval.tasks.mmstar.utils import mmstar_aggregate_results

    draw = random.Random(0)
    lines, items = [], []
    for number in range(40):
        category = draw.choice(("recognition", "geometry", "counting"))
        items.append({"question_id": number, "l2_category": category, "score": float(draw.random() < 0.4)})
        line = {"doc_id": number, "input": "?", "target": "A", "filtered_resps": "A", "average": items[-1]}
        lines.append(json.dumps(line))
    path = tmp_path / "samples.jsonl"
    path.write_text("\n".join(lines))
    samples = read_samples(path, TASKS["mmstar"])
    assert samples.score == pytest.approx(100 * mmstar_aggregate_results(items))
    assert samples.score != pytest.approx(100 * sum(item["score"] for item in items) / 40)


@pytest.mark.parametrize(
    ("folder", "tasks"),
    [
        ("refcoco", ["refcoco_bbox_rec_val", "refcoco_bbox_rec_testA"]),
        ("refcoco+", ["refcoco+_bbox_rec_val"]),
        ("refcocog", ["refcocog_bbox_rec_val", "refcocog_bbox_rec_test"]),
        ("chartqa", ["chartqa", "chartqa_lite"]),
        ("ai2d", ["ai2d", "ai2d_lite", "ai2d_no_mask"]),
        ("mmstar", ["mmstar"]),
        ("mmmu", ["mmmu_val"]),
    ],
)
def test_the_metrics_of_named_benchmarks_are_those_of_the_installed_yamls(folder: str, tasks: Sequence[str]) -> None:
    import lmms_eval

    texts = [path.read_text() for path in (Path(lmms_eval.__path__[0]) / "tasks" / folder).glob("*yaml")]
    for task in tasks:
        assert any(f"task: {task}\n" in text.replace('"', "") for text in texts), task
        [metric] = TASKS[task].metrics
        assert any(f"metric: {metric}\n" in text for text in texts)
