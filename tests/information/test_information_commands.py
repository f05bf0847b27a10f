"""``lmms-prune information``, ``horizon``, ``calibrate`` and ``show`` as a user calls them."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from forking import Forking
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from lmms_prune.cli import app
from lmms_prune.demo.run import MODELS, weights
from lmms_prune.harness.documents import Document
from lmms_prune.information.commands import _tables
from lmms_prune.information.plots import draw_layers
from lmms_prune.schedule import Schedule

LLAVA, QWEN = MODELS
DEPTH = 12


def model_options(model: Any) -> list[str]:
    return ["--model", str(weights(model)), "--model-args", f"device=cpu,dtype=float32,{model.arguments}"]


@pytest.fixture
def run(data: Path, forking: Forking) -> Callable[..., str]:
    """A command as a process, in the folder of the data; returns its standard output, or its error where it fails."""

    def call(*command: str, code: int = 0) -> str:
        done = forking.run(*command, cwd=data)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stderr if code else done.stdout

    return call


@pytest.mark.slow
def test_the_horizon_of_a_task(run: Callable[..., str], forking: Forking, tmp_path: Path) -> None:
    """The command measures, evaluates with lmms-eval and plots; a second call reuses everything and prints the same."""
    command = [
        "lmms-prune",
        "horizon",
        *model_options(LLAVA),
        "--tasks",
        "pope",
        "--limit",
        "4",
        "--out",
        str(tmp_path),
    ]
    command += ["--methods", "random,information", "--keeps", "0.25", "--json", "--launch", forking.launch]
    printed = json.loads(run(*command).strip().splitlines()[-1])
    [task] = printed["tasks"]
    assert printed["depth"] == DEPTH
    assert 0 <= task["low"] <= task["layer"] <= task["high"] <= DEPTH
    assert task["layer"] == max(task["by_accuracy"], task["by_information"])
    table = (tmp_path / "horizon-pope.csv").read_text().splitlines()
    assert len(table) == 1 + DEPTH
    alone = (tmp_path / "methods-pope.csv").read_text()
    assert (alone.count("random,"), alone.count("information (oracle),")) == (DEPTH, DEPTH)
    assert alone.splitlines()[0] == "method,layer,keep,score,low,high"
    assert table[0].startswith("layer,score,full,score_low,score_high")
    for name in ("horizon-pope", "methods-pope"):
        assert np.asarray(Image.open(tmp_path / f"{name}.png")).std() > 10
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*_results.json")}
    assert len(files) == 3 * DEPTH + 1
    assert json.loads(run(*command).strip().splitlines()[-1]) == printed
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*_results.json")} == files


@pytest.mark.slow
def test_auto_is_the_schedule_of_a_calibration(run: Callable[..., str], forking: Forking, tmp_path: Path) -> None:
    """The best schedule meets the budget, and runs under lmms-eval as `auto` and from the written YAML."""
    out = tmp_path / "calibration"
    scarce = ["lmms-prune", "calibrate", *model_options(QWEN), "--tasks", "pope", "--budget", "0.5", "--limit", "5"]
    assert "pope has 8 documents, 10 are needed: half to choose on" in run(*scarce, "--out", str(out), code=2)
    assert not out.exists()
    command = [
        "lmms-prune",
        "calibrate",
        *model_options(QWEN),
        "--tasks",
        "pope",
        "--budget",
        "0.5",
        "--methods",
        "dart",
    ]
    command += ["--compare", "random@1:?", "--limit", "2", "--out", str(out), "--json"]
    command += ["--launch", forking.launch]
    printed = json.loads(run(*command).strip().splitlines()[-1])
    best = Schedule.parse(printed["schedule"])
    assert best.avg_visual_tokens(DEPTH, [10_000]) <= 5000
    assert printed["tried"][printed["schedule"]]["value"] == min(loss["value"] for loss in printed["tried"].values())
    assert printed["verified"]["low"] <= printed["verified"]["value"] <= printed["verified"]["high"]
    [(fixed, loss)] = printed["compared"].items()
    assert 4900 <= Schedule.parse(fixed).avg_visual_tokens(DEPTH, [10_000]) <= 5000
    assert loss["low"] <= loss["value"] <= loss["high"]
    run("lmms-prune", "check", printed["yaml"])
    [_, checkpoint, _, arguments] = model_options(QWEN)
    auto = f"pretrained={checkpoint},{arguments},schedule=auto,budget=0.5"
    run(
        *("lmms-eval", "--model", QWEN.family.model_name, "--model_args", auto, "--tasks", "pope", "--limit", "2"),
        *("--output_path", str(tmp_path / "auto")),
    )
    [results] = [path for path in (tmp_path / "auto").rglob("*_results.json")]
    recorded = json.loads(results.read_text())["config"]["batch_sizes"][0]
    assert recorded["schedule"] == printed["schedule"]


@pytest.mark.slow
def test_information_of_a_task(run: Callable[..., str], tmp_path: Path) -> None:
    command = [
        "lmms-prune",
        "information",
        *model_options(QWEN),
        "--tasks",
        "docvqa_val,mmbench_cn_dev_static",
        "--limit",
        "2",
    ]
    command += ["--layers", "0,5-6,11", "--methods", "random", "--keeps", "0.5", "--pictures", "1", "--json"]
    printed = json.loads(run(*command, "--out", str(tmp_path)).strip().splitlines()[-1])
    assert printed["samples"] == 4
    assert {(line["task"], line["layer"]) for line in printed["layers"]} == {
        (task, layer) for task in ("docvqa_val", "mmbench_cn_dev_static") for layer in (0, 5, 6, 11)
    }
    assert len(list(tmp_path.rglob("*.parquet"))) == 4
    pictures = {path.stem for path in tmp_path.rglob("*.png")}
    assert pictures == {
        *("layers", "kept-docvqa_val", "kept-mmbench_cn_dev_static"),
        *("docvqa_val-validation-0", "mmbench_cn_dev_static-dev-0"),
    }
    assert {path.stem for path in tmp_path.rglob("*.svg")} == pictures
    # matplotlib writes each text of an SVG file as a comment, too: the benchmark in words, the question and the unit.
    heat = (tmp_path / "heatmaps" / "docvqa_val-validation-0.svg").read_text(encoding="utf-8")
    assert "DocVQA, docvqa_val/validation/0: What is" in heat
    assert "information of a visual token" in heat
    assert "DocVQA: mean of 2 documents" in (tmp_path / "kept-docvqa_val.svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.folder)
def test_show_draws_a_picture(model: Any, document: Callable[..., Document], tmp_path: Path) -> None:
    files = []
    for number in (1, 2):
        files.append(tmp_path / f"{number}.png")
        document(number).fields["image"].save(files[-1])
    out = tmp_path / "new" / "shown.PNG"
    command = [
        "show",
        *map(str, files),
        "--question",
        r"Is $x_ > \frac{3$ of 4?",
        "--schedule",
        "divprune@1:0.5,random@8:0.1",
    ]
    result = CliRunner().invoke(app, [*command, "--out", str(out), *model_options(model), "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout.strip().splitlines()[-1])
    assert len(printed["kept"]) == len(printed["kept"][0]) == 2
    assert all(late < early for early, late in zip(*printed["kept"], strict=True))
    assert np.asarray(Image.open(out)).std() > 10


def test_no_number_of_a_table_is_broken() -> None:
    """However many tasks there are, and however narrow the terminal is."""
    tasks = [f"a_benchmark_of_some_name_{number}" for number in range(11)]
    averages = pd.DataFrame([(task, 3, -0.1137) for task in tasks], columns=["task", "layer", "mean"])
    tables = _tables(averages, 80)
    assert len(tables) == 2
    for table in tables:
        console = Console(width=80, file=io.StringIO())
        console.print(table)
        printed = console.file.getvalue()
        assert printed.count("-113.70") == len(table.columns) - 1
    assert sum(len(table.columns) - 1 for table in tables) == len(tasks)


def test_a_picture_is_the_same_file_each_time(tmp_path: Path) -> None:
    lines = [("pope", layer, 0.1, 0.05, 0.15, 0.01) for layer in range(3)]
    layers = pd.DataFrame(lines, columns=["task", "layer", "mean", "low", "high", "variance"])
    for name in ("one", "another"):
        draw_layers(layers, "made up", tmp_path / name / "layers")
    for suffix in ("png", "svg"):
        first, second = ((tmp_path / name / f"layers.{suffix}").read_bytes() for name in ("one", "another"))
        assert first == second


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["information", "--tasks", "pope", "--out", "x", "--methods", "fastvv"], "Did you mean 'fastv'"),
        (["information", "--tasks", "pope", "--out", "x", "--methods", "blind"], "it keeps nothing"),
        (["information", "--tasks", "pope", "--out", "x", "--keeps", "0,2"], "ratios above 0 and up to 1"),
        (["information", "--tasks", "pope", "--out", "x", "--layers", "3-12"], "the model's layers are 0 to 11"),
        (["information", "--tasks", "pope", "--out", "x", "--layers", "3;4"], "write numbers and ranges"),
        (["information", "--tasks", "pope", "--out", "x", "--layers", "0,5-3"], "5-3 ends before it begins; write 3-5"),
        (["information", "--tasks", "pope", "--out", "x", "--include-path", "y"], "does not exist"),
        (["information", "--tasks", "pope", "--out", "x", "--wrapper", "llava"], "--wrapper llava is unknown"),
        (["information", "--tasks", "pope", "--out", "x", "--model", "llava_pruned"], "write --wrapper llava_pruned"),
        (["information", "--tasks", "pope", "--out", "x", "--model", "/nowhere"], "/nowhere is no checkpoint"),
        (
            ["information", "--tasks", "pope", "--out", "x", "--model-args", "pretrained=y"],
            "--model-args pretrained=…: the command has the option --model for it; leave it out.",
        ),
        (["horizon", "--tasks", "pope", "--out", "x", "--epsilon", "1"], "a share from 0 to below 1"),
        (["horizon", "--tasks", "mathvista", "--out", "x"], "the YAML of 'mathvista' names no metric (metric_list)"),
        (["calibrate", "--budget", "0.5"], "give --tasks, the benchmarks to choose on, or --data"),
        (
            ["calibrate", "--tasks", "pope", "--budget", "flops=4%", *model_options(LLAVA)],
            "the budget flops=4% cannot be met: ",
        ),
        (
            ["calibrate", "--tasks", "pope", "--budget", "speed=40%", *model_options(LLAVA)],
            "'speed' is not known; use flops=, kv= or ttft@",
        ),
        (
            ["calibrate", "--tasks", "pope", "--budget", "60t", *model_options(QWEN)],
            "images differ in size; give a ratio",
        ),
        (
            ["calibrate", "--tasks", "pope", "--budget", "999t", *model_options(LLAVA)],
            "the smallest possible is 0t, the largest 144t",
        ),
        (["show", "none.png", "--question", "?", "--schedule", "none", "--out", "x.png"], "none.png cannot be read"),
        (["show", "none.png", "--question", "?", "--schedule", "none", "--out", "x.gif"], "must end with .png"),
        (["show", "none.png", "--question", "?", "--schedule", "fastv@0:0.5", "--out", "x.png"], "fastv"),
        (
            ["information", "--tasks", "mme", "--out", "x", "--label", "relase"],
            "--label relase: write probable or release. Did you mean 'release'?",
        ),
        (["horizon", "--tasks", "mme", "--out", "x", "--label", "1"], "--label 1: write probable or release."),
        (
            ["show", "none.png", "--question", "?", "--schedule", "information@2:0.5;of=y", "--out", "x.png"],
            "information needs a right answer",
        ),
    ],
)
def test_impossible_commands_are_refused(command: list[str], message: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    if not {"--model", "--wrapper", "--model-args"} & {*command}:
        command = [*command, *model_options(LLAVA)]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())
    assert not list(tmp_path.iterdir())
