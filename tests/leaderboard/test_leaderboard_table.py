"""The finished table: baselines, seeds, controls, budgets, and the marks of what is not comparable."""

from __future__ import annotations

import json
import re
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from written import write_run

from lmms_prune.leaderboard.comparability import SETTINGS
from lmms_prune.leaderboard.formats import FORMATS
from lmms_prune.leaderboard.gate import Limits, judged
from lmms_prune.leaderboard.grids import scores
from lmms_prune.leaderboard.notes import footnotes
from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.rows import PRUNED, Leaderboard, ModelTable, TableRow
from lmms_prune.leaderboard.table import leaderboard
from lmms_prune.models import FAMILIES

MANY = 200
TASKS = ("gqa", "docvqa_val")


def values(right: float, seed: int = 0, many: int = MANY) -> dict[str, list[float]]:
    """About so many right answers of each task; the same documents are hard for all."""
    hardness = np.random.default_rng(seed).random((len(TASKS), many))
    return {task: (row < right).astype(float).tolist() for task, row in zip(TASKS, hardness, strict=True)}


def made(*paths: Path, **options: Any) -> Leaderboard:
    return leaderboard(read_results(list(paths)), resamples=400, **options)


def only(board: Leaderboard) -> ModelTable:
    (model,) = board.models
    return model


def row(board: Leaderboard, label: str) -> TableRow:
    (found,) = [one for one in only(board).rows if one.label == label]
    return found


def test_scores_ratios_costs_and_retention_above_blind(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"gqa": [1.0] * 80 + [0.0] * 20})
    write_run(tmp_path / "b", {"gqa": [1.0] * 60 + [0.0] * 40}, "dart@2:0.3", tokens=30)
    write_run(tmp_path / "c", {"gqa": [1.0] * 20 + [0.0] * 80}, "blind@0")
    board = made(tmp_path)
    pruned = row(board, "dart@2:0.3")
    assert (pruned.baseline, pruned.rel, pruned.acc, pruned.above_blind) == ("none", 75, 60, pytest.approx(200 / 3))
    cell = pruned.cells["gqa"]
    assert (cell.retention, cell.above_blind) == (75, pytest.approx(200 / 3))
    one = cell.comparison
    assert one is not None
    assert (one.difference.value, one.worse, one.better, one.units, one.agreement) == (-20, 20, 0, 100, 80)
    assert one.difference.high < 0
    assert one.p == one.mcnemar == pytest.approx(2 * 0.5**20)
    assert one.verdict == "worse than unpruned"
    cost = pruned.cost
    assert (cost.avg_visual_tokens, cost.share_tokens, cost.share_kv, cost.share_flops) == pytest.approx(
        (30, 30, 30, 30), rel=1e-4
    )
    assert (cost.samples_per_second, cost.share_speed) == (2, 100)
    assert [budget.title for budget in only(board).budgets] == ["unpruned", "30 tokens (30 %)", "0 tokens"]
    assert not board.marked
    assert not board.problems


def test_a_method_of_ones_own_is_a_row_and_may_be_the_baseline(tmp_path: Path) -> None:
    """Paired with another method, a verdict names that method; nothing of the file is needed, which does not exist here."""
    write_run(tmp_path / "a", {"gqa": [1.0] * 80 + [0.0] * 20})
    write_run(tmp_path / "mine", {"gqa": [1.0] * 40 + [0.0] * 60}, "mine.py:Mine@2:0.3;power=3.0", tokens=30)
    write_run(tmp_path / "dart", {"gqa": [1.0] * 60 + [0.0] * 40}, "dart@2:0.3", tokens=30)
    mine, dart = "mine.py:Mine@2:0.3;power=3.0", "dart@2:0.3"
    board = made(tmp_path)
    assert (row(board, mine).kind, row(board, mine).rel) == (PRUNED, 50)
    for baseline, other, expected in (
        (tmp_path / "dart", mine, "worse than dart@2:0.3"),
        (tmp_path / "mine", dart, f"better than {mine}"),
    ):
        compared = row(made(tmp_path, baseline=read_results([baseline])), other).cells["gqa"].comparison
        assert compared is not None
        assert compared.verdict == expected
        assert abs(compared.difference.value) == 20


