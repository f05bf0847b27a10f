"""``lmms-prune …`` as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

import lmms_prune
from lmms_prune.cli import COMMANDS, app
from lmms_prune.methods import METHODS

# What the caller's terminal is must not matter.
PLAIN = {"NO_COLOR": "1", "TERM": "dumb", "FORCE_COLOR": None, "TTY_COMPATIBLE": None, "COLUMNS": "80"}


def call(*args: str):
    return CliRunner().invoke(app, list(args), env=PLAIN)


def test_version() -> None:
    assert call("--version").output == f"lmms-prune {lmms_prune.__version__}\n"


def test_every_command_is_where_it_is_looked_for() -> None:
    """They are imported by name; a wrong one of these would show only when its command is called."""
    group = typer.main.get_command(app)
    names = [*COMMANDS, "methods", "demo"]
    assert sorted(group.commands) == sorted(names)
    for name in names:
        assert group.commands[name].name == name
        assert call(name, "--help").output.split()[2] == name
    assert list(group.commands["calibrate"].commands) == ["fitprune", "vflowopt", "vtw", "hybrid"]
    assert "Did you mean 'schedule'?" in call("scedule").output


def test_schedule_shows_stages_and_the_average() -> None:
    result = call("schedule", "dart+random-192-release", "--layers", "32", "--visual-tokens", "576")
    assert result.exit_code == 0
    for text in ("dart@2:252t;order=reference,random@20:38t", "252", "38", "192.00 of 576", "33.3%"):
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
        (["demo", "--schedule", "random@20:0.25"], "layers are 0 to 11"),
        (["methods", "fastvv"], "Did you mean 'fastv'?"),
        (["methods", "fastvv", "--json"], "Did you mean 'fastv'?"),
        (["methods", "fastv", "--markdown"], "leave out fastv"),
        (["methods", "--markdown", "--json"], "leave out --json"),
        (["bench-methods", "--methods", "fastvv"], "Did you mean 'fastv'?"),
        (["bench-methods", "--family", "clip"], "use llava or llava_next or qwen2_5_vl"),
        (["bench"], "give --model FOLDER or --arch NAME"),
        (["bench", "--arch", "llava-1.5-8b"], "Did you mean 'llava-1.5-7b'?"),
        (["bench", "--arch", "llava-1.5-7b", "fastvv@2:0.25"], "Did you mean 'fastv'?"),
        (["bench", "--arch", "llava-1.5-7b", "--batch-size", "0"], "whole numbers of at least 1"),
        (["bench", "--arch", "llava-1.5-7b", "--grid", "24"], "such as 24x24"),
        (["bench", "--arch", "llava-1.5-7b", "--dtype", "int8"], "use auto, float32"),
        (["bench", "--arch", "llava-1.5-7b", "--plot", "x.pdf"], "must end with .png or .svg"),
        (["bench", "--model", "/nowhere", "--layers", "3"], "leave --layers out"),
        (["bench", "--model", "/nowhere"], "/nowhere"),
        (["bench", "--arch", "llava-1.5-7b", "--device", "cuda:9"], "CUDA devices"),
        (["bench", "--arch", "llava-1.5-7b", "--layers", "8", "dart@9:0.5"], "layers are 0 to 7"),
        (["bench", "--arch", "llava-1.5-7b", "dart@2:?"], "dart@2:?"),
        (["schedule", "tome@3:0.3;place=encoder"], "must act at layer 0"),
        (["schedule", "vflowopt@0:0.3;alpha=inf"], "allowed are numbers from 0"),
        (["schedule", "mustdrop@3,random@20:?", "--budget", "192t"], "decides by itself how much it keeps"),
        (["demo", "--tasks", "mme, foo"], "'foo' is not in the demo; it has mme,"),
        (["demo", "--out", "/dev/null/x"], "Not a directory"),
    ],
)
def test_errors_exit_with_2_and_one_message(args: list[str], message: str) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output


def test_methods_lists_every_method() -> None:
    """In a normal terminal every name stands in one piece, in a wide one the papers too; all the rest is in the JSON."""
    # As processes: a width is the environment's, and what else runs in this one may have taken hold of it.
    program = Path(sys.executable).with_name("lmms-prune")
    plain = {name: value for name, value in os.environ.items() if name not in ("FORCE_COLOR", "TTY_COMPATIBLE")}
    narrow, wide = (
        subprocess.run(
            [str(program), "methods"],
            env={**plain, "NO_COLOR": "1", "COLUMNS": str(columns)},
            capture_output=True,
            encoding="utf-8",
            check=True,
        ).stdout
        for columns in (80, 200)
    )
    assert all(f" {name} " in narrow for name in METHODS)
    assert max(map(len, narrow.splitlines())) <= 80
    assert [spec.name for spec in METHODS.values() if spec.paper.rsplit("/", 1)[1] not in wide] == []
    said = json.loads(call("methods", "--json").output.strip().splitlines()[-1])["methods"]
    assert [method["name"] for method in said] == list(METHODS)
    for method in said:
        spec = METHODS[method["name"]]
        assert (method["paper"], method["class"]) == (spec.paper, spec.kind)
        assert method["training_free"] == (spec.name != "glimpseprune")
        assert [option["name"] for option in method["options"]] == [option.name for option in spec.options]


def test_methods_prints_a_table_for_the_readme() -> None:
    lines = call("methods", "--markdown").output.strip().splitlines()
    assert lines[:2] == ["| kind | method (acts at layers, paper) |", "|---|---|"]
    assert sorted(name for line in lines[2:] for name in line.split("`")[1::2]) == sorted(METHODS)
    assert "`fastv` (≥ 1, [2403.06764](https://arxiv.org/abs/2403.06764))" in lines[2]
    for spec in METHODS.values():
        [row] = [line for line in lines if f"`{spec.name}` (" in line]
        assert row.startswith(f"| {spec.kind} | ")
        assert f", [{spec.paper.rsplit('/', 1)[1]}]({spec.paper}))" in row


def test_methods_shows_one_with_its_options() -> None:
    (alone,) = json.loads(call("methods", "fastv", "--json").output.strip().splitlines()[-1])["methods"]
    assert alone["name"] == "fastv"
    output = call("methods", "sparsevlm").output
    for text in ("importance", "1 and deeper", "N + ⌊q/10⌋+1", ";version=", "v1.5 and v2.0", "2410.04417"):
        assert text in output


def test_a_plan_that_is_a_bound_says_so() -> None:
    result = call("schedule", "pool@0:0.33,mustdrop@3")
    assert result.exit_code == 0
    assert "≤ 190" in result.output
    assert "at most 190.00 of 576" in result.output
    assert json.loads(call("schedule", "pool@0:0.33", "--json").output.strip().splitlines()[-1])["at_most"] is True
    assert json.loads(call("schedule", "fastv@3:0.33", "--json").output.strip().splitlines()[-1])["at_most"] is False
