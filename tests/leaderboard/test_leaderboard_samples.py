"""Samples files: what each document was worth, by hand and against the harness's own scoring."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written import OPTIONS, line, numbers, write_run

from lmms_prune.leaderboard.benchmarks import BENCHMARKS, FURTHER, TASKS, acc, named, rel, score
from lmms_prune.leaderboard.flips import flips, read_answers
from lmms_prune.leaderboard.mmbench import chosen
from lmms_prune.leaderboard.samples import SamplesError, read_samples

VALUES = {
    "mme": [1, 1, 1, 0, 0, 0, 1, 1],
    "scienceqa_img": [1, 0, 0, 1],
    "pope": [1, 1, 0, 0, 1, 1],
    "textvqa_val": [1, 0.3, 0, 0.6],
    "mmbench_en_dev_static": [1, 1, 1, 0],
    "docvqa_val": [1, 0.75, 0, 0],
    "ocrbench": [1, 0, 0, 0],
}


@pytest.mark.parametrize(
    ("task", "by_hand", "right"),
    [
        # Perception: one image with both right (200) and one with one right (50); cognition: none and both.
        ("mme", (200 + 50) / 2 + (0 + 200) / 2, [True, False, False, True]),
        ("scienceqa_img", 50.0, [True, False, False, True]),
        # yes, no, yes and so on: true yes 2 of 3, one false yes at the fourth.
        ("pope", 100 * 2 * 2 / (2 * 2 + 1 + 1), [True, True, False, False, True, True]),
        ("textvqa_val", 100 * 1.9 / 4, [True, False, False, True]),
        ("mmbench_en_dev_static", 50.0, [True, False]),
        ("docvqa_val", 100 * 1.75 / 4, [True, True, False, False]),
        ("ocrbench", 25.0, [True, False, False, False]),
    ],
)
def test_a_score_is_that_of_the_results_and_of_the_samples(
    tmp_path: Path, task: str, by_hand: float, right: list[bool]
) -> None:
    path = write_run(tmp_path, {task: VALUES[task]})
    assert score(json.loads(path.read_text()), task) == pytest.approx(by_hand)
    read = read_samples(path.with_name(f"20260101_000000_samples_{task}.jsonl"), TASKS[task])
    assert read.score == pytest.approx(by_hand)
    # The keys of MME's units sort by category first.
    assert read.right.tolist() == (right[2:] + right[:2] if task == "mme" else right)
    assert read.documents.tolist() == list(range(len(VALUES[task])))


def test_pope_shows_what_f1_hides(tmp_path: Path) -> None:
    read = _read(tmp_path, "pope", [1, 1, 0, 0, 1, 1])
    assert read.extras == pytest.approx(
        {"accuracy": 400 / 6, "precision": 200 / 3, "recall": 200 / 3, "yes-rate": 50.0}
    )


def _read(folder: Path, task: str, values: list[float], **options: Any):
    path = write_run(folder, {task: values}, **options)
    return read_samples(path.with_name(f"20260101_000000_samples_{task}.jsonl"), TASKS[task])


def test_token_accounting_is_summed_over_all_samples(tmp_path: Path) -> None:
    read = _read(tmp_path, "gqa", [1, 0, 1], schedule="dart@2:0.5", tokens=40)
    assert read.accounting is not None
    assert (read.accounting.avg_visual_tokens, read.accounting.original_visual_tokens) == (40, 100)
    assert read.accounting.costs()["prefill_tflops"] == 0.04
    # One answer of three came from the cache.
    path = next(tmp_path.rglob("*.jsonl"))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps({**json.loads(lines[0]), "token_counts": [None]}), *lines[1:]]))
    assert read_samples(path, TASKS["gqa"]).accounting is None


def _with(text: str, **changed: Any) -> str:
    return json.dumps({**json.loads(text), **changed}) + "\n"


FEW = {"visual_tokens": 2, "avg_visual_tokens": 1.0}
COUNTS = {"visual_tokens": 10**400, "avg_visual_tokens": 1.0, "kv_bytes": 1}


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("gqa", lambda lines: [lines[0], _with(lines[1], doc_id=10**30), lines[2]], "line 2.*OverflowError"),
        ("gqa", lambda lines: [_with(one, token_counts=[COUNTS]) for one in lines], "line 1.*OverflowError"),
        ("gqa", lambda lines: [_with(lines[0], exact_match=1.5)], "line 1: .*a score of 1.5, where 0 to 1 is possible"),
        ("gqa", lambda lines: [_with(lines[0], exact_match=-1)], "a score of -1, where"),
        ("docvqa_val", lambda lines: [_with(lines[0], anls=float("nan"))], "a score of nan, where"),
        ("mme", lambda lines: [lines[0].replace('"score": 1.0', '"score": Infinity')], "a score of inf, where"),
        (
            "gqa",
            lambda lines: [_with(lines[0], token_counts=[{**FEW, "kv_bytes": -1}])],
            "line 1: .*kv_bytes: -1, but must be finite and at least 0",
        ),
        (
            "gqa",
            lambda lines: [_with(lines[0], token_counts=[{**FEW, "kv_bytes": 1e999}])],
            "kv_bytes: inf, but must be finite",
        ),
        ("gqa", lambda lines: [*lines, lines[0]], "4 lines for 3 documents"),
        ("gqa", lambda lines: [*lines[:-1], lines[-1][:40]], "line 3"),
        ("pope", lambda lines: [line("gqa", 0, 1, 5)], "no sample of POPE"),
        ("mme", lambda lines: lines[1:], "asks twice"),
        ("gqa", lambda lines: [], "no samples"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Path, task: str, change: Any, message: str) -> None:
    path = tmp_path / "x.jsonl"
    lines = [line(task, i, 1, 5) for i in range(4 if task == "mme" else 3)]
    path.write_text("".join(change(lines)))
    with pytest.raises(SamplesError, match=message) as error:
        read_samples(path, TASKS[task])
    assert str(path) in str(error.value)


def test_other_documents_have_another_signature(tmp_path: Path) -> None:
    first, second = (_read(tmp_path / str(n), "gqa", [1, 0]) for n in (1, 2))
    assert first.signature == second.signature
    path = tmp_path / "x.jsonl"
    path.write_text(line("gqa", 0, 1, 5) + line("gqa", 1, 1, 5).replace("gqa 1?", "something else?"))
    assert read_samples(path, TASKS["gqa"]).signature != first.signature


def test_flips_have_the_question_and_both_answers(tmp_path: Path) -> None:
    before, after = (
        write_run(tmp_path / name, {"gqa": values}, schedule, tokens=30).with_name("20260101_000000_samples_gqa.jsonl")
        for name, values, schedule in (("a", [1, 1, 0], "none"), ("b", [1, 0, 1], "dart@2:0.3"))
    )
    worse, better = flips(*(read_answers(path, TASKS["gqa"]) for path in (before, after)))
    assert (worse.doc_id, worse.worse, worse.question, worse.before, worse.after) == (1, True, "gqa 1?", "t1", "0")
    assert (better.doc_id, better.worse, better.target, better.kept, better.visual_tokens) == (
        2,
        False,
        "t2",
        (30,),
        100,
    )


@pytest.mark.parametrize(
    ("prediction", "letter"),
    [
        ("B", "B"),
        ("B.", "B"),
        ("(B) a dog", "B"),
        ("The answer is B", "B"),
        ("It is a dog", "B"),
        ("A dog stands on a hill", "B"),  # "A" is an article in a long answer
        ("", ""),
        ("E", "E"),
    ],
)
def test_the_option_of_an_answer(prediction: str, letter: str) -> None:
    assert chosen({"prediction": prediction, **OPTIONS}) == letter


def test_names_and_means() -> None:
    assert named("textvqa") == ("textvqa_val", "prune_textvqa_ocr")
    assert named("MMB") == ("mmbench_en_dev_static", "prune_mmbench_en", "mmbench_en_dev")
    assert named("gqa") == ("gqa",)
    assert named("chartqa") == ("chartqa", "chartqa_lite")
    assert named("RefCOCO+")[0] == "refcoco+_bbox_rec_val"
    assert named("my_task") == ()
    assert len({task for benchmark in (*BENCHMARKS, *FURTHER) for task in benchmark.tasks}) == len(TASKS)
    assert acc({"mme": 1400.0, "gqa": 60.0}) == pytest.approx(55)
    assert acc({"mme": 1400.0, "gqa": None}) is None
    whole = {"mme": 1600.0, "pope": 80.0, "gqa": 0.0}
    assert rel({"mme": 800.0, "pope": 80.0, "gqa": 5.0}, whole) == pytest.approx(75)
    assert rel({"mme": 800.0}, whole) is None
    assert rel({"mme": 0.0}, {"mme": 0.0}) is None


@pytest.mark.slow
def test_mmbench_answers_are_read_as_the_harness_reads_them() -> None:
    """On thousands of random answers, each rule of the harness taken many times."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    draw = random.Random(0)
    options = [
        {"A": "a cat", "B": "a dog", "C": "cat", "D": "nan"},
        {"A": "3", "B": "13", "C": None, "D": float("nan")},
    ]
    parts = [
        *"ABCDE",
        "A.",
        "(B)",
        "C:",
        "D)",
        "B,",
        ":A",
        "(C).",
        "the answer is",
        "i pick",
        "选",
        "cat",
        "a dog",
        "3",
    ]
    parts += ["it", "is", "nan", "answer", "AB", "xB", "Bx", "", ".", "!", "Failed to obtain answer via API"]
    seen = set()
    for _ in range(4000):
        answer = draw.choice([" ", "", ", "]).join(draw.choices(parts, k=draw.randint(1, 6)))
        item = {"prediction": answer, **draw.choice(options)}
        first = mmbench_evaluator.prefetch_answer(item)
        if not first:
            from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer

            first = extract_mcq_answer(answer, choices=sorted(mmbench_evaluator.build_choices(item)))
        assert chosen(item) == first, item
        seen.add(first)
    assert {*"ABCDE", ""} <= seen


