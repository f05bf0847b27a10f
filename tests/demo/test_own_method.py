"""A method in a file of its own, from the idea to rows with intervals: the student's story, through processes."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from forking import Forking
from test_run import QUICK_DEMO

from lmms_prune.demo.comparison import BEST, RANDOM, UNPRUNED_RUN
from lmms_prune.demo.run import CONTROL, DemoRow, expected_time, judged, verdicts
from lmms_prune.errors import ScheduleError
from lmms_prune.terminal.progress import time_left

IDEA = "view.hidden.norm(p=self.power, dim=-1)"
ANOTHER = "-view.hidden.norm(p=self.power, dim=-1)"


class Student:
    """Types commands in one folder."""

    def __init__(self, forking: Forking, folder: Path):
        self.forking, self.folder = forking, folder

    def types(self, *words: str) -> str:
        """The output of a command of this package that succeeds."""
        script = self.folder / "command.py"
        script.write_text(QUICK_DEMO, encoding="utf-8")
        command = [*self.forking.prefix, str(script), str(self.forking.stand_ins / "lmms-eval"), *words]
        done = subprocess.run(
            command, cwd=self.folder, env=self.forking.environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def demo(self, schedule: str) -> dict[str, Any]:
        words = ("demo", "--quick", "--tasks", "pope", "--json", "--schedule", schedule)
        return json.loads(self.types(*words).splitlines()[-1])


def test_from_an_idea_to_a_row_with_its_interval(forking: Forking, tmp_path: Path) -> None:
    student = Student(forking, tmp_path)
    assert "lmms-prune test-method my_idea.py" in student.types("new-method", "my_idea")
    tested = student.types("test-method", "my_idea.py")
    assert "24 of 24 checks passed" in tested
    first = student.demo(re.search(r"--schedule '(.*?)'", tested)[1].replace("@2", "@1"))  # type: ignore[index]
    assert not first["failures"]
    labels = [run["schedule"] for run in first["runs"] if run["model"] == "llava_pruned"]
    assert labels[:2] == ["none", "my_idea.py@1:?,budget=0.5"]
    assert labels[2].startswith("random@1:?,budget=0.49")
    for comparison in first["comparisons"]:
        assert [found["role"] for found in comparison["differences"]] == [UNPRUNED_RUN, RANDOM]

    # Another idea in the same file: its first form is a stored row now, told apart by the file's hash.
    path = tmp_path / "my_idea.py"
    path.write_text(path.read_text("utf-8").replace(IDEA, ANOTHER), encoding="utf-8")
    second = student.demo("my_idea.py:MyIdea@1:?,budget=0.5")
    for comparison in second["comparisons"]:
        unpruned, control, stored = comparison["differences"]
        assert stored["role"] == BEST
        assert "my_idea.py@1:" in stored["other"]
        assert all(found["low"] <= found["difference"] <= found["high"] for found in (unpruned, control, stored))

    board = json.loads(student.types("leaderboard", "lmms-prune-demo/results-24/tiny-llava", "--format", "json"))
    rows = {row["label"]: row for budget in board["models"][0]["budgets"] for row in budget["rows"]}
    own = {label: row for label, row in rows.items() if "my_idea.py" in label}
    assert len(own) == 2
    assert all(row["rel_interval"] is not None and row["random"] is not None for row in own.values())
    assert str(tmp_path) not in json.dumps(list(rows))
    hashes = set()
    for file in (tmp_path / "lmms-prune-demo").rglob("*_results.json"):
        settings = json.loads(file.read_text("utf-8"))["config"]["batch_sizes"][0]["settings"]
        if "my_idea.py" in settings["schedule"]:
            assert re.fullmatch(r"my_idea\.py(:MyIdea)?@1:\S+", settings["schedule"])
            hashes.add(settings["methods_sha256"].rpartition("=")[2])
        else:
            assert "methods_sha256" not in settings
    assert len(hashes) == 2


def test_a_users_row_is_judged_by_the_unpruned_run_and_random_at_its_tokens(tmp_path: Path) -> None:
    rows = [DemoRow.checked(text) for text in ("dart@1:?,budget=0.5", "stride@1:?,random@8:0.1,budget=0.5")]
    none, *_, first, second = judged(rows)
    assert str(none) == "none"
    tokens = [float(row.solved().avg_visual_tokens(12, [144])) for row in (*rows, first, second)]  # type: ignore[union-attr]
    assert tokens[2] == pytest.approx(tokens[0], rel=0.03)
    assert tokens[3] == pytest.approx(tokens[1], rel=0.03)
    assert {row.role for row in (first, second)} == {CONTROL}  # type: ignore[union-attr]
    # Nothing to compare with: random itself, what keeps all or none, what decides by itself.
    alone = [DemoRow.checked(text) for text in ("random@1:0.5", "blind@0", "dart@1:1", "hivtp@1")]
    assert [str(row) for row in judged(alone)] == ["none", *map(str, alone)]
    assert len(judged([DemoRow.checked("none"), rows[0]])) == 3


def test_a_broken_file_is_refused_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "broken.py"
    path.write_text("1 / 0\n", encoding="utf-8")
    with pytest.raises(ScheduleError, match=r"raises when it is imported: ZeroDivisionError: .* \(line 1\)"):
        DemoRow.checked(f"{path}@1:?,budget=0.5")
    odd = tmp_path / "a@b"
    odd.mkdir()
    monkeypatch.chdir(odd)
    # lmms-eval is started elsewhere, so that the whole path must be writable in a schedule.
    with pytest.raises(
        ScheduleError, match=r"a@b/mine\.py' of a method's file has '@', which a schedule text cannot hold"
    ):
        DemoRow.checked("mine.py@1:?,budget=0.5")


def test_the_comparison_says_where_there_is_nothing_to_compare_with() -> None:
    record = {"comparisons": [{"folder": "tiny-llava", "schedule": "dart@1:0.5", "differences": []}]}
    head, tail = verdicts(record)
    assert head.startswith("tiny-llava, dart@1:0.5: Rel, in points, with its 95 % interval")
    assert "`lmms-prune demo` in this folder stores 20 rows" in tail


def test_the_time_that_is_left_is_said_in_words() -> None:
    assert time_left(0, 6, 10.0) == time_left(6, 6, 10.0) == time_left(1, 6, 0.5) == ""
    assert time_left(1, 6, 10.0) == "about 50 s left"
    assert time_left(2, 6, 300.0) == "about 10 min left"
    assert expected_time(40, 10, 96, 2) == "about 12 min"
    assert expected_time(1, 1, 24, 2) == "about 7 s"
