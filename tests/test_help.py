"""The help of every command: an example that runs, plain options, and one spelling and meaning of what commands share."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from lmms_prune.cli import PANELS, app
from lmms_prune.models import MODEL_NAMES
from lmms_prune.schedule import Schedule
from lmms_prune.terminal.help import RENAMED

ROOT = Path(__file__).parents[1]


def commands(group: Any, *names: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """All commands below a group, with their names; the group itself has its own help."""
    for name, command in group.commands.items():
        command = group.commands[name]  # not that of items(), which may still be a place to import it from
        yield (*names, name), command
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)


COMMANDS = dict(commands(typer.main.get_command(app)))
# Options of a group without a command belong to this one.
DEFAULTS = {("calibrate",): ("calibrate", "hybrid")}
each_command = pytest.mark.parametrize("names", COMMANDS, ids=" ".join)


def help_of(names: tuple[str, ...], width: int) -> str:
    result = CliRunner().invoke(app, [*names, "--help"], env={"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    return result.output


def option_names(command: Any) -> dict[str, Any]:
    return {name: param for param in command.params for name in (*param.opts, *param.secondary_opts)}


@each_command
def test_the_help_ends_its_text_with_an_example_that_the_command_takes(names: tuple[str, ...]) -> None:
    """On one line of an 80-column terminal, to be copied; its options are parsed, nothing is run."""
    (example,) = re.findall(r"^ Example: (lmms-prune .*?) *$", help_of(names, 80), re.MULTILINE)
    _, *words = shlex.split(example)
    assert tuple(words[: len(names)]) == names
    rest = words[len(names) :]
    COMMANDS[DEFAULTS.get(names, names)].make_context(" ".join(names), list(rest))
    for schedule in (word for word in rest if "@" in word):
        Schedule.with_budget(schedule)


@each_command
def test_the_help_fits_and_shows_no_type_of_flags(names: tuple[str, ...]) -> None:
    for width in (80, 99):
        text = help_of(names, width)
        assert max(map(len, text.splitlines())) <= width
        assert "bool" not in text


def test_every_command_is_one_line_of_the_list_below_the_heading_of_its_group() -> None:
    lines = [line.strip("│ ") for line in help_of((), 80).splitlines()]
    names = [name for panel in PANELS.values() for name in panel]
    assert [line.strip("─╭╮ ") for line in lines if line.startswith("╭")] == ["Options", *PANELS]
    start = lines.index(next(line for line in lines if "Run" in line and line.startswith("╭")))
    rest = [line for line in lines[start:] if line and line[0] not in "╭╰"]
    assert [line.split()[0] for line in rest] == names
    assert all(line.endswith(".") for line in rest)


@each_command
def test_options_have_one_spelling(names: tuple[str, ...]) -> None:
    options = option_names(COMMANDS[names])
    assert [name for name in options if name.startswith("-") and not re.fullmatch(r"--[a-z]+(-[a-z]+)*", name)] == []
    assert not set(RENAMED) & set(options)


@each_command
def test_shared_options_mean_the_same(names: tuple[str, ...]) -> None:
    """A checkpoint is --model, lmms-eval's name --wrapper; a device is chosen by itself."""
    options = option_names(COMMANDS[names])
    if "--model" in options:
        assert options["--model"].help.startswith(("A checkpoint's folder or hub name", "Shows the cost too"))
        assert options["--model"].default not in MODEL_NAMES
    if "--wrapper" in options:
        assert options["--wrapper"].help.startswith("lmms-eval's name of the model: llava_pruned or ")
        assert "--model" in options
    if "--device" in options:
        assert options["--device"].default == "auto"
    for name in ("--json", "--device", "--model-args", "--include-path", "--launch", "--cluster", "--cluster-option"):
        others = {option_names(command)[name].help for command in COMMANDS.values() if name in option_names(command)}
        allowed = 4 if name == "--model-args" else 1  # what it may hold depends on what the command decides itself
        assert 1 <= len(others) <= allowed, f"{name}: {others}"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("bench --batch 2", "bench --batch: the option is called --batch-size."),
        ("demo --folder x", "demo --folder: the option is called --out."),
        ("horizon --model_args=x", "horizon --model_args: the option is called --model-args."),
        ("gate x --include_path x", "gate --include_path: the option is called --include-path."),
        ("bench-throughput --samples 3", "bench-throughput --samples: the option is called --limit."),
        ("bench-throughput --task pope", "bench-throughput --task: the option is called --tasks."),
        ("show a.png --model llava_pruned --question x --schedule none", "write --wrapper llava_pruned"),
    ],
)
def test_a_former_spelling_is_answered_by_the_present_one(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_commands_that_pages_show_have_the_options_that_they_use() -> None:
    """Each ``lmms-prune …`` in a code block of README and docs, joined at its line ends, or between backticks."""
    found = 0
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text(encoding="utf-8")
        blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        blocks += re.findall(r"`(lmms-prune [^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
        for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
            for command in re.findall(r"(?:^|[$&|;] *)lmms-prune ((?:'[^']*'|\"[^\"]*\"|[^'\"#&|;])+)", line):
                words = shlex.split(command)
                names = tuple(words[:2]) if tuple(words[:2]) in COMMANDS else tuple(words[:1])
                if words[0].startswith("-") or names[0].isupper():
                    continue
                assert names in COMMANDS, f"{page.name}: {line}"
                known = {**option_names(COMMANDS[DEFAULTS.get(names, names)]), "--help": None}
                own = words[: words.index("--")] if "--" in words else words
                unknown = [word for word in own if re.match(r"--[a-z]", word) and word.partition("=")[0] not in known]
                assert unknown == [], f"{page.name}: {line}"
                found += 1
    assert found > 40