def test_holm_corrects_for_the_benchmarks_of_a_row(tmp_path: Path) -> None:
    whole, less = values(0.8), values(0.8)
    less["gqa"] = values(0.7)["gqa"]
    write_run(tmp_path / "a", whole)
    write_run(tmp_path / "b", less, "dart@2:0.3", tokens=30)
    cells = row(made(tmp_path), "dart@2:0.3").cells
    gqa, doc = cells["gqa"].comparison, cells["docvqa_val"].comparison
    assert gqa is not None
    assert doc is not None
    assert gqa.p_holm == pytest.approx(2 * gqa.p)
    assert (doc.p, doc.p_holm, doc.verdict) == (1, 1, "not distinguishable")


def test_too_few_resamples_for_holm_are_named(tmp_path: Path) -> None:
    """The smallest p of 200 resamples is 0.00995; five benchmarks make it 0.0498, six 0.0597."""
    tasks = ("docvqa_val", "infovqa_val", "textvqa_val", "pope", "mme", "prune_textvqa_ocr")  # none has an exact test
    for count, named in ((5, False), (6, True)):
        folder = tmp_path / str(count)
        for name, schedule, value in (("a", "none", 1.0), ("b", "dart@2:0.3", 0.0)):
            write_run(folder / name, {task: [value] * 20 for task in tasks[:count]}, schedule, tokens=30)
        board = leaderboard(read_results([folder]), resamples=200)
        assert ("200 resamples may be too few" in " ".join(footnotes(board, False))) == named
        comparison = row(board, "dart@2:0.3").cells["docvqa_val"].comparison
        assert comparison is not None
        assert comparison.mark == ("▽" if named else "▼")


def test_seeds_are_one_row_with_their_spread(tmp_path: Path) -> None:
    write_run(tmp_path / "none", values(0.9))
    scores = []
    for seed, right in enumerate((0.70, 0.74, 0.78)):
        write_run(tmp_path / str(seed), values(right), "random@1:0.3", tokens=30, seed=seed)
        scores.append(100 * np.mean(values(right)["gqa"]))
    found = row(made(tmp_path), "random@1:0.3")
    assert found.seeds == (0, 1, 2)
    assert found.cells["gqa"].score == pytest.approx(np.mean(scores))
    assert found.cells["gqa"].sd == pytest.approx(np.std(scores, ddof=1))
    assert found.rel_sd is not None
    assert found.cells["gqa"].comparison is not None
    assert found.cells["gqa"].comparison.mcnemar is None
    text = FORMATS["markdown"](made(tmp_path), False)
    assert f"| `random@1:0.3 × 3 seeds` | 30 | {np.mean(scores):.1f} ±{np.std(scores, ddof=1):.1f} |" in text


@pytest.mark.parametrize(
    ("right", "tokens", "verdict"),
    [(0.85, 30, "beats random"), (0.45, 30, "below random"), (0.655, 30, "not distinguishable"), (0.85, 32, None)],
)
def test_a_verdict_against_random_needs_the_same_measured_budget(
    tmp_path: Path, right: float, tokens: int, verdict: str | None
) -> None:
    write_run(tmp_path / "none", values(0.9))
    for seed, share in enumerate((0.64, 0.65, 0.66)):
        write_run(tmp_path / f"r{seed}", values(share), "random@1:0.3", tokens=30.3, seed=seed)
    write_run(tmp_path / "keep all", values(0.9), "random@1:1", tokens=100)
    write_run(tmp_path / "dart", values(right), "dart@2:0.3", tokens=tokens)
    board = made(tmp_path)
    found = row(board, "dart@2:0.3")
    if verdict is None:
        assert found.random is None
        assert "random@1:0.3" not in " ".join(only(board).notes)
    else:
        assert found.random is not None
        assert (found.random.verdict, found.random.other) == (verdict, "random@1:0.3")
        assert found.cells["gqa"].random is not None
        assert "within 3%): 'random@1:0.3'" in " ".join(only(board).notes)
    assert row(board, "random@1:0.3").random is None


def test_arguments_that_only_some_families_have_are_compared_too() -> None:
    assert {name for family in FAMILIES.values() for name in family.arguments} <= set(SETTINGS)


