"""The leaderboard as a DataFrame: the rows of the command's CSV."""

from __future__ import annotations

import inspect
import io
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner
from written import write_run

from lmms_prune import leaderboard
from lmms_prune.cli import app
from lmms_prune.leaderboard.frame import LeaderboardWarning
from lmms_prune.leaderboard.reading import LeaderboardError


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name, schedule, values in (
        ("a", "none", [1.0, 1.0, 0.0, 1.0]),
        ("b", "dart@2:0.33", [1.0, 1.0, 0.0, 0.0]),
        ("c", "random@2:0.33", [1.0, 0.0, 0.0, 0.0]),
    ):
        write_run(tmp_path / "results" / name, {"gqa": values, "pope": values}, schedule, tokens=33)
    return tmp_path / "results"


def test_the_rows_are_those_of_the_csv(results: Path) -> None:
    frame = leaderboard(results, cache=False)
    options = ["--no-cache", "--format", "csv"]
    printed = CliRunner().invoke(app, ["leaderboard", str(results), *options]).stdout
    pd.testing.assert_frame_equal(
        pd.read_csv(io.StringIO(frame.to_csv(index=False))), pd.read_csv(io.StringIO(printed))
    )
    assert list(frame.schedule) == ["none", "dart@2:0.33", "random@2:0.33"]
    assert list(frame.gqa) == [75.0, 50.0, 25.0]
    # GQA keeps 2/3 and 1/3, POPE's F1 (2/3 unpruned) 3/4 and 3/5.
    assert frame.rel.round(3).tolist() == [100.0, 70.833, 46.667]


def test_options_are_those_of_the_command(results: Path) -> None:
    only = leaderboard([results / "b", results / "c"], baseline=results / "a", benchmarks="GQA", cache=False)
    assert "pope" not in only
    assert only.set_index("schedule").loc["dart@2:0.33", "baseline"] == "none"
    wide, again = (leaderboard(str(results), resamples=300, seed=seed, cache=False) for seed in (1, 1))
    pd.testing.assert_frame_equal(wide, again)


def test_what_cannot_be_read_warns_and_nothing_to_read_is_an_error(results: Path, tmp_path: Path) -> None:
    (results / "broken_results.json").write_text("{", encoding="utf-8")
    with pytest.warns(LeaderboardWarning, match=r"broken_results\.json"):
        assert len(leaderboard(results, cache=False)) == 3
    with (
        pytest.warns(LeaderboardWarning),
        pytest.raises(LeaderboardError, match=r"no results of lmms-eval in .*nowhere"),
    ):
        leaderboard(tmp_path / "nowhere", cache=False)
    with pytest.raises(LeaderboardError, match="--benchmarks GQU: unknown benchmark"):
        leaderboard(results / "a", benchmarks="GQU", cache=False)
    for paths in ([], "", ["a", ""]):
        with pytest.raises(ValueError, match=r"paths=\[.*\] must be a path or a list of paths"):
            leaderboard(paths)
    with pytest.raises(ValueError, match="resamples=0 must be a whole number of at least 1"):
        leaderboard(results, resamples=0)


def test_a_warning_points_at_the_line_that_asked(results: Path) -> None:
    (results / "broken_results.json").write_text("{", encoding="utf-8")
    code = f"from lmms_prune import leaderboard\nleaderboard({str(results)!r}, cache=False)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert re.findall(r"^(\S+): LeaderboardWarning", done.stderr, re.MULTILINE) == ["<string>:2"]


def test_the_package_of_that_name_is_the_function() -> None:
    """Whatever was imported first; the signature is what a notebook shows for ``leaderboard?``."""
    first = "import lmms_prune.leaderboard.rows; from lmms_prune import leaderboard; print(callable(leaderboard))"
    second = "from lmms_prune import leaderboard; from lmms_prune.leaderboard.rows import TableRow; print(callable(leaderboard))"
    for code in (first, second):
        assert (
            subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"
        )
    assert list(inspect.signature(leaderboard).parameters)[:3] == ["paths", "baseline", "benchmarks"]
