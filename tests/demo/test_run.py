"""The demo as a newcomer runs it: trained models, real lmms-eval processes, and a table."""

from __future__ import annotations

import json
import shutil
import subprocess
from io import StringIO
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from forking import Forking
from rich.console import Console
from typer.testing import CliRunner

from lmms_prune.cli import app
from lmms_prune.demo import questions
from lmms_prune.demo.benchmarks import TASKS, build_mirror, damaged_files, drawn_by
from lmms_prune.demo.models import FILES, MODELS, DemoCheckpoint, DemoError, sizes, weights
from lmms_prune.demo.proposals import proposals
from lmms_prune.demo.run import (
    CALIBRATED,
    FULL,
    PAPER_DEPTH,
    QUICK,
    QUICK_ROWS,
    DemoRow,
    run_demo,
    tables,
    task_names,
)
from lmms_prune.errors import ScheduleError
from lmms_prune.leaderboard.benchmarks import TASKS as BENCHMARKS
from lmms_prune.leaderboard.benchmarks import rel
from lmms_prune.schedule import PromptSizes


def scores(value: float) -> dict[str, float]:
    return {task: value for task in TASKS}


def run(schedule: str, value: float, model: str = MODELS[0].family.model_name, role: str = "") -> dict[str, Any]:
    averages = {"avg_visual_tokens": 72.4}
    about = {"model": model, "schedule": schedule, "role": role}
    return {**about, "scores": scores(value), "averages": averages}


def test_every_schedule_of_the_demo_fits_its_models() -> None:
    layers, tokens = sizes().layers, sizes().tokens_per_image
    for model, anyrow in product(MODELS, (*QUICK, *FULL)):
        row = anyrow.for_model(model)
        read = row.schedule
        if row.budget is not None:
            read = read.solve(row.budget, PromptSizes(layers, tokens))
            # DART keeps multiples of 8, and pooling whole rows and columns.
            share = float(read.avg_visual_tokens(layers, [tokens])) / tokens
            assert float(row.budget.amount) - 0.04 < share <= row.budget.amount
        read.check(layers, [tokens])
        assert DemoRow.checked(str(row)) == row
    for model in MODELS:
        assert len({row.for_model(model) for row in FULL}) == len(FULL)


def test_the_line_under_the_table_says_what_calibration_is_worth() -> None:
    """Without one of the two rows, or without the unpruned run, there is no line."""
    rows = [
        run("none", 80.0),
        run("divprune@1:?,random@8:0.03,budget=0.25", 20.0, role=PAPER_DEPTH),
        run("divprune@0:0.27,random@11:0.05", 76.0, role=CALIBRATED),
    ]
    [table] = tables({"runs": rows}, TASKS)
    assert (
        "at budget 0.25 a hybrid keeps 25 % at the paper's depth, and 95 % as `calibrate` proposes it" in table.caption
    )
    assert "The horizon must be measured: random starts at layer 11 here, not at 8." in table.caption
    stream = StringIO()
    Console(file=stream, width=80).print(table)
    assert [line.split()[0] for line in stream.getvalue().splitlines() if "(calibrated)" in line] == ["(calibrated)"]
    for part in (rows[1:], rows[:2], rows[:1]):
        assert tables({"runs": part}, TASKS)[0].caption == ""


def test_the_table_fits_a_narrow_terminal_and_tells_models_apart() -> None:
    record = {
        "runs": [
            run("none", 80.0),
            run("dart@1:?,random@8:0.03,budget=0.25", 40.0),
            run("none", 9.0, MODELS[1].family.model_name),
        ]
    }
    model_tables = tables(record, TASKS)
    assert [table.title for table in model_tables] == [model.folder for model in MODELS]
    stream = StringIO()
    Console(file=stream, width=80).print(model_tables[0])
    text = stream.getvalue()
    for name in ("tokens", "kept", *(BENCHMARKS[task].narrow for task in TASKS), "50"):
        assert name in text
    assert [line.split()[0] for line in text.splitlines()[-4:-1]] == ["dart@1:?", "random@8:0.03", "budget=0.25"]
    assert "…" not in text


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.folder)
def test_a_missing_file_of_a_model_is_named(model: DemoCheckpoint, tmp_path: Path) -> None:
    whole = weights(model)
    assert sorted(file.name for file in whole.iterdir()) == sorted(FILES)
    for name in FILES:
        root = tmp_path / name
        shutil.copytree(whole, root / model.folder)
        (root / model.folder / name).unlink()
        with pytest.raises(DemoError, match=f"lacks .*{name}: install lmms-prune again"):
            weights(model, root)


