"""docs/paper.md: every command of it can be typed, and what it names is there; the quick ones are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from lmms_prune.cli import app
from lmms_prune.leaderboard.benchmarks import TASKS
from lmms_prune.reproduce.items import ITEMS, chosen_items
from lmms_prune.schedule import Schedule

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
COMMANDS = tuple(dict.fromkeys(re.findall(r"`(lmms-prune [^`]+)` \|$", PAGE, re.MULTILINE)))
QUICK = tuple(
    command
    for command in COMMANDS
    if re.match(r"lmms-prune (schedule|check|methods|tasks)\b|lmms-prune leaderboard --published|.*--help$", command)
    or (" --dry-run" in command and command.startswith("lmms-prune reproduce"))
)
OWN_TASKS = {path.stem for path in (ROOT / "task_configs").glob("*.yaml")}


def options_of(command: str) -> dict[str, object]:
    """The command's options as its own parser reads them.

    Raises:
        click.UsageError: an option that does not exist, or a value that it cannot have.
    """
    _, name, *words = shlex.split(command)
    parser = typer.main.get_command(app).commands[name]
    if name == "calibrate":
        parser = parser.commands["hybrid"]
    return parser.make_context(name, list(words)).params


@pytest.mark.parametrize("command", [command for command in COMMANDS if not command.endswith("--help")])
def test_a_command_can_be_typed_and_what_it_names_is_there(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    options = options_of(command)
    for name in str(options.get("tasks") or "").split(","):
        assert not name or name in TASKS or name in OWN_TASKS, name
    for word in shlex.split(command):
        for path in re.findall(r"(?:lmms_prune|model_configs|docs)/[\w.+/-]+", word):
            assert (ROOT / path).exists(), path
    if command.startswith("lmms-prune reproduce"):
        assert chosen_items(options["items"])
    for schedule in [*options.get("schedules", []), options.get("schedule")]:
        assert schedule is None or Schedule.parse(schedule).stages


@pytest.mark.parametrize("command", QUICK)
def test_a_quick_command_ends_well(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = [word if word != "paper" else str(tmp_path) for word in shlex.split(command)[1:]]
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, words)
    assert result.exit_code == 0, result.output
    assert result.output.strip()


def test_every_item_of_the_paper_has_its_command() -> None:
    asked = {item for command in COMMANDS if "--dry-run" in command for item in shlex.split(command)}
    assert set(ITEMS) | {"all"} <= asked
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| the paper | here")]
    assert all(re.search(r"`lmms-prune [^`]+` \|$", line) for line in rows if not line.startswith("| point | here"))
    assert [int(number) for number in re.findall(r"^\| (\d+)\. ", PAGE, re.MULTILINE)] == [*range(1, 14)]


def test_what_the_page_says_is_printed() -> None:
    """Both contradictions of the text, and the one Rel that its own scores do not give."""
    result = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["leaderboard", "--published"])
    for words in ("CUDA latency falls by 73.0 %", "96.4 with 68.6 on MME", "a Rel of 91.3 for DART+VTW 64"):
        assert words in result.output
