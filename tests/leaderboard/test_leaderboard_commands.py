"""``lmms-prune leaderboard`` and ``gate`` as a user and a CI job call them."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner
from written import write_run

from lmms_prune.cli import app
from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.table import leaderboard
from lmms_prune.leaderboard.terminal import show
from lmms_prune.terminal.appearance import COLOURS, METHOD_APPEARANCE

# What the caller's terminal is must not matter.
PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "FORCE_COLOR": None, "TTY_COMPATIBLE": None, "COLUMNS": "80"}
HYBRID = "dart@2:0.44,random@20:0.07"


def call(*args: object):
    """A command on results that this file makes up, so nothing in them could be verified (test_verify.py has honest ones)."""
    unverified = ["--no-verify"] if args[0] == "gate" or "--strict" in args else []
    return CliRunner().invoke(app, [*map(str, args), *unverified], env=PLAIN)


def answers(right: int, many: int = 200) -> list[float]:
    return [1.0] * right + [0.0] * (many - right)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A pruned run that loses 6 of 160 right answers on GQA and 1 on TextVQA, and a blind one."""
    folder = tmp_path / "results"
    write_run(folder / "a", {"gqa": answers(160), "textvqa_val": answers(100)})
    write_run(folder / "b", {"gqa": answers(154), "textvqa_val": answers(99)}, HYBRID, tokens=33)
    write_run(folder / "c", {"gqa": answers(60), "textvqa_val": answers(20)}, "blind@0")
    return folder


def test_the_table(results: Path) -> None:
    done = call("leaderboard", results)
    assert done.exit_code == 0
    assert done.stderr == ""
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "schedule tokens TextVQA GQA Acc Rel" in lines
    assert "none 100 50.0 80.0 65.0 100.0" in lines
    # Six of 200 lost: p = 0.031, and twice that after Holm's correction for two benchmarks.
    assert "dart@2:0.44, 33 49.5 77.0▽ 63.2 97.6" in lines
    assert "blind@0 0 10.0▼ 30.0▼ 20.0 28.8" in lines
    assert "▲ and ▼ at a score" in " ".join(lines)
    assert "33 tokens (33 %)" in lines


@pytest.mark.parametrize("width", [24, 40, 1000])
def test_a_narrow_terminal_gets_the_columns_below_each_other_and_cuts_none(width: int, results: Path) -> None:
    stream = io.StringIO()
    show(leaderboard(read_results([results]), resamples=200), False, Console(file=stream, width=width))
    said = [line.split() for line in stream.getvalue().splitlines() if line.strip()]
    assert max(map(len, stream.getvalue().split("\n\n")[0].splitlines())) <= width
    headings = [line for line in said if line[0] == "schedule"]
    scores = [name for line in headings for name in line[1:]][:5]
    wide = width == 1000
    assert scores == ["tokens", *(("TextVQA", "GQA", "Acc", "Rel") if wide else ("Rel", "Acc", "TextVQA", "GQA"))]
    assert (len(headings) == 3) == (width == 1000)
    unpruned = [line[1:] for line in said if line[0] == "none"]
    assert [cell for line in unpruned for cell in line][:5] == [
        "100",
        *(("50.0", "80.0", "65.0", "100.0") if wide else ("100.0", "65.0", "50.0", "80.0")),
    ]


def test_without_a_baseline_no_table_is_empty(results: Path) -> None:
    done = call("leaderboard", results / "b")
    assert done.exit_code == 1
    assert "49.5" in done.stdout
    assert "confidence" not in done.stdout