def test_weights_that_end_too_early_are_named(tmp_path: Path) -> None:
    folder = tmp_path / MODELS[0].folder
    shutil.copytree(weights(MODELS[0]), folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(DemoError, match=f"damaged weights, {file}.*install lmms-prune again"):
        weights(MODELS[0], tmp_path)


@pytest.mark.parametrize(("text", "message"), [("mme,foo", "'foo' is not in the demo"), (",", "',' names no task")])
def test_a_wrong_task_is_named(text: str, message: str) -> None:
    with pytest.raises(DemoError, match=message):
        task_names(text)


def test_tasks_are_read_with_stray_commas_and_spaces() -> None:
    assert task_names(" pope, mme,") == ["pope", "mme"]
    assert task_names(None) == list(TASKS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("random@1:?", "needs a budget"),
        ("random@1:0.5,budget=0.5", "exactly one '\\?'"),
        ("random@1:?,budget=2", "budget"),
        ("random@12:?,budget=0.5", "layer"),
    ],
)
def test_a_row_that_cannot_run_is_refused(text: str, message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        DemoRow.checked(text)


def test_a_folder_with_a_comma_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(DemoError, match="cannot take a comma"):
        run_demo(tmp_path / "a,b", QUICK, 4, ["pope"], {}, Console(quiet=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b"")])
def test_damaged_data_is_named(damage: Any, tmp_path: Path) -> None:
    mirror = build_mirror(tmp_path / f"mirror-4-{drawn_by()}", rows=4)
    assert not list(damaged_files(mirror))
    file = next((mirror / "lmms-lab-encoder" / "POPE").rglob("*.parquet"))
    damage(file)
    with pytest.raises(DemoError, match=f"{file}. Delete {mirror} to have it drawn again"):
        run_demo(tmp_path, QUICK, 4, ["pope"], {}, Console(quiet=True))


def test_data_drawn_by_other_code_is_not_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = drawn_by()
    changed = tmp_path / "questions.py"
    changed.write_text(Path(questions.__file__).read_text(encoding="utf-8") + "\n", encoding="utf-8")
    monkeypatch.setattr(questions, "__file__", str(changed))
    assert drawn_by() != now


# The trained models' scores on the quick demo's held-out questions, minus a margin for other machines' rounding.
FLOORS: dict[str, dict[str, float]] = {
    "llava_pruned": {
        **{"mme": 1250, "scienceqa_img": 75, "pope": 90, "textvqa_val": 75, "mmbench_en_dev_static": 60},
        **{"mmbench_cn_dev_static": 80, "gqa": 85, "infovqa_val": 90, "docvqa_val": 85, "ocrbench": 85},
    },
    "qwen2_5_vl_pruned": {
        **{"mme": 1100, "scienceqa_img": 75, "pope": 80, "textvqa_val": 60, "mmbench_en_dev_static": 45},
        **{"mmbench_cn_dev_static": 55, "gqa": 80, "infovqa_val": 90, "docvqa_val": 85, "ocrbench": 85},
    },
}
# What a hybrid that keeps half of the tokens may cost, in points: of what needs few tokens little. GQA's questions for
# a place cost the most of these. What reads costs tiny-llava a lot, and tiny-qwen2.5-vl, which needs the image for it up
# to its last layer, up to all: no distance would say anything there.
COSTS: dict[str, dict[str, float]] = {
    "llava_pruned": {
        **{"mme": 250, "scienceqa_img": 20, "pope": 20, "textvqa_val": 75, "mmbench_en_dev_static": 25},
        **{"mmbench_cn_dev_static": 25, "gqa": 35, "infovqa_val": 30, "docvqa_val": 50, "ocrbench": 75},
    },
    "qwen2_5_vl_pruned": {
        **{"mme": 300, "scienceqa_img": 20, "pope": 20, "mmbench_en_dev_static": 25, "mmbench_cn_dev_static": 25},
        "gqa": 35,
    },
}
# The least loss without the image: reading scores nothing then, and yes/no questions and options what guessing scores.
LESS = {task: 150 if task == "mme" else 30 for task in TASKS}
BLIND = {
    **{"textvqa_val": 10, "infovqa_val": 20, "docvqa_val": 20, "ocrbench": 10, "mme": 1050, "scienceqa_img": 60},
    **{"mmbench_en_dev_static": 35, "mmbench_cn_dev_static": 25, "gqa": 65, "pope": 67},
}


# The command with forked evaluation processes. .ci/run runs it with real processes, from the built package.
QUICK_DEMO = """
import sys
from lmms_prune.cli import app
from lmms_prune.demo import processes
program = sys.argv.pop(1)
processes._program = lambda: program
app()
"""


def quick(folder: Path, forking: Forking) -> dict[str, Any]:
    """The output of `lmms-prune demo --quick`, in which every run succeeded."""
    script = folder / "quick_demo.py"
    script.write_text(QUICK_DEMO, encoding="utf-8")
    program = str(forking.stand_ins / "lmms-eval")
    command = [*forking.prefix, str(script), program, "demo", "--out", str(folder), "--json", "--quick"]
    environment = forking.environment
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert not record["failures"]
    return record


