"""The loop over the jobs: which are skipped, replaced or left to other sweeps, and what a failure stops."""

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
from lmms_prune.sweep.jobs import PARTIAL, Job, SweepError, plan
from lmms_prune.sweep.results import STAMP, damage, publish, redact_files, seconds_if_complete
from lmms_prune.sweep.run import JobOutcome, run_sweep, time_left
from lmms_prune.sweep.worker import with_journal


@pytest.fixture
def jobs(tmp_path: Path) -> list[Job]:
    folder = tmp_path / "configs"
    folder.mkdir()
    for name, schedule in (("a", "none"), ("b", "vtw@5")):
        config(folder, name, schedule)
    return plan([folder], tmp_path / "out")


@contextmanager
def held_by_another_process(path: str) -> Iterator[None]:
    """Hold the lock in a second process: on some file systems one process can take the same lock twice."""
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]); lock.acquire(); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate()


def states(jobs: list[Job]) -> list[str]:
    return [outcome.state for outcome in run_sweep(jobs, "", ())]


def test_a_second_sweep_does_nothing_again(jobs: list[Job], processes: Processes) -> None:
    assert states(jobs) == ["done"] * 4
    assert processes.started == 1
    assert states(jobs) == ["skipped"] * 4
    assert len(processes.evaluated) == 4
    # Only results remain.
    assert not (jobs[0].out / PARTIAL).exists()
    files = {path.name for path in jobs[0].folder.iterdir()}
    assert files == {"some__model", "submissions", "log.txt", STAMP}


def test_results_files_name_their_final_folder(jobs: list[Job], processes: Processes) -> None:
    assert states(jobs[:1]) == ["done"]
    (path,) = (jobs[0].folder / "some__model").glob("*_results.json")
    recorded = json.loads(path.read_text(encoding="utf-8"))["config"]
    assert recorded["model_args"] == jobs[0].settings["model_args"]
    assert recorded["resolved_cli_args"] == {
        "model_args": jobs[0].settings["model_args"],
        "output_path": str(jobs[0].folder),
        "hf_hub_log_args": f",output_path={jobs[0].folder}",
    }


def test_a_failure_is_reported_and_stops_no_other_job(jobs: list[Job], processes: Processes) -> None:
    processes.fails = lambda job: (job.name, job.task) == ("a", "pope")
    outcomes = list(run_sweep(jobs, "", ()))
    assert [outcome.state for outcome in outcomes] == ["failed", "done", "done", "done"]
    assert outcomes[0].reason.startswith("ValueError: no (exit code 1)\n  log: ")
    log = jobs[0].partial / "log.txt"
    assert str(log) in outcomes[0].reason
    assert log.is_file()
    assert processes.started == 2  # a process that failed is not used again
    assert not jobs[0].folder.exists()
    processes.fails = lambda job: False
    assert states(jobs) == ["done", "skipped", "skipped", "skipped"]


def test_a_failure_of_the_environment_is_met_once(jobs: list[Job], processes: Processes) -> None:
    """Complete jobs are still reported as skipped, and an earlier success shows that not all jobs share the failure."""
    assert states(jobs[2:3]) == ["done"]
    processes.fails, processes.scope = lambda job: True, "environment"
    assert states(jobs) == ["failed", "untried", "skipped", "untried"]
    assert len(processes.evaluated) == 2
    processes.fails = lambda job: (job.name, job.task) == ("b", "ocrbench")
    assert states(jobs) == ["done", "done", "skipped", "failed"]
    processes.fails = lambda job: job.task == "pope"
    for job in jobs:
        shutil.rmtree(job.folder, ignore_errors=True)
    assert states(jobs[1:]) == ["done", "failed", "done"]


def test_a_failure_of_a_checkpoint_stops_its_jobs_only(jobs: list[Job], processes: Processes) -> None:
    others = [replace(job, weights=("other",), name=f"other-{job.name}") for job in jobs]
    processes.fails, processes.scope = lambda job: not job.name.startswith("other"), "checkpoint"
    outcomes = list(run_sweep([*jobs, *others], "", ()))
    assert [outcome.state for outcome in outcomes] == ["failed", *["untried"] * 3, *["done"] * 4]
    # The checkpoint's first job succeeded, so a later failure concerns only the job that failed.
    processes.fails = lambda job: job.task == "ocrbench"
    assert states(jobs) == ["done", "failed", "done", "failed"]


