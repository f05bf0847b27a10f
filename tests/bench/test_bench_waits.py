"""``lmms-prune bench-waits``: what it counts is in one JSON object and in tables, and what is wrong is said before weights are loaded."""

from __future__ import annotations

import json
from typing import Any

import pytest
from typer.testing import CliRunner

from lmms_prune.bench import models
from lmms_prune.cli import app
from lmms_prune.demo.models import MODELS, WEIGHTS

RUNNER = CliRunner(env={"COLUMNS": "200"})
LLAVA, QWEN = (str(WEIGHTS / model.folder) for model in MODELS)


def waits(*arguments: str) -> Any:
    return RUNNER.invoke(app, ["bench-waits", *arguments])


def test_all_models_are_in_one_json() -> None:
    result = waits("random@1:0.3,vtw@8", "none", "--grid", "4x6", "--batch-size", "1", "--json")
    assert result.exit_code == 0, result.output
    models = json.loads(result.stdout.splitlines()[-1])["models"]
    assert [content["model"].split(",")[0] for content in models] == [LLAVA, QWEN]
    for content in models:
        rows = {row["schedule"]: row for row in content["rows"]}
        assert list(rows) == ["random@1:0.3,vtw@8", "none"]
        for schedule, row in rows.items():
            assert len(row["stages"]) == schedule.count("@")
            stages = sum(stage["launches"] for stage in row["stages"])
            assert row["prefill"]["launches"] >= row["begin"]["launches"] + stages + row["end"]["launches"]
            assert row["step"] == {"launches": 0, "waits": 0}
            assert row["prefill"]["waits"] <= 4
            assert all(stage["waits"] <= 1 and stage["launches"] > 20 for stage in row["stages"])
            assert sum(row["wait_lines"].values()) == row["prefill"]["waits"]
        assert rows["none"]["prefill"]["launches"] == 0


def test_the_table_has_a_line_for_each_schedule_and_batch() -> None:
    result = waits("random@1:0.3", "--model", LLAVA, "--batch-size", "2,1")
    assert result.exit_code == 0, result.output
    assert "batch 2, 1 schedules" in result.stderr
    lines = [line for line in result.stdout.splitlines() if "@" in line]
    rows = [line.replace("│", " ").split() for line in lines]
    assert [row[:2] for row in rows] == [["random@1:0.3", "1"], ["random@1:0.3", "2"]]
    for *_, begin, stages, rerun, end, step, _ in rows:
        assert (rerun, step) == ("0", "0/0")
        assert all(0 < int(cell.partition("/")[0]) < 200 for cell in (begin, stages, end)), rows


def test_layers_that_a_stage_runs_again_are_counted_apart() -> None:
    result = waits("mustdrop@0:0.5,fastv@3:0.2", "--model", LLAVA, "--batch-size", "1", "--json")
    assert result.exit_code == 0, result.output
    [row] = json.loads(result.stdout.splitlines()[-1])["models"][0]["rows"]
    again, once = row["stages"]
    assert again["rerun"] > 14
    assert once["rerun"] == 0
    assert again["launches"] < 300


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["random@1:0.3", "--grid", "24"], "--grid 24: write rows x columns"),
        (["random@1:0.3", "--batch-size", "1,0"], "--batch-size 1,0: write whole numbers"),
        (["drt@1:0.3"], "Did you mean 'dart'?"),
        (["dart@12:0.3"], "whose layers are 0 to 11"),
        (["dart@1:?"], "the '?' of stage 1 needs a budget"),
        (["dart@1:0.3", "vtw@24", "--model", QWEN], "layer 24"),
    ],
)
def test_errors_come_before_any_weights(arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(models, "given_model", never)
    result = waits(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.output