@pytest.mark.slow
def test_scores_are_the_harness_own(tmp_path: Path) -> None:
    """MME, POPE and MMBench, aggregated by the harness from the same logged items."""
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator
    from lmms_eval.tasks.mme.utils import mme_aggregate_results
    from lmms_eval.tasks.pope.utils import pope_aggregate_f1_score, pope_aggregate_precision, pope_aggregate_recall

    rng = np.random.default_rng(0)
    values = rng.integers(0, 2, 40).astype(float).tolist()
    for task in ("mme", "pope", "mmbench_cn_dev_static"):
        read = _read(tmp_path / task, task, values)
        lines = [json.loads(one) for one in next((tmp_path / task).rglob("*.jsonl")).read_text().splitlines()]
        if task == "mme":
            parts = [[one[m] for one in lines if m in one] for m in TASKS["mme"].metrics]
            assert read.score == pytest.approx(sum(map(mme_aggregate_results, parts)))
        elif task == "pope":
            items = [one["pope_f1_score"] for one in lines]
            items[3]["prediction"] = items[4]["prediction"] = "perhaps"
            path = tmp_path / "unclear.jsonl"
            path.write_text("".join(json.dumps({**one, "pope_accuracy": one["pope_f1_score"]}) + "\n" for one in lines))
            read = read_samples(path, TASKS["pope"])
            assert read.score == pytest.approx(100 * pope_aggregate_f1_score(items))
            assert read.extras["precision"] == pytest.approx(100 * pope_aggregate_precision(items))
            assert read.extras["recall"] == pytest.approx(100 * pope_aggregate_recall(items))
        else:
            accuracy, _, _ = mmbench_evaluator.eval_result(
                [{**one["gpt_eval_score"], "category": "c"} for one in lines], "static"
            )
            assert read.score == pytest.approx(100 * accuracy)
            assert read.score == pytest.approx(numbers(task, values)["gpt_eval_score,none"])