def test_details_have_the_statistics_of_every_benchmark(results: Path) -> None:
    text = call("leaderboard", results, "--details", "--format", "markdown").stdout
    (line,) = [one for one in text.splitlines() if one.startswith("| `GQA` | 77.0 | -3.0 |")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # p of 6 flips in one direction, corrected for two benchmarks; 6 of 160 right answers lost.
    assert cells[4:9] == ["0.062", "6", "0", "200", "97.0"]
    assert cells[10] == f"{100 * 154 / 160:.1f}"
    assert cells[11] == f"{100 * (154 - 60) / (160 - 60):.1f}"


def test_csv_and_json_hold_the_same_numbers(results: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(call("leaderboard", results, "--format", "csv").stdout)))
    said = json.loads(call("leaderboard", results, "--format", "json").stdout)
    (model,) = said["models"]
    flat = {row["schedule"]: row for row in rows}
    nested = {row["label"]: row for budget in model["budgets"] for row in budget["rows"]}
    assert list(flat) == list(nested) == ["none", HYBRID, "blind@0"]
    for label, row in nested.items():
        assert float(flat[label]["gqa"]) == row["cells"]["gqa"]["score"]
        assert float(flat[label]["rel"]) == pytest.approx(row["rel"])
    one = nested[HYBRID]["cells"]["gqa"]["comparison"]
    assert float(flat[HYBRID]["gqa_difference_low"]) == one["difference"]["low"] < -1
    assert [flat[HYBRID][f"gqa_{name}"] for name in ("worse", "better", "units")] == ["6.0", "0.0", "200"]
    assert float(flat[HYBRID]["gqa_retention"]) == pytest.approx(100 * 154 / 160)
    (run,) = nested[HYBRID]["runs"]
    assert run["files"][0]["command"].startswith("lmms-eval --model llava_pruned --model_args pretrained=")
    assert (results / run["samples"]["gqa"]).is_file()


def test_latex_is_a_table_with_booktabs(results: Path) -> None:
    text = call("leaderboard", results, "--format", "latex").stdout
    assert r"dart@2:0.44,random@20:0.07 & 33 & 49.5 & 77.0 & 63.2 & 97.6 \\" in text
    assert r"\multicolumn{6}{l}{\textit{33 tokens (33 \%)}} \\" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 1


def test_columns_can_be_chosen(results: Path) -> None:
    done = call("leaderboard", results, "--benchmarks", "gqa")
    assert "TextVQA" not in done.stdout
    assert "96.2" in done.stdout  # Rel of GQA alone


def test_problems_are_named_after_the_table_and_fail(results: Path) -> None:
    cut = next((results / "c").rglob("*_results.json"))
    cut.write_text(cut.read_text()[:-50])
    done = call("leaderboard", results)
    assert done.exit_code == 1
    assert "97.6" in done.stdout
    assert f"lmms-prune: {cut}: incomplete JSON" in done.stderr


def test_strict_refuses_marked_rows_with_the_reason(results: Path) -> None:
    assert call("leaderboard", results, "--strict").exit_code == 0
    write_run(
        results / "d",
        {"gqa": answers(150), "textvqa_val": answers(90)},
        "vtw@2",
        tokens=5,
        facts={"attention": "eager"},
    )
    assert call("leaderboard", results).exit_code == 0
    done = call("leaderboard", results, "--strict")
    assert done.exit_code == 1
    assert "--strict: tiny-llava, vtw@2: attention: eager; its baseline: sdpa." in done.stderr


def test_the_published_tables() -> None:
    done = call("leaderboard", "--published")
    assert done.exit_code == 0
    assert "Table 1 of arXiv 2512.07580" in done.stdout
    assert "Table 2 of arXiv 2512.07580" in done.stdout
    assert done.stdout.count("The paper prints a Rel of") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["leaderboard"], "give lmms-eval's result folders"),
        (["leaderboard", "x", "--format", "markdwon"], "Did you mean 'markdown'?"),
        (["leaderboard", "x", "--benchmarks", "charts"], "--benchmarks charts: unknown benchmark. Use one of MME"),
        (["gate", "x"], "say what must hold"),
        (["gate", "x", "--max-drop", "gqa"], "write BENCHMARK=POINTS"),
        (["gate", "x", "--max-drop", "foo=2"], "--max-drop foo: unknown benchmark"),
        (["gate", "x", "--min-rel", "inf"], "--min-rel inf: it is a share of the unpruned scores in percent, above 1"),
        (["gate", "x", "--min-rel", "nan"], "--min-rel nan: it is a share"),
        (["gate", "x", "--min-rel", "-3"], "--min-rel -3: it is a share"),
        (["gate", "x", "--min-rel", "201"], "at most 200, such as 95; 0 for none"),
        (["gate", "x", "--min-rel", "0.95"], "--min-rel 0.95: percent: 95?"),
        (["gate", "x", "--min-rel", "1"], "--min-rel 1: percent: 100?"),
        (["gate", "x", "--min-rel", "95%"], "--min-rel 95%: write a share"),
        (["gate", "x", "--max-drop", "gqa=inf"], "points are a number from 0 on and below 100"),
        (["gate", "x", "--max-drop", "mme=2800"], "points are a number from 0 on and below 2800"),
        (["gate", "x", "--max-drop", "gqa=nan"], "--max-drop gqa=nan: points are a number from 0 on"),
        (["gate", "x", "--max-drop", "gqa=-2"], "--max-drop gqa=-2: points are a number from 0 on"),
        (["gate", "x", "--max-drop", "gqa=2", "--max-drop", "GQA=3"], "a benchmark is there twice"),
        (["leaderboard", "x", "--out", "."], "--out .: this is a folder"),
        (["leaderboard", "--published", "--benchmarks", "gqa"], "or --published alone"),
        (["gate", "x", "--min-rel", "9", "--schedule", "fastvv@2:0.4"], "Did you mean 'fastv'?"),
    ],
)
def test_wrong_options_exit_with_2_and_one_message(args: list[str], message: str) -> None:
    done = call(*args)
    assert done.exit_code == 2
    assert message in done.stderr