@pytest.mark.parametrize(
    ("change", "mark"),
    [
        ({"facts": {"attention": "eager"}}, "attention: eager; its baseline: sdpa"),
        ({"facts": {"dtype": "bfloat16"}}, "dtype: bfloat16; its baseline: float16"),
        ({"facts": {"device": "NVIDIA H200"}}, "device: NVIDIA H200"),
        ({"facts": {"torch": "2.14.0"}}, "torch: 2.14.0; its baseline: 2.15.0"),
        ({"facts": {"code": "ba9876543210"}}, "code: ba9876543210; its baseline: 0123456789ab"),
        ({"facts": {"commit": "0123456789ab-dirty"}}, "changes that were not committed"),
        ({"facts": {"attention": None}}, "attention not recorded"),
        ({"settings": {"image_aspect": "pad"}}, "image_aspect: pad; its baseline: crop"),
        ({"settings": {"prompt": "vicuna"}}, "prompt: vicuna; its baseline: hf"),
        ({"settings": {"unpad": "False"}}, "unpad: False; its baseline:"),
        ({"limit": 200, "documents": 500}, "only a part of the documents: GQA (200 of 500), DocVQA (200 of 500)"),
        ({"samples": False}, "no samples logged: GQA, DocVQA"),
        ({"ours": False}, "no measured budget"),
        ({"unpruned": 3}, "3 samples lost no visual token: their images have no more than the schedule keeps"),
        ({"gqa": 0.123}, "the samples give another score: GQA (70.00 instead of 12.30)"),
    ],
)
def test_what_is_not_comparable_is_marked_and_shown(tmp_path: Path, change: dict[str, Any], mark: str) -> None:
    write_run(tmp_path / "none", values(0.9))
    right = {task: [1.0] * 140 + [0.0] * 60 for task in TASKS}
    write_run(tmp_path / "dart", right, "dart@2:0.3", tokens=30, **change)
    board = made(tmp_path)
    (found,) = [one for one in only(board).rows if one.label != "none"]
    assert any(mark in one for one in found.marks), found.marks
    assert found.score("docvqa_val") == pytest.approx(70)
    assert any(mark in line for line in footnotes(board, False))
    assert not row(board, "none").marks


@pytest.mark.parametrize(
    ("before", "after", "unlike", "reason"),
    [
        ({"batch_size": 16}, {"batch_size": 1}, "other batch size", "batch size: 1; its baseline: 16"),
        ({"batch_size": 8}, {"batch_size": "auto"}, "other batch size", "batch size: auto, at most 32; its baseline: 8"),
        ({"facts": {"threads": "1"}}, {}, "other threads", "threads: 4; its baseline: 1"),
        ({}, {"facts": {"machine": "M4, 8 cores"}}, "other machine", "machine: M4, 8 cores; its baseline: AMD EPYC, 8 c"),
        ({}, {"facts": {"device": "NVIDIA H200"}}, "other device", "device: NVIDIA H200; its baseline: cpu (x86_64)"),
        ({}, {"facts": {"processes": "2"}}, "other processes", "processes: 2; its baseline: 1"),
        ({"other_load": 0.5}, {}, "other load", "other programs took 50% of the machine (at most 10% is compared)"),
        ({}, {"other_load": 0.2}, "other load", "other programs took 20% of the machine"),
        ({}, {"other_load": None}, "unknown load", "load by other programs not recorded"),
        ({"facts": {"threads": None}}, {"facts": {"threads": None}}, "unknown threads", "threads not recorded"),
        ({"batch_size": 1}, {"facts": {"threads": "1"}}, "other batch size, other threads", "batch size: 8; its baseline: 1; threads"),
    ],
)  # fmt: skip
def test_a_speed_is_a_share_only_where_all_that_changes_times_is_the_same(
    tmp_path: Path, before: dict[str, Any], after: dict[str, Any], unlike: str, reason: str
) -> None:
    write_run(tmp_path / "none", values(0.9), **before)
    write_run(tmp_path / "dart", values(0.8), "dart@2:0.3", tokens=30, **after)
    board = made(tmp_path)
    cost = row(board, "dart@2:0.3").cost
    assert (cost.samples_per_second, cost.share_speed, cost.unlike) == (2, None, unlike)
    assert reason in cost.no_share_speed
    assert cost.share_kv is not None  # what was counted is a share on any machine
    assert row(board, "none").cost.share_speed == 100
    for form in ("table", "markdown"):
        text = FORMATS[form](board, False)
        (line,) = [one for one in text.splitlines() if "dart@2:0.3" in one and unlike in one]
        assert "2" in line
        assert f"its speed is no share of the baseline's: {cost.no_share_speed}." in text
    (described,) = [one for one in json.loads(FORMATS["json"](board, False))["models"][0]["budgets"][1]["rows"]]
    assert (described["cost"]["share_speed"], described["cost"]["no_share_speed"]) == (None, cost.no_share_speed)
    assert cost.no_share_speed in FORMATS["csv"](board, False).replace('"', "")
    assert cost.no_share_speed in FORMATS["html"](board, False)