@pytest.mark.slow
def test_the_quick_demo(forking: Forking, tmp_path: Path) -> None:
    """Both models reach their floors; keeping all tokens changes nothing, half of them little, no image very much."""
    record = quick(tmp_path, forking)
    for model in MODELS:
        runs = {run["schedule"]: run for run in record["runs"] if run["model"] == model.family.model_name}
        rows = [row.for_model(model) for row in QUICK]
        assert list(runs) == list(map(str, rows))
        whole = runs["none"]
        for task, floor in FLOORS[model.family.model_name].items():
            assert whole["scores"][task] >= floor, (model.folder, task)
        assert runs["random@1:1"]["scores"] == whole["scores"]
        half = runs[str(next(row for row in rows if str(row.budget) == "0.5"))]
        paper, own = (runs[str(next(row for row in rows if row.role == role))] for role in (PAPER_DEPTH, CALIBRATED))
        # Where the horizon was measured, a quarter of the tokens keeps what the paper's depth loses.
        kept = {row["role"]: rel(row["scores"], whole["scores"]) for row in (paper, own)}
        assert kept[CALIBRATED] > max(85, kept[PAPER_DEPTH] + 5), (model.folder, kept)
        for task, cost in COSTS[model.family.model_name].items():
            assert half["scores"][task] >= whole["scores"][task] - cost, (model.folder, task)
        for task, most in BLIND.items():
            assert runs["blind@0"]["scores"][task] <= most, (model.folder, task)
            assert runs["blind@0"]["scores"][task] <= whole["scores"][task] - LESS[task], (model.folder, task)
        for row in rows:
            if row.budget is not None or row.role == CALIBRATED:
                budget = float(str(row.budget or proposals()[model.folder].budget))
                share = runs[str(row)]["averages"]["avg_visual_tokens"] / whole["averages"]["original_visual_tokens"]
                assert share == pytest.approx(budget, abs=0.05)
    assert f"schedule={QUICK[2]}," in record["command"]
    _the_leaderboard_agrees(tmp_path / f"results-{QUICK_ROWS}", record)


def _the_leaderboard_agrees(results: Path, record: dict[str, Any]) -> None:
    """The leaderboard reads the same scores from the results, the samples confirm them, and no row is flagged."""
    done = CliRunner().invoke(app, ["leaderboard", str(results), "--format", "json"])
    assert done.exit_code == 0, done.output
    board = {model["title"]: model for model in json.loads(done.stdout)["models"]}
    for model in MODELS:
        rows = {row["label"]: row for budget in board[model.folder]["budgets"] for row in budget["rows"]}
        runs = [run for run in record["runs"] if run["model"] == model.family.model_name]
        assert len(rows) == len(runs)
        for run in runs:
            row = rows[run["solved"]]
            assert {task: cell["score"] for task, cell in row["cells"].items()} == pytest.approx(run["scores"])
            assert row["cost"]["avg_visual_tokens"] == pytest.approx(run["averages"]["avg_visual_tokens"])
            # The tests may run on uncommitted code.
            assert [mark for mark in row["marks"] if "not committed" not in mark] == []


@pytest.mark.slow
def test_a_refused_schedule_does_not_end_the_other_models_run(
    forking: Forking, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ToMe inside the vision encoder needs CLIP: LLaVA runs it, Qwen2.5-VL refuses."""
    monkeypatch.setattr("lmms_prune.demo.processes._program", lambda: str(forking.stand_ins / "lmms-eval"))
    schedule = "tome@0:0.5;place=encoder"
    monkeypatch.setenv("HF_TOKEN", "hf_SECRET")  # which lmms-eval prints
    options = ["--out", str(tmp_path), "--json", "--quick", "--tasks", "pope", "--schedule", schedule]
    done = CliRunner().invoke(app, ["demo", *options])
    assert done.exit_code == 1
    record = json.loads(done.stdout.splitlines()[-1])
    # With the unpruned run and random at the same tokens, by which a schedule is judged.
    ran = {(run["model"], run["role"] or run["schedule"]) for run in record["runs"]}
    others = {(model.family.model_name, what) for model in MODELS for what in ("none", "the control")}
    assert ran == {("llava_pruned", schedule), *others}
    (failure,) = record["failures"]
    assert (failure["model"], failure["schedule"]) == ("qwen2_5_vl_pruned", schedule)
    assert "place=encoder merges inside CLIP's blocks" in failure["error"]
    assert failure["error"] in done.stderr
    # Of two processes, and of the refused run's second try.
    logs = [path.read_text(encoding="utf-8") for pattern in ("*.log", "log.txt") for path in tmp_path.rglob(pattern)]
    assert len(logs) >= 3
    assert all("'token': '[REDACTED]'" in log for log in logs)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_SECRET" in path.read_bytes()]