def test_only_complete_results_count(jobs: list[Job], processes: Processes) -> None:
    job = jobs[0]
    for broken in ("nothing", "results", "score", "samples", "few", "doubled", "cut"):
        job.partial.mkdir(parents=True, exist_ok=True)
        leave_results(job, score=float("nan") if broken == "score" else 0.5)
        (results,) = (job.partial / "some__model").glob("*_results.json")
        samples = results.with_name(f"20260101_000000_samples_{job.task}.jsonl")
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
        problem = publish(job, 1.0, ())
        assert (problem is None) == (broken == "nothing"), broken
        assert job.folder.exists()  # that of the first round
        for path in sorted(job.partial.rglob("*"), reverse=True) if job.partial.exists() else []:
            path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("change", ["settings", "versions", "code", "truncated", "no stamp"])
def test_other_settings_versions_or_code_are_evaluated_again(
    change: str, jobs: list[Job], processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = jobs[0]
    assert states([job]) == ["done"]
    assert seconds_if_complete(job) is not None
    again = job
    if change == "settings":
        again = replace(job, settings={**job.settings, "limit": 5})
    elif change == "versions":
        monkeypatch.setattr("lmms_prune.sweep.results.versions", lambda: {"torch": "1.0"})
    elif change == "code":
        monkeypatch.setattr("lmms_prune.sweep.results.code", lambda: "another")
    elif change == "truncated":
        (samples,) = job.folder.rglob("*.jsonl")
        samples.write_text(samples.read_text(encoding="utf-8")[:-9], encoding="utf-8")
    else:
        (job.folder / STAMP).unlink()
    assert seconds_if_complete(again) is None
    assert states([again]) == ["done"]
    assert seconds_if_complete(again) is not None
    # The new results have taken the place of the old ones.
    assert len(list(job.folder.rglob("*samples*"))) == 1
    assert [path.name for path in job.folder.parent.iterdir()] == [job.task]


@pytest.mark.parametrize("content", ["[1, 2]", "{}", "null", "5", '{"results": []}', '{"config": {}, "results": []}'])
def test_an_overwritten_result_is_named_and_evaluated_again(
    content: str, jobs: list[Job], processes: Processes
) -> None:
    """Damage is found even if the size did not change."""
    job = jobs[0]
    assert states([job]) == ["done"]
    assert damage(job) is None
    (path,) = (job.folder / "some__model").glob("*_results.json")
    for text in (content, content.ljust(path.stat().st_size)):
        path.write_text(text, encoding="utf-8")
        assert seconds_if_complete(job) is None
        assert str(damage(job)).startswith(f"{path}: damaged: ")
        assert states([job]) == ["done"]
        assert damage(job) is None


@pytest.mark.parametrize("content", ["[1, 2]", "{}", "null", '{"config": {}, "results": {}}'])
def test_an_invalid_result_is_named_and_not_published(content: str, jobs: list[Job], processes: Processes) -> None:
    job = jobs[0]
    leave_results(job)
    (path,) = (job.partial / "some__model").glob("*_results.json")
    path.write_text(content, encoding="utf-8")
    assert str(publish(job, 1.0, ())).startswith(f"{path}: damaged: ")
    assert not job.folder.exists()


def test_a_result_depends_on_its_prompts_file(tmp_path: Path, processes: Processes) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("Look closely.", encoding="utf-8")
    path = config(tmp_path, "a", "none", tasks="pope", system_prompt=prompt)
    for text, state in (("Look closely.", "done"), ("Look closely.", "skipped"), ("Look again.", "done")):
        if prompt.read_text(encoding="utf-8") != text:
            prompt.write_text(text, encoding="utf-8")
        assert states(plan([path], tmp_path / "out")) == [state]


def test_the_folder_of_the_files_does_not_matter(jobs: list[Job], processes: Processes, tmp_path: Path) -> None:
    assert states(jobs) == ["done"] * 4
    moved = tmp_path / "moved"
    jobs[0].out.rename(moved)
    (tmp_path / "configs").rename(tmp_path / "elsewhere")
    assert states(plan([tmp_path / "elsewhere"], moved)) == ["skipped"] * 4


def test_a_job_that_another_sweep_evaluates_is_left_to_it(jobs: list[Job], processes: Processes) -> None:
    jobs[0].partial.parent.mkdir(parents=True)
    with held_by_another_process(f"{jobs[0].partial}.lock"):
        assert states(jobs) == ["busy", "done", "done", "done"]
    assert states(jobs) == ["done", "skipped", "skipped", "skipped"]


def test_an_interrupted_sweep_leaves_no_result_and_resumes(jobs: list[Job], processes: Processes) -> None:
    def interrupt(job: Job) -> bool:
        if job.task == "ocrbench":
            leave_results(job)  # all is written, nothing is published
            raise KeyboardInterrupt
        return False

    processes.fails = interrupt
    with pytest.raises(KeyboardInterrupt):
        list(run_sweep(jobs, "", ()))
    assert seconds_if_complete(jobs[0]) is not None
    assert not jobs[1].folder.exists()
    processes.fails = lambda job: False
    assert states(jobs) == ["skipped", "done", "done", "done"]


def test_the_time_left_is_estimated_from_the_same_tasks(jobs: list[Job]) -> None:
    assert time_left(jobs, []) is None
    first = [JobOutcome(jobs[0], "done", 10.0)]
    assert time_left(jobs, first) == 30.0  # nothing is known of the other task
    both = [*first, JobOutcome(jobs[1], "skipped", 2.0)]
    assert time_left(jobs, both) == 12.0
    assert time_left(jobs, [*both, JobOutcome(jobs[2], "failed", 500.0)]) == 2.0
    assert time_left(jobs, [JobOutcome(jobs[0], "failed", 10.0)]) is None


def test_the_digest_of_code_covers_what_evaluations_run_through() -> None:
    """The digest must include every module that an evaluation imports."""
    from test_architecture import BELOW

    reached, new = {"harness"}, {"harness"}
    while new:
        new = {below for part in new for below in BELOW[part]} - reached
        reached |= new
    assert not reached & set(fingerprint.ASIDE)
    assert {"pruning", "methods", "models", "schedule"} <= reached
    assert fingerprint.code() == fingerprint.code.__wrapped__()


def test_a_journal_outlives_an_interruption_and_is_deleted_with_the_result(
    jobs: list[Job], processes: Processes
) -> None:
    job = jobs[0]

    def dies(_: Job) -> bool:
        job.journal.mkdir()
        (job.journal / "answers").write_text("some", encoding="utf-8")
        return True

    processes.fails = dies
    assert states([job]) == ["failed"]
    assert (job.journal / "answers").is_file()

    def goes_on(_: Job) -> bool:
        assert (job.journal / "answers").is_file()
        return False

    processes.fails = goes_on
    assert states([job]) == ["done"]
    assert not job.journal.exists()
    # Killed after the result was complete, before the journal was gone.
    job.journal.mkdir(parents=True)
    assert states([job]) == ["skipped"]
    assert not (job.out / PARTIAL).exists()


@pytest.mark.parametrize("form", ["text", "mapping", "nothing"])
def test_every_evaluation_keeps_a_journal(form: str, jobs: list[Job]) -> None:
    arguments: dict[str, object] = {
        "text": "pretrained=x,schedule=dart@2:0.44,vtw@3, ",
        "mapping": {"pretrained": "x", "schedule": ["dart@2:0.44", "vtw@3"]},
        "nothing": None,
    }
    job = replace(jobs[0], settings={**jobs[0].settings, "model_args": arguments[form]})
    asked = with_journal(job)
    read = split(asked) if isinstance(asked, str) else dict(asked)
    assert read.pop("journal") == str(job.journal)
    if form == "text":
        assert read == {"pretrained": "x", "schedule": "dart@2:0.44,vtw@3"}
    else:
        assert read == (arguments[form] or {})


def test_a_journal_in_a_configuration_is_refused(tmp_path: Path) -> None:
    path = config(tmp_path, "a", "none", journal=tmp_path / "kept")
    with pytest.raises(SweepError, match=r"model_args: journal: a sweep keeps one .*; leave it out"):
        plan([path], tmp_path / "out")


def test_a_file_that_cannot_be_redacted_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in {"a.json": '{"token": "secret-word"}', "b.txt": "secret-word", "c.txt": "none"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")

    def full(path: Path, content: bytes) -> None:
        raise WriteError(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    monkeypatch.setattr("lmms_prune.sweep.results.write", full)
    problem = redact_files(tmp_path, ("secret-word",))
    assert problem is not None
    assert "cannot be freed of secrets: No space left on device; it was removed" in problem
    assert [path.name for path in tmp_path.iterdir()] == ["c.txt"]


def test_a_full_disk_fails_the_job_and_publishes_nothing(
    jobs: list[Job], processes: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, content: str | bytes) -> None:
        if path.name == STAMP:
            raise WriteError(path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        write(path, content)

    with monkeypatch.context() as patch:
        patch.setattr("lmms_prune.sweep.results.write", full)
        [outcome] = run_sweep(jobs[:1], "", ())
    assert outcome.state == "failed"
    assert (
        f"its files cannot be completed: {jobs[0].partial / STAMP} cannot be written: No space left" in outcome.reason
    )
    assert not jobs[0].folder.exists()
    assert states(jobs[:1]) == ["done"]