def test_a_speed_is_printed_with_its_interval_or_not_at_all(tmp_path: Path) -> None:
    """Two seeds at 2 and 3 samples a second have one; a single run of the unpruned model has none."""
    write_run(tmp_path / "none", values(0.9))
    for seed in (0, 1):
        path = write_run(tmp_path / str(seed), values(0.8), "random@1:0.3", tokens=30, seed=seed)
        if seed:
            found = json.loads(path.read_text(encoding="utf-8"))
            found["throughput"] |= {"total_elapsed_time": 4 / 3, "avg_latency": 1 / 3}
            path.write_text(json.dumps(found), encoding="utf-8")
    board = made(tmp_path)
    alone, seeds = row(board, "none").cost, row(board, "random@1:0.3").cost
    assert (alone.samples_per_second, alone.samples_per_second_low, alone.share_speed_low) == (2, None, None)
    # t of one degree of freedom: 12.706; of 2 and 3 the standard error is 0.5. Below zero no speed is possible.
    assert (seeds.samples_per_second_low, seeds.samples_per_second_high) == pytest.approx((0, 2.5 + 6.353), abs=1e-3)
    text = FORMATS["markdown"](board, False)
    assert "2.4 (0 to 8.85)" in text
    assert "A speed needs an interval" in text
    (line,) = [one for one in text.splitlines() if one.startswith("| `none` | 100 | 100 |")]
    assert line.endswith("100 |  |")


def test_a_row_of_runs_at_two_batch_sizes_has_no_share(tmp_path: Path) -> None:
    write_run(tmp_path / "none", values(0.9))
    for seed, size in ((0, 8), (1, 16)):
        write_run(tmp_path / str(seed), values(0.8), "random@1:0.3", tokens=30, seed=seed, batch_size=size)
    cost = row(made(tmp_path), "random@1:0.3").cost
    assert (cost.share_speed, cost.no_share_speed) == (None, "batch size: 16 and 8; its baseline: 8")


@pytest.mark.parametrize("samples", [True, False])
def test_original_tokens_are_known_where_the_first_layer_has_fewer(tmp_path: Path, samples: bool) -> None:
    """Without logged samples the record of the task alone says how many there were."""
    write_run(tmp_path / "none", values(0.9), samples=samples)
    write_run(tmp_path / "divprune", values(0.8), "divprune@0:0.3", tokens=30, samples=samples)
    costs = [row(made(tmp_path), label).cost for label in ("none", "divprune@0:0.3")]
    assert [cost.original_tokens for cost in costs] == [100, 100]
    assert [cost.share_tokens for cost in costs] == pytest.approx([100, 30])


def test_missing_samples_and_cached_answers_are_marked(tmp_path: Path) -> None:
    write_run(tmp_path / "none", values(0.9))
    path = write_run(tmp_path / "dart", values(0.8), "dart@2:0.3", tokens=30)
    gqa, doc = (path.with_name(f"20260101_000000_samples_{task}.jsonl") for task in TASKS)
    gqa.write_text("".join(gqa.read_text().splitlines(keepends=True)[:150]))
    doc.write_text(doc.read_text().replace("avg_visual_tokens", "other"))
    found = row(made(tmp_path), "dart@2:0.3")
    assert "samples are missing: GQA (150 of 200)" in found.marks
    assert any("no measured budget" in mark for mark in found.marks)
    assert found.cells["gqa"].comparison is None
    assert found.cells["docvqa_val"].comparison is not None
    assert only(made(tmp_path)).budgets[-1].title == "no measured budget"