def test_the_gate_passes_and_says_what_it_held(results: Path) -> None:
    done = call("gate", results, "--min-rel", "95", "--max-drop", "gqa=3.5", "--max-drop", "textvqa=1")
    assert done.exit_code == 0, done.stdout
    assert done.stdout.startswith("## lmms-prune gate: passed\n\n0 of 1 judged rows failed.")
    assert "Compared with tiny-llava: `none`." in done.stdout
    assert f"| `{HYBRID}` | tiny-llava | Rel | at least 95 | 97.6 |" in done.stdout
    assert "GQA, drop | at most 3.5 | 3.0 |" in done.stdout
    assert "blind@0" not in done.stdout


def test_the_gate_fails_with_the_reasons(results: Path) -> None:
    done = call("gate", results, "--min-rel", "98", "--max-drop", "gqa=2.5", "--max-drop", "pope=1")
    assert done.exit_code == 1
    assert "## lmms-prune gate: failed" in done.stdout
    reason = "Rel 97.6, at least 98; GQA, drop 3.0, at most 2.5; POPE, drop unknown, at most 1."
    assert f"* FAIL: tiny-llava, `{HYBRID}`: {reason}" in done.stdout


def test_what_is_not_distinguishable_fails_unless_significance_is_asked_for(tmp_path: Path) -> None:
    """Four right answers lost and three gained: a drop of 0.5 that may well be chance."""
    before, after = np.array(answers(160)), np.array(answers(160))
    after[:4], after[-3:] = 0, 1
    write_run(tmp_path / "a", {"gqa": before.tolist()})
    write_run(tmp_path / "b", {"gqa": after.tolist()}, HYBRID, tokens=33)
    plain = call("gate", tmp_path, "--max-drop", "gqa=0.4")
    assert plain.exit_code == 1
    assert "FAIL | not distinguishable from no loss |" in plain.stdout
    done = call("gate", tmp_path, "--max-drop", "gqa=0.4", "--significant")
    assert done.exit_code == 0
    assert "ok | not distinguishable from no loss |" in done.stdout
    after[:40] = 0
    write_run(tmp_path / "b", {"gqa": after.tolist()}, HYBRID, tokens=33)
    assert call("gate", tmp_path, "--max-drop", "gqa=0.4", "--significant").exit_code == 1


def test_the_gate_and_the_table_agree_on_what_is_real(tmp_path: Path) -> None:
    """Seven answers lost and none gained: p = 0.016 alone, 0.047 of three benchmarks, 0.0625 of four."""
    lost = [0.0] * 7 + [1.0] * 93
    tasks = ["gqa", "textvqa_val", "scienceqa_img", "docvqa_val"]
    for count, real in ((1, True), (3, True), (4, False)):
        same = {task: [1.0] * 100 for task in tasks[:count]}
        folder = tmp_path / f"{count}"
        write_run(folder / "a", same)
        write_run(folder / "b", {**same, "gqa": lost}, HYBRID, tokens=33)
        board = json.loads(call("leaderboard", folder, "--format", "json").stdout)
        [comparison] = [
            row["cells"]["gqa"]["comparison"]
            for budget in board["models"][0]["budgets"]
            for row in budget["rows"]
            if row["label"] == HYBRID
        ]
        assert comparison["difference"]["high"] < 0
        assert (comparison["verdict"] == "worse than unpruned") == real
        done = call("gate", folder, "--max-drop", "gqa=1", "--significant")
        assert done.exit_code == int(real), done.stdout
        assert ("not distinguishable from no loss" in done.stdout) != real


