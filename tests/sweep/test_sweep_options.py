"""`lmms-prune sweep` without evaluations."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from click.testing import Result
from sweeps import config
from typer.testing import CliRunner

from lmms_prune.cli import app
from lmms_prune.sweep import commands
from lmms_prune.sweep.jobs import PARTIAL
from lmms_prune.sweep.run import JobOutcome


def sweep(*options: str | Path) -> Result:
    return CliRunner().invoke(app, ["sweep", *map(str, options)])


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    folder = tmp_path / "configs"
    folder.mkdir()
    config(folder, "a", "none")
    config(folder, "b", "vtw@5")
    return folder


def test_wrong_options_end_the_command_with_2(configs: Path, tmp_path: Path) -> None:
    hybrid = configs / "a.yaml"
    for options, message in (
        (("--shard", "9/8"), "--shard 9/8: write the part"),
        (("--cluster", "pbs"), "--cluster pbs: use slurm or local."),
        (("--cluster", "local", "--shard", "1/2"), "--shard 1/2 and --cluster local both divide the work"),
        (("--cluster", "local", "--cluster-option", "x"), "--cluster-option x: write name=value"),
        (("--cluster", "local", "--cluster-option", "no_such=1"), "no_such"),
        (("--sample", "2", "--limit", "2"), "--sample 2 and --limit 2: the first draws documents at random"),
        (("--sample-seed", "2"), "--sample-seed 2: nothing is drawn; give --sample too"),
        (("--launch", "no-such-launcher -n 2"), "--launch no-such-launcher -n 2: no-such-launcher: No such file"),
    ):
        done = sweep(hybrid, "--out", tmp_path / "out", *options)
        assert done.exit_code == 2, (options, done.stdout, done.stderr)
        assert message in done.stderr
    assert not list(tmp_path.glob("out/[!.]*"))


def test_a_draw_is_refused_where_a_file_skips_documents(configs: Path, tmp_path: Path) -> None:
    path = config(configs, "c", "none")
    path.write_text(path.read_text(encoding="utf-8") + "offset: 3\n", encoding="utf-8")
    done = sweep(configs, "--out", tmp_path / "out", "--sample", "2")
    assert (done.exit_code, "c, pope: its file says offset: 3; --sample draws from all" in done.stderr) == (2, True)


def test_a_cluster_job_draws_the_same_documents(configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    submitted: list[Mapping[str, object]] = []

    def submit(jobs: object, paths: object, options: Mapping[str, object], *others: object) -> Iterator[JobOutcome]:
        submitted.append(options)
        yield from ()

    monkeypatch.setattr(commands, "draw_jobs", lambda jobs, draw: jobs)
    monkeypatch.setattr("lmms_prune.sweep.cluster.run_on_cluster", submit)
    done = sweep(configs, "--out", tmp_path / "out", "--sample", "2", "--sample-seed", "7", "--cluster", "local")
    assert done.exit_code == 0, done.output
    [options] = submitted
    assert (options["--sample"], options["--sample-seed"], options["--limit"]) == (2, 7, None)


def test_a_dry_run_only_reports(configs: Path, tmp_path: Path) -> None:
    done = sweep(configs, "--out", tmp_path / "out", "--dry-run", "--tasks", "mme")
    assert done.stdout.splitlines() == ["would run: a, mme", "would run: b, mme"]
    assert not (tmp_path / "out").exists()


def test_a_damaged_result_is_named(configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sweeps import Processes

    monkeypatch.setattr("lmms_prune.sweep.run.Worker", Processes())
    command = ["sweep", str(configs), "--out", str(tmp_path / "out"), "--tasks", "pope"]
    assert CliRunner().invoke(app, command).exit_code == 0
    assert CliRunner().invoke(app, [*command, "--dry-run"]).exit_code == 0
    (path,) = (tmp_path / "out" / "a" / "pope" / "some__model").glob("*_results.json")
    path.write_text("[1, 2]", encoding="utf-8")
    dry = CliRunner().invoke(app, [*command, "--dry-run"])
    assert dry.exit_code == 1
    assert dry.stdout.splitlines() == ["damaged: a, pope", "complete: b, pope"]
    assert f"a, pope: {path}: damaged: " in dry.stderr
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0
    assert f"a, pope: {path}: damaged: " in done.stderr
    assert "1 evaluated, 1 complete before" in done.stdout


def test_mistakes_in_files_are_reported_before_anything_runs(configs: Path, tmp_path: Path) -> None:
    config(configs, "c", "drat@2:0.5")
    done = sweep(configs, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert "c.yaml: schedule: unknown method 'drat' in stage 1. Did you mean 'dart'?" in done.stderr
    assert not (tmp_path / "out").exists()


def test_failures_are_reported_at_once_and_an_interruption_says_how_to_resume(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(jobs, launch, secrets):
        yield JobOutcome(jobs[0], "failed", 2.0, "no such device\n  log: here")
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "run_sweep", interrupted)
    out = tmp_path / "out"
    done = CliRunner().invoke(app, ["sweep", str(configs), "--out", str(out), "--tasks", "mme"])
    assert done.exit_code != 0
    assert "failed: a, mme, 0:00:02 (1 of 2)\n  no such device\n" in done.output
    assert "log: here" not in done.output
    assert "interrupted after 1 of 2; the same command resumes from here." in done.stderr


@pytest.mark.parametrize(
    "options", [("--cluster-option", "slurm_comment=horse battery"), ("--launch", "run hf_" + "x1" * 17)]
)
def test_a_secret_in_a_jobs_files_is_refused(options: tuple[str, str], configs: Path, tmp_path: Path) -> None:
    """The files hold the command and the script; the scheduler passes the environment on without writing it there."""
    command = ["sweep", str(configs), "--out", str(tmp_path / "out"), "--cluster", "local", *options]
    done = CliRunner().invoke(app, command, env={"SOME_PASSWORD": "horse battery"})
    assert done.exit_code == 2
    assert "[REDACTED]' holds a secret, which would be written to the jobs' files; set it as an" in done.stderr
    assert "horse" not in done.output
    assert "hf_x1" not in done.output
    assert not (tmp_path / "out").exists()


def test_the_stack_trace_of_a_sweep_holds_no_secret(
    configs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a cluster the stack trace goes to the job's log."""

    def fails(jobs, launch, secrets):
        raise KeyError("horse battery")
        yield

    monkeypatch.setattr(commands, "run_sweep", fails)
    command = ["sweep", str(configs), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command, env={"SOME_PASSWORD": "horse battery"})
    assert done.exit_code == 1
    assert done.stderr.rstrip().endswith("KeyError: '[REDACTED]'")
    assert "Traceback" in done.stderr


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    path = config(tmp_path, "a", "none", "pope")
    monkeypatch.setattr(Path, "mkdir", read_only)
    done = sweep(path, "--out", tmp_path / "out")
    assert done.exit_code == 2
    assert done.output.endswith(f"lmms-prune: {tmp_path}/out/{PARTIAL} cannot be written: Read-only file system.\n")