def test_samples_that_cannot_be_used_are_named_and_the_row_is_shown(tmp_path: Path) -> None:
    write_run(tmp_path / "none", values(0.9))
    path = write_run(tmp_path / "dart", values(0.8), "dart@2:0.3", tokens=30).with_name(
        "20260101_000000_samples_gqa.jsonl"
    )
    path.write_bytes(path.read_bytes()[:-200] + b"\xff")
    board = made(tmp_path)
    (problem,) = board.problems
    assert problem.path == str(path)
    assert problem.message.startswith("line 200: no sample of GQA")
    found = row(board, "dart@2:0.3")
    assert "samples cannot be used: GQA" in found.marks
    assert found.rel is not None
    assert found.rel_interval is None
    assert found.cells["docvqa_val"].comparison is not None


def test_other_prompts_of_a_task_are_marked_whatever_the_addresses(tmp_path: Path) -> None:
    write_run(tmp_path / "none", values(0.9))
    path = write_run(tmp_path / "dart", values(0.8), "dart@2:0.3", tokens=30)
    assert not made(tmp_path).marked
    path.write_text(path.read_text().replace("<function f at", "<function g at"))
    ((_, found),) = made(tmp_path).marked
    assert "GQA: other prompts or generation settings of the task than its baseline" in found.marks


def test_the_nearest_unpruned_run_is_the_baseline(tmp_path: Path) -> None:
    write_run(tmp_path / "crop", values(0.9))
    write_run(tmp_path / "pad", values(0.8), settings={"image_aspect": "pad"})
    write_run(tmp_path / "dart", values(0.7), "dart@2:0.3", tokens=30, settings={"image_aspect": "pad"})
    found = row(made(tmp_path), "dart@2:0.3")
    assert found.baseline == "none (image_aspect=pad)"
    assert not found.marks
    assert found.rel == pytest.approx(np.mean([100 * np.mean(values(0.7)[t]) / np.mean(values(0.8)[t]) for t in TASKS]))


def test_a_missing_number_stays_blank_and_is_counted(tmp_path: Path) -> None:
    write_run(tmp_path / "none", values(0.9))
    write_run(tmp_path / "dart", {"gqa": values(0.8)["gqa"]}, "dart@2:0.3", tokens=30)
    board = made(tmp_path)
    found = row(board, "dart@2:0.3")
    assert (found.missing, found.rel, found.acc, only(board).missing) == (("docvqa_val",), None, None, 1)
    assert "missing: DocVQA" in found.marks
    assert any("1 number is missing" in line for line in footnotes(board, False))
    chosen = row(made(tmp_path, tasks=["gqa"]), "dart@2:0.3")
    assert chosen.rel is not None
    assert not chosen.marks


def test_without_an_unpruned_run_the_rows_are_shown_and_the_lack_is_named(tmp_path: Path) -> None:
    path = write_run(tmp_path, values(0.8), "dart@2:0.3", tokens=30)
    board = made(tmp_path)
    found = row(board, "dart@2:0.3")
    assert (found.rel, found.score("gqa")) == (None, pytest.approx(100 * np.mean(values(0.8)["gqa"])))
    (problem,) = board.problems
    assert problem.path == str(path)
    assert "no unpruned run" in problem.message


def test_a_stock_run_is_the_baseline_only_where_there_is_no_other(tmp_path: Path) -> None:
    write_run(tmp_path / "stock", values(0.9), ours=False)
    write_run(tmp_path / "dart", values(0.8), "dart@2:0.3", tokens=30)
    found = row(made(tmp_path), "dart@2:0.3")
    assert found.baseline == "llava_hf"
    assert any("baseline is not a run of this plugin" in mark for mark in found.marks)
    write_run(tmp_path / "none", values(0.9))
    found = row(made(tmp_path), "dart@2:0.3")
    assert (found.baseline, found.marks) == ("none", ())


