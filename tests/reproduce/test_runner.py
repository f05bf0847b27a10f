"""Running a chain: finished steps are skipped, a failing one stops only those that need it, and nothing leaks."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest

from lmms_prune.harness import fingerprint
from lmms_prune.reproduce.chain import _PIECES, Step
from lmms_prune.reproduce.runner import ChainProgress, StepRecord, Surroundings, is_finished, read_record, run_chain

PROGRAM = (sys.executable, "-c")


def step(name: str, code: str, lane: str = "one", **fields) -> Step:
    """A step whose command is a program."""
    return Step(name, (code,), ("fig1",), lane, **fields)


def run(out: Path, steps: Sequence[Step], **fields) -> tuple[dict[str, StepRecord], list[str]]:
    """Run steps; returns their records, and what was said."""
    lines: list[str] = []
    around = Surroundings(out, program=PROGRAM, **fields)
    progress = ChainProgress(steps, lines.append, lambda done, total, running: None)
    return run_chain(steps, around, progress, lanes=2), lines


def counting(file: Path) -> str:
    """A program that counts its runs in a file, and prints JSON."""
    return f"import pathlib; p = pathlib.Path({str(file)!r}); p.write_text(p.read_text() + 'x' if p.exists() else 'x'); print('{{\"a\": 1}}')"


def test_a_finished_step_is_skipped_until_its_command_or_the_code_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = tmp_path / "runs"
    first = step("count", counting(runs))
    assert run(tmp_path, [first])[0]["count"].state == "done"
    assert json.loads((tmp_path / "steps" / "count" / "output.json").read_text(encoding="utf-8")) == {"a": 1}
    _, lines = run(tmp_path, [first])
    assert lines == ["count: is there"]
    assert runs.read_text(encoding="utf-8") == "x"
    run(tmp_path, [step("count", counting(runs) + "; other = 1")])
    assert runs.read_text(encoding="utf-8") == "xx"
    run(tmp_path, [first])
    assert runs.read_text(encoding="utf-8") == "xxx"
    monkeypatch.setattr(fingerprint, "code", lambda aside: "another")
    assert not is_finished(first, Surroundings(tmp_path))
    run(tmp_path, [first])
    assert runs.read_text(encoding="utf-8") == "xxxx"


@pytest.mark.parametrize("names", [("before", "after"), ("before it", "after")], ids=["plain", "space"])
def test_a_moved_folder_is_as_finished_as_before(tmp_path: Path, names: tuple[str, str]) -> None:
    before, after = (tmp_path / name for name in names)

    def make(out: Path) -> Step:
        return Step("make", ("print(1)", "--out", str(out / "results")), ("fig1",), "one")

    assert run(before, [make(before)])[0]["make"].state == "done"
    assert str(tmp_path) not in (before / "steps" / "make" / "record.json").read_text(encoding="utf-8")
    before.rename(after)
    assert is_finished(make(after), Surroundings(after))
    assert not is_finished(make(tmp_path / "another"), Surroundings(after))


def test_results_that_are_gone_are_made_again(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    made = step("make", f"import pathlib; pathlib.Path({str(folder)!r}).mkdir()", folder=folder)
    run(tmp_path, [made])
    assert is_finished(made, Surroundings(tmp_path))
    folder.rmdir()
    assert not is_finished(made, Surroundings(tmp_path))
    assert run(tmp_path, [made])[0]["make"].state == "done"


def test_a_failing_step_is_named_with_its_log_and_stops_only_what_needs_it(tmp_path: Path) -> None:
    steps = [
        step("broken", "import sys; print('before', file=sys.stderr); sys.exit('no such card')"),
        step("needs", "print(1)", needs=("broken",)),
        step("free", "print(1)"),
        step("other", "print(1)", lane="two"),
    ]
    records, lines = run(tmp_path, steps)
    assert {name: record.state for name, record in records.items()} == {
        "broken": "failed",
        "needs": "not run",
        "free": "done",
        "other": "done",
    }
    assert "exit code 1: before\n  no such card" in records["broken"].reason
    assert records["needs"].reason == "it needs broken, which is not finished"
    log = tmp_path / "steps" / "broken" / "log.txt"
    assert any(str(log) in line for line in lines)
    assert log.read_text(encoding="utf-8") == "before\nno such card\n"
    # Mended, only what is missing runs.
    mended, lines = run(tmp_path, [step("broken", "print(1)"), *steps[1:]])
    assert {record.state for record in mended.values()} == {"done"}
    assert sorted(line.partition(":")[0] for line in lines if line.endswith("is there")) == ["free", "other"]


def test_neither_log_nor_record_holds_a_secret(tmp_path: Path) -> None:
    code = "import sys; print('{\"key\": \"hunter22hunter22\"}'); sys.exit('token hunter22hunter22')"
    run(tmp_path, [step("leaks", code)], secrets=("hunter22hunter22",))
    files = [path for path in (tmp_path / "steps" / "leaks").iterdir() if path.is_file()]
    assert {path.name for path in files} == {"log.txt", "record.json", "output.json"}
    assert not any("hunter22" in path.read_text(encoding="utf-8") for path in files)


def test_a_part_runs_only_what_can_be_divided(tmp_path: Path) -> None:
    code = "import json, sys; print(json.dumps(sys.argv[1:]))"
    steps = [step("whole", code), step("divided", code, divisible=True)]
    around = Surroundings(tmp_path, program=PROGRAM, launch="torchrun -n 2", shard="2/3")
    records = run_chain(steps, around, ChainProgress(steps, lambda line: None, lambda *counts: None), 1)
    assert {name: record.state for name, record in records.items()} == {"whole": "not run", "divided": "done"}
    assert around.words(steps[1])[1:] == ["--launch", "torchrun -n 2", "--shard", "2/3"]
    assert read_record(tmp_path / "steps" / "divided-2-of-3").state == "done"
    # What a part has done is not the whole.
    assert not is_finished(steps[1], Surroundings(tmp_path))


def test_progress_counts_finished_evaluations(tmp_path: Path) -> None:
    folder = tmp_path / "results"
    for name in ("a/pope/sweep.json", "information/mme/test/1.parquet", ".partial/b@pope/sweep.json", "log.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("", encoding="utf-8")
    assert step("some", "", folder=folder).finished_pieces() == 2
    assert step("none", "", folder=tmp_path / "absent").finished_pieces() == 0


def test_progress_is_counted_while_folders_come_and_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sweep makes and removes folders all the time; a chain must not end for it."""
    for name in ("gone", "stays"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    (tmp_path / "runs" / "stays" / f"some{_PIECES[0]}").touch()
    scandir = os.scandir

    def after_its_removal(path: str) -> Any:
        if Path(path).name == "gone":
            Path(path).rmdir()
        return scandir(path)

    monkeypatch.setattr(os, "scandir", after_its_removal)
    assert step("some", "", folder=tmp_path).finished_pieces() == 1


SLOW = """
import os, pathlib, time
runs, go = pathlib.Path({runs!r}), pathlib.Path({go!r})
runs.open("a").write(f"{{os.getpid()}} ")
while not go.exists(): time.sleep(0.05)
"""


def wait_for(path: Path) -> str:
    """The text of a file, once it has one."""
    deadline = time.monotonic() + 60
    while not (path.exists() and path.read_text(encoding="utf-8")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return path.read_text(encoding="utf-8")


def test_two_chains_on_one_folder_run_a_step_once(tmp_path: Path) -> None:
    runs, go = tmp_path / "runs", tmp_path / "go"
    slow = step("slow", SLOW.format(runs=str(runs), go=str(go)))
    results: list[tuple[dict[str, StepRecord], list[str]]] = []
    chains = [threading.Thread(target=lambda: results.append(run(tmp_path, [slow]))) for _ in range(2)]
    for chain in chains:
        chain.start()
    wait_for(runs)
    time.sleep(1)
    go.touch()
    for chain in chains:
        chain.join()
    assert len(runs.read_text(encoding="utf-8").split()) == 1
    assert [records["slow"].state for records, _ in results] == ["done", "done"]
    lines = [line for _, own in results for line in own]
    assert lines.count("slow: another process runs it; waits until that has ended") == 1
    assert lines.count("slow: is there") == 1


def test_what_a_killed_chain_has_left_running_is_waited_for(tmp_path: Path) -> None:
    """SIGKILL ends only the chain: its step goes on, and a new chain must not run it beside."""
    runs, go = tmp_path / "runs", tmp_path / "go"
    code = SLOW.format(runs=str(runs), go=str(go))
    chain = (
        "from pathlib import Path; from lmms_prune.reproduce.chain import Step\n"
        "from lmms_prune.reproduce.runner import ChainProgress, Surroundings, run_chain\n"
        f"steps = [Step('slow', ({code!r},), ('fig1',), 'one')]\n"
        f"around = Surroundings(Path({str(tmp_path)!r}), program={PROGRAM!r})\n"
        "run_chain(steps, around, ChainProgress(steps, lambda line: None, lambda *counts: None), 1)"
    )
    killed = subprocess.Popen([sys.executable, "-c", chain])
    number = int(wait_for(runs))
    killed.kill()
    killed.wait()
    assert not has_ended(number)
    results: list[dict[str, StepRecord]] = []
    later = threading.Thread(target=lambda: results.append(run(tmp_path, [step("slow", code)])[0]))
    later.start()
    time.sleep(1)
    assert len(runs.read_text(encoding="utf-8").split()) == 1
    go.touch()
    later.join()
    assert has_ended(number)
    assert results[0]["slow"].state == "done"
    assert len(runs.read_text(encoding="utf-8").split()) == 2


def has_ended(number: int) -> bool:
    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT interrupts, although tests that were started in the background inherit that it is ignored."""
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, inherited)


@pytest.mark.usefixtures("interruptible")
def test_an_interruption_ends_what_runs_and_the_same_command_goes_on(tmp_path: Path) -> None:
    """The step's own child, too; a later call starts the step again."""
    child, marker = tmp_path / "child", tmp_path / "go"
    slow = (
        "import os, pathlib, subprocess, sys, time\n"
        f"if pathlib.Path({str(marker)!r}).exists(): sys.exit(0)\n"
        "one = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(child)!r}).write_text(str(one.pid))\n"
        "time.sleep(600)"
    )

    def interrupt() -> None:
        while not (child.exists() and child.read_text(encoding="utf-8")):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, [step("slow", slow), step("next", "print(1)")])
    number = int(child.read_text(encoding="utf-8"))
    deadline = time.monotonic() + 60  # of a loaded machine
    while not has_ended(number):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert read_record(tmp_path / "steps" / "slow").state == "stopped"
    assert read_record(tmp_path / "steps" / "next").state == "not run"
    marker.touch()
    records, _ = run(tmp_path, [step("slow", slow), step("next", "print(1)")])
    assert {record.state for record in records.values()} == {"done"}


def test_a_damaged_record_counts_as_none(tmp_path: Path) -> None:
    one = step("one", "print(1)")
    run(tmp_path, [one])
    for text in ("", "{", "[]", '{"state": "done", "unknown": 1}'):
        (tmp_path / "steps" / "one" / "record.json").write_text(text, encoding="utf-8")
        assert not is_finished(one, Surroundings(tmp_path))


def test_a_step_ends_with_its_program(tmp_path: Path) -> None:
    """A child that keeps the pipes open does not keep the chain from going on."""
    code = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); print(1)"
    start = time.monotonic()
    records, _ = run(tmp_path, [step("leaves", code)])
    assert records["leaves"].state == "done"
    assert time.monotonic() - start < 50
    assert subprocess.run(["true"], check=False).returncode == 0