def test_the_gate_says_on_what_the_baseline_was_not_evaluated(tmp_path: Path) -> None:
    """A loss on it would else be passed over without a word."""
    write_run(tmp_path / "a", {"gqa": answers(160)})
    write_run(tmp_path / "b", {"gqa": answers(160), "textvqa_val": answers(0)}, HYBRID, tokens=33)
    alone = "its baseline was not evaluated on TextVQA: not in Rel"
    done = call("gate", tmp_path, "--min-rel", "99")
    assert f"* Note: tiny-llava, `{HYBRID}`: {alone}." in done.stdout
    assert call("gate", tmp_path, "--min-rel", "99", "--strict").exit_code == 1
    assert alone not in call("leaderboard", tmp_path, "--format", "csv", "--benchmarks", "GQA").stdout


def test_the_gate_says_what_rel_does_not_count(tmp_path: Path) -> None:
    write_run(tmp_path / "a", {"gqa": answers(160), "textvqa_val": answers(0)})
    write_run(tmp_path / "b", {"gqa": answers(160), "textvqa_val": answers(0)}, HYBRID, tokens=33)
    done = call("gate", tmp_path, "--min-rel", "99")
    assert done.exit_code == 0
    assert f"* Note: tiny-llava, `{HYBRID}`: its baseline scores 0 on TextVQA: not in Rel." in done.stdout
    assert "not in Rel" not in call("gate", tmp_path, "--max-drop", "gqa=1").stdout


def test_a_control_is_judged_only_when_it_is_named(results: Path) -> None:
    done = call("gate", results, "--min-rel", "95", "--schedule", "blind@0")
    assert done.exit_code == 1
    assert "* FAIL: tiny-llava, `blind@0`: Rel 28.8, at least 95." in done.stdout
    done = call("gate", results, "--min-rel", "10", "--schedule", "vtw@3")
    assert done.exit_code == 1
    assert "--schedule vtw@3: no such row" in done.stdout
    assert "name one with --schedule" not in done.stdout
    done = call("gate", results / "c", results / "a", "--min-rel", "10")
    assert done.exit_code == 1
    assert "there is no row to judge" in done.stdout


def test_the_gate_fails_where_something_could_not_be_read_or_compared(results: Path, tmp_path: Path) -> None:
    done = call("gate", results, tmp_path / "nowhere", "--min-rel", "10")
    assert done.exit_code == 1
    assert "* FAIL: nowhere: no such file or folder." in done.stdout
    assert f"lmms-prune: {tmp_path / 'nowhere'}: no such file or folder." in done.stderr
    done = call("gate", results / "b", "--min-rel", "10")
    assert done.exit_code == 1
    assert "no unpruned run" in done.stdout
    assert "Rel unknown" in done.stdout


# What is valid JSON and still no results: the file of a run that was there, after something has written over it.
DAMAGED = {
    "list": lambda said: [1, 2],
    "nothing": lambda said: {},
    "null": lambda said: None,
    "number": lambda said: 5,
    "text": lambda said: "done",
    "results alone": lambda said: {"results": []},
    "results of no task": lambda said: {**said, "results": {}},
    "results a list": lambda said: {**said, "results": ["gqa"]},
    "a task less": lambda said: {**said, "results": {"gqa": said["results"]["gqa"]}},
    "config a text": lambda said: {**said, "config": "llava_pruned"},
    "no record": lambda said: {**said, "config": {**said["config"], "batch_sizes": []}},
    "no checkpoint": lambda said: json.loads(json.dumps(said).replace('"pretrained":', '"pre":', 1)),
}


@pytest.mark.parametrize("samples", [True, False])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_row_whose_file_is_damaged_is_named_and_fails_the_gate(tmp_path: Path, damage: str, samples: bool) -> None:
    """Without a word, the row that breaks the limit would be gone, and the gate would pass on what is left."""
    tasks = {"gqa": answers(160), "textvqa_val": answers(100)}
    write_run(tmp_path / "a", tasks)
    write_run(tmp_path / "b", tasks, HYBRID, tokens=33)
    worse = {"gqa": answers(60), "textvqa_val": answers(20)}
    path = write_run(tmp_path / "c", worse, "fastv@2:0.3", tokens=30, samples=samples)
    gate = ("gate", tmp_path, "--min-rel", "81", "--resamples", "200")
    assert call(*gate).exit_code == 1
    path.write_text(json.dumps(DAMAGED[damage](json.loads(path.read_text()))))
    done = call(*gate)
    assert done.exit_code == 1
    assert "* FAIL: tiny-llava" not in done.stdout  # all that is left passes
    assert f"{path.name}: damaged: " in done.stdout
    for one in (done, call("leaderboard", tmp_path)):
        assert one.exit_code == 1
        assert f"lmms-prune: {path}: damaged: " in one.stderr


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    said = json.loads(path.read_text())
    change(said)
    path.write_text(json.dumps(said))