def test_an_oracle_is_called_one_and_never_the_best(tmp_path: Path) -> None:
    """It is told the answers: the best of the others is bold, and the gate judges it only where it is named."""
    write_run(tmp_path / "a", values(0.9))
    write_run(tmp_path / "b", values(0.8), oracle := "dart@1:0.9,information@2:0.25;of=worth", tokens=30)
    write_run(tmp_path / "c", values(0.6), "dart@2:0.3", tokens=30)
    write_run(tmp_path / "d", values(0.5), "random@2:0.3", tokens=30)
    board = made(tmp_path)
    lines = {line.cells[0]: line for line in scores(only(board)).lines if line.cells}
    assert not lines[f"{oracle} [oracle]"].bold
    assert len(lines["dart@2:0.3"].bold) == len(TASKS) + 2
    assert not lines["random@2:0.3"].bold
    (mark,) = row(board, oracle).marks
    assert mark.startswith("information is told the right answers")
    assert [one.row.label for one in judged(board, Limits(min_rel=1.0))] == ["dart@2:0.3"]
    assert [one.row.label for one in judged(board, Limits(min_rel=1.0), [oracle])] == [oracle]


def test_models_are_tables_of_their_own(tmp_path: Path) -> None:
    for model in ("/a/tiny", "/b/tiny", "org/other"):
        write_run(tmp_path / model.replace("/", "_"), values(0.9), model=model)
    board = made(tmp_path)
    assert [model.title for model in board.models] == ["a/tiny", "b/tiny", "org/other"]


def test_a_given_baseline_may_have_the_same_settings(tmp_path: Path) -> None:
    """As in CI: the same schedule with the code before a change."""
    write_run(tmp_path / "old" / "x", values(0.8), "dart@2:0.3", tokens=30, facts={"code": "old"})
    write_run(tmp_path / "new" / "x", values(0.7), "dart@2:0.3", tokens=30, facts={"code": "new"})
    board = made(tmp_path / "new", baseline=read_results([tmp_path / "old"]))
    old, new = sorted(only(board).rows, key=lambda one: one.baseline or "")
    assert (old.label, new.label, new.baseline) == ("dart@2:0.3 (run=--baseline)", "dart@2:0.3", old.label)
    assert new.rel is not None
    assert new.rel < 95
    assert "code: new; its baseline: old" in new.marks
    assert not board.problems


def test_a_given_baseline_of_another_model_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "old", values(0.8), model="org/other")
    write_run(tmp_path / "new", values(0.7))
    board = made(tmp_path / "new", baseline=read_results([tmp_path / "old"]))
    (problem,) = board.problems
    assert "--baseline holds no run of /models/tiny-llava" in problem.message


LLAVA = {
    "model": "llava-hf/llava-1.5-7b-hf",
    "settings": {"positions": "compact", "prompt": "vicuna", "image_aspect": "pad"},
}
LLAVA["settings"] |= {"system_prompt": "None", "chat_template": "None"}
HYBRID = "dart@2:0.44;order=reference,random@20:0.07"


def test_the_published_row_stands_beside_ours(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"gqa": [1.0] * 62 + [0.0] * 38}, **LLAVA)
    write_run(tmp_path / "b", {"gqa": [1.0] * 59 + [0.0] * 41}, HYBRID, tokens=33, **LLAVA)
    board = made(tmp_path)
    found = row(board, HYBRID)
    assert found.published is not None
    assert found.cells["gqa"].published == 59.6
    assert found.cells["gqa"].delta == pytest.approx(-0.6)
    text = FORMATS["markdown"](board, False)
    # Rel over one benchmark is not the paper's over seven.
    assert f"| `{HYBRID}` | DART+Random 192 | 59.6 -0.6 | 98.2 (1) |" in text
    assert "(1) not compared: without MME, SQA, POPE, TextVQA, MMB, MMB-CN." in text


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prompt": "hf"}, "prompt hf, not vicuna"),
        ({"image_aspect": "crop"}, "image_aspect crop, not pad"),
        ({"positions": "original"}, "positions original, not compact"),
        ({"system_prompt": "Be brief."}, "system_prompt Be brief., not None"),
        ({"gen_kwargs": "max_new_tokens=4"}, "gen_kwargs max_new_tokens=4, not none"),
    ],
)
def test_another_protocol_is_not_compared_with_the_print(tmp_path: Path, settings: dict, reason: str) -> None:
    settings = {**LLAVA["settings"], **settings}
    write_run(tmp_path / "a", {"gqa": [1.0] * 62 + [0.0] * 38}, model=LLAVA["model"], settings=settings)
    write_run(tmp_path / "b", {"gqa": [1.0, 0.0]}, HYBRID, tokens=33, model=LLAVA["model"], settings=settings)
    board = made(tmp_path)
    found = row(board, HYBRID)
    assert (found.cells["gqa"].published, found.cells["gqa"].delta, found.cells["gqa"].unlike) == (
        59.6,
        None,
        (reason,),
    )
    text = FORMATS["markdown"](board, False)
    (note,) = re.findall(rf"\((\d)\) not compared: {re.escape(reason.rstrip('.'))}\.\n", text)
    assert f"| `{HYBRID}` | DART+Random 192 | 59.6 ({note}) | 98.2 (1, 2) |" in text
    assert reason in FORMATS["csv"](board, False)
    assert reason in FORMATS["json"](board, False)
    assert reason in FORMATS["html"](board, False)
    # Positions of the unpruned model are never renumbered.
    assert row(board, "none").cells["gqa"].unlike == (() if "positions" in reason else (reason,))


