"""The progress of long commands: a bar on a terminal, lines in a log, and nothing of it on stdout."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmms_prune.terminal import progress as progress_module
from lmms_prune.terminal.progress import Progress, in_words, time_left

STEPS = """
import time
from lmms_prune.terminal.progress import Progress
with Progress("documents") as progress:
    progress.expect(4)
    for number in progress.over(range(4)):
        time.sleep(0.4)
        if number == 1:
            progress.say("halfway")
            print("the result")
"""


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in a list of one; logs, and not bars, whatever the tests run in."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return now


def test_a_log_has_lines_from_time_to_time(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("documents", 40) as progress:
        for _ in range(9):
            clock[0] += 1
            progress.advance()
        assert capsys.readouterr().err == ""
        progress.begin("pope")
        clock[0] += 1
        progress.advance()
        assert capsys.readouterr().err == "documents: pope: 10 of 40, about 30 s left\n"
        clock[0] += 9
        progress.advance()
        assert capsys.readouterr().err == ""
        progress.say("a line")
    assert capsys.readouterr() == ("", "a line\n")


def test_lines_become_rarer_in_a_long_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("runs", 10_000) as progress:
        for _ in range(5000):
            clock[0] += 10
            progress.advance()
    lines = capsys.readouterr().err.splitlines()
    assert 50 < len(lines) < 200
    assert lines[0] == "runs: 1 of 10000, about 1666 min left"


@pytest.mark.parametrize("quiet", [{"shown": False}, {"log": False}])
def test_processes_and_commands_with_lines_of_their_own_leave_none(
    clock: list[float], capsys: pytest.CaptureFixture[str], quiet: dict[str, bool]
) -> None:
    with Progress("runs", 2, **quiet) as progress:
        clock[0] += 60
        progress.advance()
    assert capsys.readouterr() == ("", "")


def test_steps_of_an_earlier_call_took_none_of_this_ones_time(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with Progress("runs") as progress:
        progress.count(90, 100)
        clock[0] += 20
        progress.count(92, 100)
        assert capsys.readouterr().err == "runs: 92 of 100, about 80 s left\n"
        clock[0] += 20
        progress.update(94, 7200.0)
    assert capsys.readouterr().err == "runs: 94 of 100, about 120 min left\n"


def test_the_time_left_in_words() -> None:
    assert time_left(0, 6, 10.0) == time_left(6, 6, 10.0) == time_left(1, 6, 0.5) == ""
    assert time_left(1, 6, 10.0) == "about 50 s left"
    assert in_words(600.0) == "about 10 min left"


def test_a_terminal_has_a_bar_and_a_file_has_the_result(tmp_path: Path) -> None:
    """stderr is a terminal, stdout a file: the bar shows the time left, the file has what the command printed."""
    parent, child = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with (tmp_path / "out").open("w") as out:
        process = subprocess.Popen([sys.executable, "-c", STEPS], stdout=out, stderr=child, env=environment)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 4096)
        except OSError:  # Linux: the other end is closed
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert process.wait() == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "documents ━" in text
    assert re.search(r"[23]/4 0:00:0\d about [01] s left", text), text
    assert "halfway" in text
    assert "the result" not in text
    assert (tmp_path / "out").read_text() == "the result\n"