def score_all(value: object) -> Callable[[dict[str, Any]], object]:
    """Each metric of each task that the harness scored."""

    def change(said: dict[str, Any]) -> None:
        for task in said["results"].values():
            task |= {name: value for name, was in task.items() if name.endswith(",none") and was is not None}

    return change


TASKS = {"gqa": answers(60), "pope": answers(60), "mme": answers(60), "mmbench_en_dev_static": answers(60)}
TASKS |= {"docvqa_val": answers(60), "ocrbench": answers(60), "textvqa_val": answers(60)}
# What may stand in a results file beside samples that tell otherwise, and what is said of it.
UNTRUE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "ones": (score_all(1.0), "the samples give another score: "),
    "a digit": (score_all(0.6), "the samples give another score: "),
    "beyond the scale": (score_all(2900.0), "a score that the benchmark cannot have: "),
    "beyond all bounds": (score_all(1e308), "a score that the benchmark cannot have: "),
    "negative": (score_all(-0.5), "is -0.5, where the least is 0"),
    "infinite": (score_all(float("inf")), "is inf, which is no finite number"),
    "no number": (score_all(float("nan")), "is nan, which is no finite number"),
    "a text": (score_all("1.0"), "is '1.0', which is no finite number"),
    "true": (score_all(True), "is True, which is no finite number"),
    "nothing": (score_all(None), "no score, though there are samples: "),
    "fewer documents": (
        lambda said: said["n-samples"]["gqa"].update(effective=150),
        "more samples than documents: GQA",
    ),
    "more documents": (lambda said: said["n-samples"]["gqa"].update(effective=250), "samples are missing: GQA"),
}


@pytest.mark.parametrize("which", ["row", "baseline"])
@pytest.mark.parametrize("untrue", UNTRUE)
def test_scores_that_the_samples_contradict_fail_the_gate_and_are_marked(
    tmp_path: Path, untrue: str, which: str
) -> None:
    """Also where it is the baseline that is too low, or that has none."""
    paths = {"baseline": write_run(tmp_path / "a", TASKS), "row": write_run(tmp_path / "b", TASKS, HYBRID, tokens=33)}
    gate = ("gate", tmp_path, "--min-rel", "81", "--resamples", "200")
    assert call(*gate).exit_code == 0
    change, message = UNTRUE[untrue]
    rewrite(paths[which], change)
    done = call(*gate)
    assert done.exit_code == 1, done.stdout
    (line,) = [text for text in done.stdout.splitlines() if "| scores |" in text]
    assert re.search(r"\| no contradictions \| \d contradictions? \|  \| FAIL \|", line)
    assert message in line
    assert ("its baseline: " in line) == (which == "baseline")
    table = call("leaderboard", tmp_path, "--format", "markdown")
    assert message in table.stdout
    assert "inf" not in table.stdout.replace("infinite", "").replace("is inf,", "")


def test_each_benchmark_is_held_to_its_samples(tmp_path: Path) -> None:
    write_run(tmp_path / "a", TASKS)
    path = write_run(tmp_path / "b", TASKS, HYBRID, tokens=33)
    for task in TASKS:
        before = path.read_text()
        rewrite(
            path,
            lambda said, task=task: said["results"][task].update(
                dict.fromkeys(
                    (name for name, was in said["results"][task].items() if name.endswith(",none") and was is not None),
                    0.07,
                )
            ),
        )
        done = call("gate", tmp_path, "--min-rel", "1.5", "--resamples", "200")
        assert done.exit_code == 1, task
        assert f"the samples give another score: {named(task)}" in done.stdout
        path.write_text(before)


def named(task: str) -> str:
    from lmms_prune.leaderboard.benchmarks import TASKS

    return TASKS[task].name