def test_a_variant_of_a_task_a_part_of_it_and_other_options_are_not_compared_with_the_print(tmp_path: Path) -> None:
    """lmms-eval's own TextVQA has no OCR tokens: some 12 points less, which is no failed reproduction."""
    scores = {"textvqa_val": [1.0, 0.0], "prune_textvqa_ocr": [1.0, 0.0], "prune_pope": [1.0] * 4}
    write_run(tmp_path / "a", scores, **LLAVA)
    write_run(tmp_path / "b", scores, "dart@2:0.44,random@20:0.07", tokens=33, documents=5, **LLAVA)
    board = made(tmp_path)
    assert row(board, "none").cells["prune_textvqa_ocr"].unlike == ()
    assert row(board, "none").cells["textvqa_val"].unlike == ("task textvqa_val, not prune_textvqa_ocr",)
    found = row(board, "dart@2:0.44,random@20:0.07").cells["prune_textvqa_ocr"]
    assert found.unlike == (
        "2 of 5 documents of prune_textvqa_ocr",
        "dart@2:0.44, not dart@2:0.44;order=reference",
    )
    assert found.delta is None


def test_a_whole_row_of_the_papers_protocol_is_compared_with_the_print(tmp_path: Path) -> None:
    tasks = ["mme", "scienceqa_img", "prune_pope", "prune_textvqa_ocr", "prune_mmbench_en", "prune_mmbench_cn", "gqa"]
    scores = {task: [1.0, 1.0, 0.0, 0.0] for task in tasks}
    write_run(tmp_path / "a", scores, **LLAVA)
    write_run(tmp_path / "b", scores, HYBRID, tokens=33, **LLAVA)
    found = row(made(tmp_path), HYBRID)
    assert (found.unlike, found.rel) == ((), 100.0)
    assert "98.2 +1.8 |" in FORMATS["markdown"](made(tmp_path), False)
    # An unpruned run of another protocol makes another Rel.
    write_run(tmp_path / "a", scores, model=LLAVA["model"], settings={**LLAVA["settings"], "prompt": "hf"})
    assert row(made(tmp_path), HYBRID).unlike == ("baseline: prompt hf, not vicuna",)


def test_means_by_group(tmp_path: Path) -> None:
    """By hand; a mean of a group with a missing benchmark is blank, as Acc is."""
    # SQA and GQA: knowledge QA. TextVQA and DocVQA: text-centric.
    full = {
        "scienceqa_img": [1.0] * 10,
        "gqa": [1.0] * 8 + [0.0] * 2,
        "textvqa_val": [1.0] * 10,
        "docvqa_val": [1, 1, 0, 0],
    }
    write_run(tmp_path / "a", full)
    pruned = {"scienceqa_img": [1.0] * 5 + [0.0] * 5, "gqa": [1.0] * 4 + [0.0] * 6, "textvqa_val": [1.0] * 9 + [0.0]}
    write_run(tmp_path / "b", pruned, "dart@1:0.3", tokens=33)
    board = made(tmp_path)
    unpruned, found = row(board, "none").groups, row(board, "dart@1:0.3").groups
    assert list(unpruned) == list(found) == ["knowledge QA", "text-centric"]
    assert astuple(unpruned["knowledge QA"]) == pytest.approx((90.0, 100.0))
    assert astuple(found["knowledge QA"]) == pytest.approx((45.0, 50.0))
    assert astuple(found["text-centric"]) == (None, None)
    text = FORMATS["markdown"](board, False)
    assert "means by group" in text
    assert "knowledge QA: SQA, GQA; text-centric: TextVQA, DocVQA." in text
    assert "| `dart@1:0.3` | 33 | 45.0 | 50.0 |  |  |" in text
    assert "knowledge_QA_rel" in FORMATS["csv"](board, False).splitlines()[0]
    assert json.loads(FORMATS["json"](board, False))["models"][0]["budgets"][1]["rows"][0]["groups"]["knowledge QA"][
        "rel"
    ] == (pytest.approx(50.0))


