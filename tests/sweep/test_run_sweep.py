"""The loop over the units: what is skipped, replaced, left to others, and what a failure leaves standing."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from sweeps import Processes, config, leave_results

from lmms_prune.harness import fingerprint
from lmms_prune.harness.arguments import split
from lmms_prune.record.files import WriteError, write
from lmms_prune.sweep.results import STAMP, damage, publish, redact_files, seconds_if_complete
from lmms_prune.sweep.run import Outcome, run_sweep, time_left
from lmms_prune.sweep.units import PARTIAL, SweepError, Unit, plan
from lmms_prune.sweep.worker import with_journal


@pytest.fixture
def units(tmp_path: Path) -> list[Unit]:
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, schedule in (("a", "none"), ("b", "vtw@5")):
        config(folder, name, schedule)
    return plan([folder], tmp_path / "out")


@contextmanager
def held_by_another_process(path: str) -> Iterator[None]:
    """What a second sweep does; within one process some file systems give the same lock twice."""
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate()


def states(units: list[Unit]) -> list[str]:
    return [outcome.state for outcome in run_sweep(units, "", ())]


def test_a_second_sweep_does_nothing_again(units: list[Unit], processes: Processes) -> None:
    assert states(units) == ["done"] * 4
    assert processes.started == 1
    assert states(units) == ["skipped"] * 4
    assert len(processes.evaluated) == 4
    # Nothing but results is left.
    assert not (units[0].out / PARTIAL).exists()
    files = {path.name for path in units[0].folder.iterdir()}
    assert files == {"some__model", "submissions", "log.txt", STAMP}


def test_results_say_where_they_stand(units: list[Unit], processes: Processes) -> None:
    assert states(units[:1]) == ["done"]
    (path,) = (units[0].folder / "some__model").glob("*_results.json")
    said = json.loads(path.read_text(encoding="utf-8"))["config"]
    assert said["model_args"] == units[0].settings["model_args"]
    assert said["resolved_cli_args"] == {
        "model_args": units[0].settings["model_args"],
        "output_path": str(units[0].folder),
        "hf_hub_log_args": f",output_path={units[0].folder}",
    }


def test_a_failure_is_told_and_ends_nothing_else(units: list[Unit], processes: Processes) -> None:
    processes.fails = lambda unit: (unit.name, unit.task) == ("a", "pope")
    outcomes = list(run_sweep(units, "", ()))
    assert [outcome.state for outcome in outcomes] == ["failed", "done", "done", "done"]
    assert outcomes[0].reason.startswith("ValueError: no (exit code 1)\n  log: ")
    log = units[0].partial / "log.txt"
    assert str(log) in outcomes[0].reason
    assert log.is_file()
    assert processes.started == 2  # a process that failed is not used again
    assert not units[0].folder.exists()
    processes.fails = lambda unit: False
    assert states(units) == ["done", "skipped", "skipped", "skipped"]


def test_what_all_share_is_met_once(units: list[Unit], processes: Processes) -> None:
    """What is complete is told as such all the same, and what went well shows that not all share it."""
    assert states(units[2:3]) == ["done"]
    processes.fails, processes.scope = lambda unit: True, "environment"
    assert states(units) == ["failed", "untried", "skipped", "untried"]
    assert len(processes.evaluated) == 2
    processes.fails = lambda unit: (unit.name, unit.task) == ("b", "ocrbench")
    assert states(units) == ["done", "done", "skipped", "failed"]
    processes.fails = lambda unit: unit.task == "pope"
    for unit in units:
        shutil.rmtree(unit.folder, ignore_errors=True)
    assert states(units[1:]) == ["done", "failed", "done"]


def test_what_a_checkpoint_fails_for_ends_its_units_only(units: list[Unit], processes: Processes) -> None:
    others = [replace(unit, weights=("other",), name=f"other-{unit.name}") for unit in units]
    processes.fails, processes.scope = lambda unit: not unit.name.startswith("other"), "checkpoint"
    outcomes = list(run_sweep([*units, *others], "", ()))
    assert [outcome.state for outcome in outcomes] == ["failed", *["untried"] * 3, *["done"] * 4]
    # The first unit of a checkpoint went well: what fails later is that unit's own matter.
    processes.fails = lambda unit: unit.task == "ocrbench"
    assert states(units) == ["done", "failed", "done", "failed"]


def test_only_complete_results_count(units: list[Unit], processes: Processes) -> None:
    unit = units[0]
    for broken in ("nothing", "results", "score", "samples", "few", "doubled", "cut"):
        unit.partial.mkdir(parents=True, exist_ok=True)
        leave_results(unit, score=float("nan") if broken == "score" else 0.5)
        (results,) = (unit.partial / "some__model").glob("*_results.json")
        samples = results.with_name(f"20260101_000000_samples_{unit.task}.jsonl")
        lines = samples.read_text(encoding="utf-8").splitlines(keepends=True)
        if broken == "results":
            results.unlink()
        elif broken == "samples":
            samples.unlink()
        elif broken == "few":
            samples.write_text("".join(lines[:-1]), encoding="utf-8")
        elif broken == "doubled":
            samples.write_text("".join([*lines, lines[0]]), encoding="utf-8")
        elif broken == "cut":
            samples.write_text("".join(lines)[:-5], encoding="utf-8")
        problem = publish(unit, 1.0, ())
        assert (problem is None) == (broken == "nothing"), broken
        assert unit.folder.exists()  # that of the first round
        for path in sorted(unit.partial.rglob("*"), reverse=True) if unit.partial.exists() else []:
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("change", ["settings", "versions", "code", "truncated", "no stamp"])
def test_other_settings_versions_or_code_are_made_anew(
    change: str, units: list[Unit], processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = units[0]
    assert states([unit]) == ["done"]
    assert seconds_if_complete(unit) is not None
    again = unit
    if change == "settings":
        again = replace(unit, settings={**unit.settings, "limit": 5})
    elif change == "versions":
        monkeypatch.setattr("lmms_prune.sweep.results.versions", lambda: {"torch": "1.0"})
    elif change == "code":
        monkeypatch.setattr("lmms_prune.sweep.results.code", lambda: "another")
    elif change == "truncated":
        (samples,) = unit.folder.rglob("*.jsonl")
        samples.write_text(samples.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    else:
        (unit.folder / STAMP).unlink()
    assert seconds_if_complete(again) is None
    assert states([again]) == ["done"]
    assert seconds_if_complete(again) is not None
    # The new results have taken the place of the old ones.
    assert len(list(unit.folder.rglob("*samples*"))) == 1
    assert [path.name for path in unit.folder.parent.iterdir()] == [unit.task]


@pytest.mark.parametrize("content", ["[1, 2]", "{}", "null", "5", '{"results": []}', '{"config": {}, "results": []}'])
def test_a_result_that_was_written_over_is_named_and_made_anew(
    content: str, units: list[Unit], processes: Processes
) -> None:
    """Whatever size it has now."""
    unit = units[0]
    assert states([unit]) == ["done"]
    assert damage(unit) is None
    (path,) = (unit.folder / "some__model").glob("*_results.json")
    for text in (content, content.ljust(path.stat().st_size)):
        path.write_text(text, encoding="utf-8")
        assert seconds_if_complete(unit) is None
        assert str(damage(unit)).startswith(f"{path}: damaged: ")
        assert states([unit]) == ["done"]
        assert damage(unit) is None


@pytest.mark.parametrize("content", ["[1, 2]", "{}", "null", '{"config": {}, "results": {}}'])
def test_a_result_that_is_none_is_named_and_not_published(
    content: str, units: list[Unit], processes: Processes
) -> None:
    unit = units[0]
    leave_results(unit)
    (path,) = (unit.partial / "some__model").glob("*_results.json")
    path.write_text(content, encoding="utf-8")
    assert str(publish(unit, 1.0, ())).startswith(f"{path}: damaged: ")
    assert not unit.folder.exists()


def test_a_prompts_file_is_part_of_what_a_result_is_made_from(tmp_path: Path, processes: Processes) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Look closely.", encoding="utf-8")
    path = config(tmp_path, "a", "none", tasks="pope", system_prompt=prompt)
    for text, state in (("Look closely.", "done"), ("Look closely.", "skipped"), ("Look again.", "done")):
        if prompt.read_text(encoding="utf-8") != text:
            prompt.write_text(text, encoding="utf-8")
        assert states(plan([path], tmp_path / "out")) == [state]


def test_where_the_files_lie_does_not_matter(units: list[Unit], processes: Processes, tmp_path: Path) -> None:
    assert states(units) == ["done"] * 4
    moved = tmp_path / "moved"
    units[0].out.rename(moved)
    (tmp_path / "configs").rename(tmp_path / "elsewhere")
    assert states(plan([tmp_path / "elsewhere"], moved)) == ["skipped"] * 4


def test_what_another_sweep_is_at_work_on_is_left_to_it(units: list[Unit], processes: Processes) -> None:
    units[0].partial.parent.mkdir(parents=True)
    with held_by_another_process(f"{units[0].partial}.lock"):
        assert states(units) == ["busy", "done", "done", "done"]
    assert states(units) == ["done", "skipped", "skipped", "skipped"]


def test_interrupted_it_leaves_no_result_and_goes_on(units: list[Unit], processes: Processes) -> None:
    def interrupt(unit: Unit) -> bool:
        if unit.task == "ocrbench":
            leave_results(unit)  # all is written, nothing is published
            raise KeyboardInterrupt
        return False

    processes.fails = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(run_sweep(units, "", ()))
    assert seconds_if_complete(units[0]) is not None
    assert not units[1].folder.exists()
    processes.fails = lambda unit: False
    assert states(units) == ["skipped", "done", "done", "done"]


def test_the_time_left_is_that_of_the_same_tasks(units: list[Unit]) -> None:
    assert time_left(units, []) is None
    first = [Outcome(units[0], "done", 10.0)]
    assert time_left(units, first) == 30.0  # nothing is known of the other task
    both = [*first, Outcome(units[1], "skipped", 2.0)]
    assert time_left(units, both) == 12.0
    assert time_left(units, [*both, Outcome(units[2], "failed", 500.0)]) == 2.0
    assert time_left(units, [Outcome(units[0], "failed", 10.0)]) is None


def test_the_codes_digest_is_of_what_evaluations_run_through() -> None:
    """No module of an evaluation may stand aside, whatever imports it."""
    from test_architecture import BELOW

    reached, new = {"harness"}, {"harness"}
    while new:
        new = {below for part in new for below in BELOW[part]} - reached
        reached |= new
    assert not reached & set(fingerprint.ASIDE)
    assert {"pruning", "methods", "models", "schedule"} <= reached
    assert fingerprint.code() == fingerprint.code.__wrapped__()


def test_a_journal_outlives_an_interruption_and_goes_with_the_result(units: list[Unit], processes: Processes) -> None:
    unit = units[0]

    def dies(_: Unit) -> bool:
        unit.journal.mkdir()
        (unit.journal / "answers").write_text("some", encoding="utf-8")
        return True

    processes.fails = dies
    assert states([unit]) == ["failed"]
    assert (unit.journal / "answers").is_file()

    def goes_on(_: Unit) -> bool:
        assert (unit.journal / "answers").is_file()
        return False

    processes.fails = goes_on
    assert states([unit]) == ["done"]
    assert not unit.journal.exists()
    # Killed after the result was complete, before the journal was gone.
    unit.journal.mkdir(parents=True)
    assert states([unit]) == ["skipped"]
    assert not (unit.out / PARTIAL).exists()


@pytest.mark.parametrize("given", ["text", "mapping", "nothing"])
def test_evaluations_are_asked_for_a_journal(given: str, units: list[Unit]) -> None:
    arguments: dict[str, object] = {
        "text": "pretrained=x,schedule=dart@2:0.44,vtw@3, ",
        "mapping": {"pretrained": "x", "schedule": ["dart@2:0.44", "vtw@3"]},
        "nothing": None,
    }
    unit = replace(units[0], settings={**units[0].settings, "model_args": arguments[given]})
    asked = with_journal(unit)
    read = split(asked) if isinstance(asked, str) else dict(asked)
    assert read.pop("journal") == str(unit.journal)
    if given == "text":
        assert read == {"pretrained": "x", "schedule": "dart@2:0.44,vtw@3"}
    else:
        assert read == (arguments[given] or {})


def test_a_journal_of_the_configurations_own_is_refused(tmp_path: Path) -> None:
    path = config(tmp_path, "a", "none", journal=tmp_path / "kept")
    with pytest.raises(SweepError, match=r"model_args: journal: a sweep keeps one .*; leave it out"):
        plan([path], tmp_path / "out")


def test_a_file_that_cannot_be_freed_of_secrets_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"a.json": '{"token": "secret-word"}', "b.txt": "secret-word", "c.txt": "none"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    def full(path: Path, content: bytes) -> None:
        raise WriteError(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    monkeypatch.setattr("lmms_prune.sweep.results.write", full)
    problem = redact_files(tmp_path, ("secret-word",))
    assert problem is not None
    assert "cannot be freed of secrets: No space left on device; it was removed" in problem
    assert [path.name for path in tmp_path.iterdir()] == ["c.txt"]


def test_a_full_disk_fails_the_unit_and_publishes_nothing(
    units: list[Unit], processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: str | bytes) -> None:
        if path.name == STAMP:
            raise WriteError(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("lmms_prune.sweep.results.write", full)
        [outcome] = run_sweep(units[:1], "", ())
    assert outcome.state == "failed"
    assert (
        f"its files cannot be completed: {units[0].partial / STAMP} cannot be written: No space left" in outcome.reason
    )
    assert not units[0].folder.exists()
    assert states(units[:1]) == ["done"]