def test_what_a_judge_scored_is_a_mark_and_no_fault(tmp_path: Path) -> None:
    """The rules that samples are read by are not all that decides there."""
    task = {"mmbench_en_dev": answers(60)}
    write_run(tmp_path / "a", task)
    write_run(tmp_path / "b", task, HYBRID, tokens=33, mmbench_en_dev=31.0)
    done = call("gate", tmp_path, "--min-rel", "81")
    assert done.exit_code == 0, done.stdout
    assert "the samples give another score: MMB (30.00 instead of 31.00)" in done.stdout
    assert call("gate", tmp_path, "--min-rel", "81", "--strict").exit_code == 1


def test_a_row_whose_file_is_gone_is_named_by_its_samples(results: Path) -> None:
    path = next((results / "b").rglob("*_results.json"))
    path.unlink()
    done = call("gate", results, "--min-rel", "50", "--schedule", "blind@0")
    assert done.exit_code == 1
    assert f"{path}: gone, though 20260101_000000_samples_gqa.jsonl stands beside." in done.stderr


def test_what_others_call_results_is_left_alone(results: Path) -> None:
    """lmms-eval's own details of a task, in whatever state, and somebody's summary; but not once it was named as results."""
    for name, text in (("submissions/mmbench_en_dev_results.json", "{"), ("my_results.json", '{"overall_acc": 0.5}')):
        path = results / "a" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert call("leaderboard", results).exit_code == 0
    done = call("leaderboard", results, results / "a" / "my_results.json")
    assert done.exit_code == 1
    assert "my_results.json: damaged: lmms-eval writes a mapping with 'config' and 'results'" in done.stderr


def test_the_gate_compares_with_a_run_of_the_same_schedule_before_a_change(results: Path, tmp_path: Path) -> None:
    write_run(
        tmp_path / "new" / "b",
        {"gqa": answers(154), "textvqa_val": answers(80)},
        HYBRID,
        tokens=33,
        facts={"code": "new"},
    )
    gate = ("gate", tmp_path / "new", "--baseline", results / "b", "--max-drop", "textvqa=2")
    done = call(*gate)
    assert done.exit_code == 1
    assert "TextVQA, drop 9.5, at most 2" in done.stdout
    assert f"Compared with tiny-llava: `{HYBRID} (run=--baseline)`." in done.stdout
    assert "Note: tiny-llava" in done.stdout
    strict = call(*gate, "--strict")
    assert "comparable | no marks | 1 mark |  | FAIL | code: new; its baseline: 0123456789ab" in strict.stdout


def test_title_and_submitters_stand_on_the_page(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    words = [
        "--title",
        "Board </script> of <b>ours</b>",
        "--submitter",
        "The group",
        "--submitter",
        f"{results / 'b'}=A guest",
    ]
    assert call("leaderboard", results, "--format", "html", "--out", page, "--resamples", 200, *words).exit_code == 0
    text = page.read_text(encoding="utf-8")
    assert "<title>Board &lt;/script&gt; of &lt;b&gt;ours&lt;/b&gt;</title>" in text
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    said = json.loads(data)
    assert (said["submitters"], said["first"], said["latest"]) == (["A guest", "The group"], "2026-01-01", "2026-01-01")
    who = {row["schedule"]: (row["submitters"], row["date"]) for row in said["models"][0]["rows"]}
    assert who == {
        "none": (["The group"], "2026-01-01"),
        HYBRID: (["A guest"], "2026-01-01"),
        "blind@0": (["The group"], "2026-01-01"),
    }
    looks = said["looks"]
    assert {name: tuple(look) for name, look in looks["methods"].items()} == {
        name: (METHOD_APPEARANCE[name].colour, METHOD_APPEARANCE[name].marker)
        for name in ("none", "dart", "random", "blind")
    }
    assert looks["colours"] == COLOURS


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--title", "x"], "--title belongs to the page: --format html, not table"),
        (["--submitter", "x"], "--submitter belongs to the page"),
        (["--format", "html", "--submitter", "elsewhere=x"], "none of the results is below elsewhere"),
        (["--format", "html", "--submitter", "a="], "write NAME, or FOLDER=NAME"),
        (["--format", "html", "--submitter", " "], "write NAME, or FOLDER=NAME"),
    ],
)
def test_what_no_page_can_show_is_refused(words: list[str], message: str, results: Path) -> None:
    done = call("leaderboard", results, *words)
    assert done.exit_code != 0
    assert message in " ".join(done.stderr.split())