@pytest.mark.parametrize("tasks", [["gqa"], ["gqa", "textvqa_val"], ["gqa", "scienceqa_img"]])
def test_without_several_groups_and_a_group_of_several_there_is_no_table_of_groups(
    tasks: list[str], tmp_path: Path
) -> None:
    write_run(tmp_path, {task: [1.0, 0.0] for task in tasks})
    assert "means by group" not in FORMATS["markdown"](made(tmp_path), False)


def test_rows_of_other_protocols_are_not_compared_with_each_other_in_silence(tmp_path: Path) -> None:
    """Positions are no reason against the unpruned run, but against another pruned one they are."""
    write_run(tmp_path / "a", values(0.8))
    write_run(tmp_path / "b", values(0.7), "dart@1:0.3", tokens=33, settings={"positions": "compact"})
    write_run(tmp_path / "c", values(0.6), "random@1:0.3", tokens=33)
    board = made(tmp_path)
    assert row(board, "dart@1:0.3").random is not None
    assert row(board, "dart@1:0.3").marks == ("positions: compact; its random control: original",)
    assert row(board, "random@1:0.3").marks == ()
    assert (
        "Rows of different positions cannot be compared with each other: compact ('dart@1:0.3'); original "
        "('random@1:0.3')." in only(board).notes
    )


def test_a_baseline_of_another_variant_is_named(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"prune_pope": [1.0] * 4, "gqa": [1.0] * 4})
    write_run(tmp_path / "b", {"pope": [1.0] * 4, "gqa": [1.0] * 4}, "dart@1:0.3", tokens=33)
    marks = row(made(tmp_path), "dart@1:0.3").marks
    assert "POPE: pope; its baseline: prune_pope, which asks or scores differently" in marks


def test_two_variants_of_a_benchmark_are_two_columns(tmp_path: Path) -> None:
    write_run(tmp_path, {"textvqa_val": [1.0, 0, 0], "prune_textvqa_ocr": [1.0, 1, 0]})
    model = only(made(tmp_path))
    assert [model.column(task) for task in model.tasks] == ["TextVQA", "TextVQA (prune_textvqa_ocr)"]


def test_intervals_do_not_depend_on_what_else_stands_in_the_table(tmp_path: Path) -> None:
    write_run(tmp_path / "none", values(0.9))
    write_run(tmp_path / "dart", values(0.8), "dart@2:0.3", tokens=30)
    first = row(made(tmp_path), "dart@2:0.3").cells["gqa"].comparison
    write_run(tmp_path / "fastv", values(0.6), "fastv@2:0.3", tokens=30)
    again = row(made(tmp_path), "dart@2:0.3").cells["gqa"].comparison
    other = row(made(tmp_path, seed=1), "dart@2:0.3").cells["gqa"].comparison
    assert first == again
    assert first is not None
    assert other is not None
    assert other.difference != first.difference


def test_mme_is_resampled_by_its_images(tmp_path: Path) -> None:
    """All images of one category alike: only the other category can vary."""
    write_run(tmp_path / "a", {"mme": [1.0] * 8})
    write_run(tmp_path / "b", {"mme": [1.0] * 4 + [1.0, 0, 1, 1]}, "dart@2:0.3", tokens=30)
    cell = row(made(tmp_path), "dart@2:0.3").cells["mme"]
    assert cell.score == 200 + 125
    assert cell.comparison is not None
    assert (cell.comparison.units, cell.comparison.worse) == (4, 1)
    assert (cell.comparison.difference.low, cell.comparison.difference.high) == (-150, 0)
