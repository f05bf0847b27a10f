"""Result folders that something has damaged: the leaderboard names each file that it cannot use, and reads the rest."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from shutil import rmtree

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_values import changed
from written import write_run

from lmms_prune.leaderboard.formats import FORMATS
from lmms_prune.leaderboard.results import read_results
from lmms_prune.leaderboard.table import leaderboard
from lmms_prune.record.redaction import secret_values

TASKS = ["gqa", "mme", "pope", "textvqa_val", "mmbench_en_dev_static", "ocrbench", "scienceqa_img"]
VALUES = [1.0, 0.0, 1.0, 1.0]


def write(folder: Path, draw: Random) -> list[Path]:
    """A baseline and a pruned run, each of the same one or two tasks; returns all their files."""
    tasks = {task: VALUES for task in draw.sample(TASKS, draw.choice([1, 1, 2]))}
    write_run(folder / "none", tasks)
    write_run(folder / "dart", tasks, "dart@2:0.44", tokens=30)
    return sorted(folder.rglob("*.json*"))


def damage(draw: Random, path: Path) -> None:
    """One thing that can happen to a file: a value changes, bytes change or end, it goes, or it is something else."""
    content = path.read_bytes()
    kind = draw.choice(
        ["value", "value", "value", "value", "cut", "bytes", "gone", "folder", "empty", "deep", "twice", "list"]
    )
    if kind == "value":
        lines = content.decode().splitlines()
        number = draw.randrange(len(lines))
        said = json.loads(lines[number])
        for _ in range(draw.choice([1, 1, 1, 3])):
            said = changed(draw, said)
        lines[number] = json.dumps(said)
        path.write_text("\n".join(lines), encoding="utf-8")
    elif kind == "cut":
        path.write_bytes(content[: draw.randrange(len(content))])
    elif kind == "bytes":
        place = draw.randrange(len(content))
        path.write_bytes(
            content[:place] + draw.choice([b"\xff", b"\0", b'"', b"9" * 5000, b"\n"]) + content[place + 1 :]
        )
    elif kind == "deep":
        path.write_bytes(b"[" * 100_000)
    elif kind == "twice":
        path.write_bytes(content + content)
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "list":
        path.write_bytes(b"[" + content.replace(b"\n", b",") + b"1]")
    else:
        path.unlink()
        if kind == "folder":
            path.mkdir()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "results"


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False))
def test_damaged_results_are_named_and_the_rest_is_read(folder: Path, draw: Random) -> None:
    rmtree(folder, ignore_errors=True)
    paths = write(folder, draw)
    harmed = draw.sample(paths, draw.choice([1, 1, 2]))
    for path in harmed:
        damage(draw, path)
    results = read_results([folder])
    board = leaderboard(results, None, None, 20, 0)
    for form in FORMATS.values():
        assert isinstance(form(board, True), str)
    for problem in board.problems:
        # It names a file that is there, or was, or the folder where nothing is left to read.
        assert problem.path in {str(folder), *map(str, paths), *map(str, folder.rglob("*"))}, problem
        assert problem.message
    used = {source.path for record in results.records for source in record.sources}
    for path in paths:
        if path.name.endswith("_results.json") and path not in harmed:
            assert path in used


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_nothing_that_results_say_makes_a_table_fail(folder: Path, form: str) -> None:
    """Names and settings are any text: markup of the terminal's and the table's own, line breaks, other scripts."""
    odd = "[bold]|`&_\\$%{}<b>\n\x1b[31m\u202eé漢\ud800"
    write_run(folder / "a", {"gqa": VALUES}, model=odd)
    write_run(folder / "b", {"gqa": VALUES}, "dart@2:0.44", tokens=30, model=odd)
    board = leaderboard(read_results([folder]), None, None, 20, 0)
    assert len(board.models) == 1
    assert FORMATS[form](board, True)


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_no_format_holds_a_secret_of_the_results(folder: Path, form: str) -> None:
    """The harness's own results may say what a user gave as arguments."""
    secret, token = 'a "correct" horse', "hf_" + "x1" * 17
    for name, schedule in (("a", "none"), ("b", "dart@2:0.44")):
        write_run(folder / name, {"gqa": VALUES}, schedule, tokens=30, model=f"me:{token}@{secret}")
    board = leaderboard(read_results([folder]), None, None, 20, 0)
    for form_of_it in (secret, json.dumps(secret)[1:-1], token):
        text = FORMATS[form](board, True, secret_values({"SOME_PASSWORD": secret}))
        assert form_of_it not in text
    assert "REDACTED" in text
    assert secret.split()[-1] in FORMATS[form](board, True)
