"""``lmms-prune …`` as a user calls it."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

import lmms_prune
from lmms_prune.cli import app


def call(*args: str):
    return CliRunner().invoke(app, list(args))


def test_version() -> None:
    assert call("--version").output == f"lmms-prune {lmms_prune.__version__}\n"


def test_schedule_shows_stages_and_the_average() -> None:
    result = call("schedule", "dart+random-192-release", "--layers", "32", "--visual-tokens", "576")
    assert result.exit_code == 0
    for text in ("dart@2:252t,random@20:38t", "252", "38", "192.00 of 576", "33.3%"):
        assert text in result.output


@pytest.mark.parametrize(
    ("args", "schedule", "kept", "average"),
    [
        (["dart@2:0.44,random@20:0.07"], "dart@2:0.44,random@20:0.07", [252, 40], 192.75),
        (["dart@2:?,random@20:38t", "--budget", "192t"], "dart@2:252t,random@20:38t", [252, 38], 192.0),
        (["none"], "none", [], 576.0),
        (["divprune@0:0.5", "--layers", "28", "--visual-tokens", "1280"], "divprune@0:0.5", [640], 640.0),
    ],
)
def test_schedule_json_is_the_last_line(args: list[str], schedule: str, kept: list[int], average: float) -> None:
    result = call("schedule", *args, "--json")
    assert result.exit_code == 0
    said = json.loads(result.output.strip().splitlines()[-1])
    assert said["schedule"] == schedule
    assert [stage["kept_tokens"] for stage in said["stages"]] == kept
    assert said["avg_visual_tokens"] == average


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["schedule", "fastvv@2:0.25"], "Did you mean 'fastv'?"),
        (["schedule", "dart@2:?"], "needs a budget"),
        (["schedule", "dart@40:0.5"], "layers are 0 to 31"),
        (["schedule", "dart@2:?", "--budget", "20t"], "cannot be met"),
        (["schedule", "dart@2:0.5", "--layers", "0"], "--layers"),
        (["demo", "--schedule", "fastvv@2:0.25"], "Did you mean 'fastv'?"),
        (["demo", "--schedule", "random@20:0.25"], "layers are 0 to 7"),
        (["demo", "--tasks", "mme, foo"], "'foo' is not in the demo; it has mme,"),
        (["demo", "--folder", "/dev/null/x"], "Not a directory"),
    ],
)
def test_errors_exit_with_2_and_one_message(args: list[str], message: str) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
