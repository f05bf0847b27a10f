"""Evaluations that share processes, with a stand-in for lmms-eval whose failures the test chooses."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lmms_prune.demo import processes
from lmms_prune.demo.processes import DemoRun, RunError, evaluate
from lmms_prune.record.redaction import secret_values
from lmms_prune.terminal.console import ended_by_sigterm

# Writes its process into the results, and a submission of the same name; "refused" ends the process, "broken" only a run.
# "unusable" is what an import error of lmms-eval's own leaves, "other" what a version that is not supported does, "early" an
# lmms-eval that cannot be started; "slow" goes on for a minute.
STAND_IN = """#!{python}
import json, os, sys, time, yaml
from pathlib import Path
words = sys.argv[1:]
flags = ["--log_samples"]
options = dict(zip(*[iter(word for word in words if word not in flags)] * 2))
runs = yaml.safe_load(Path(options["--config"]).read_text()) if "--config" in options else [
    {{name.removeprefix("--"): value for name, value in options.items()}}
]
for number, run in enumerate(runs):
    print("INFO starts", run["model_args"], {{"token": os.environ.get("HF_TOKEN")}}, flush=True)
    if "refused" in run["model_args"]:
        sys.exit(print("lmms-prune: error: no\\n    such thing", file=sys.stderr) or 2)
    if "other" in run["model_args"]:
        note = "lmms-prune: every run in this environment fails like this:"
        sys.exit(print(note + "\\nlmms-prune: error: torch 1.0 is installed", file=sys.stderr) or 2)
    if "early" in run["model_args"]:
        raise AttributeError("module 'numpy' has no attribute 'x'")
    if "unusable" in run["model_args"]:
        print("Traceback (most recent call last):\\nModuleNotFoundError: No module named 'filelock._api'")
        print("ERROR - Error during evaluation: No module named 'filelock._api'.", flush=True)
    if "slow" in run["model_args"] or "unusable" in run["model_args"]:
        time.sleep(60)
    if "broken" in run["model_args"]:
        print("Traceback (most recent call last):\\nOops: " + run["model_args"], os.environ.get("HF_TOKEN", ""))
        continue
    for name in ("model", "submissions"):
        (folder := Path(run["output_path"], name)).mkdir(parents=True, exist_ok=True)
        record = {{"config": run, "process": os.getpid(), "cwd": os.getcwd(), "told": os.environ.get("TOLD")}}
        written = len(list(folder.glob("*.json")))
        (folder / f"{{written}}_results.json").write_text(json.dumps(record if name == "model" else []))
"""


@pytest.fixture
def run_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Evaluate runs with the options names and number of cores."""
    program = tmp_path / "lmms-eval"
    program.write_text(STAND_IN.format(python=sys.executable), "utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(processes, "_program", lambda: str(program))
    (tmp_path / "mirror").mkdir()
    (tmp_path / "results").mkdir()

    def make(
        names: Sequence[str], cores: int, interrupted: Any = None
    ) -> tuple[list[dict[str, Any] | RunError], list[int]]:
        monkeypatch.setattr("os.cpu_count", lambda: cores)
        finished_counts: list[int] = []
        folder = tmp_path / "results"
        runs = [
            DemoRun({"model": "m", "model_args": name, "tasks": "a,b"}, folder / name.split("=")[0]) for name in names
        ]
        environment = {"TOLD": "yes", "HF_TOKEN": "hf_SECRET"}
        progressed = finished_counts.append if interrupted is None else interrupted
        return evaluate(
            runs, folder, tmp_path / "mirror", environment, secret_values(environment), progressed
        ), finished_counts

    return make


def test_a_failed_run_is_named_and_the_others_are_evaluated(run_all: Any, tmp_path: Path) -> None:
    """A refused run ends its process; the runs after it are still evaluated."""
    names = ["first", "second=broken", "third", "fourth=refused", "fifth", "sixth=broken"]
    outcomes, finished_counts = run_all(names, 1)
    for name, outcome in zip(names, outcomes, strict=True):
        log = tmp_path / "results" / name.split("=")[0] / "log.txt"
        if "=" not in name:
            assert outcome["config"]["model_args"] == name
            assert (outcome["cwd"], outcome["told"]) == (str(tmp_path / "mirror"), "yes")
            assert len(list(log.parent.rglob("model/*_results.json"))) == 1, "made once"
            continue
        assert isinstance(outcome, RunError)
        reason = f"Oops: {name} [REDACTED]" if "broken" in name else "lmms-prune: error: no\n    such thing"
        assert str(outcome) == f"this run left no results; its log is {log} and ends with:\n{reason}"
    first, third, fifth = (outcomes[number]["process"] for number in (0, 2, 4))
    assert first == third != fifth
    assert finished_counts[-1] == len(names)
    logs = [path.read_text("utf-8") for path in tmp_path.rglob("*.log")]
    assert "INFO starts first {'token': '[REDACTED]'}\n" in logs[0]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and b"hf_SECRET" in path.read_bytes()]


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("unusable", "ModuleNotFoundError: No module named 'filelock._api'"),
        ("other", "lmms-prune: error: torch 1.0 is installed"),
        ("early", "AttributeError: module 'numpy' has no attribute 'x'"),
    ],
)
@pytest.mark.parametrize("cores", [1, 2])
def test_a_failure_that_all_runs_share_ends_them_at_once(
    run_all: Any, kind: str, reason: str, cores: int, tmp_path: Path
) -> None:
    """No run is started after the first failure, and running processes are ended."""
    names = [f"first={kind}", "second=slow", f"third={kind}", "fourth=slow"]
    with pytest.raises(RunError, match="every run fails for the same reason, so no more were started") as error:
        run_all(names, cores)
    assert not list(tmp_path.rglob("*_results.json")), "the slow one, left alone, leaves results"
    log = tmp_path / "results" / "process-1.log"
    assert str(error.value).endswith(f"its log is {log} and ends with:\n{reason}")
    logs = [path.read_text("utf-8") for path in tmp_path.rglob("*.log")]
    assert sum(text.count("INFO starts") for text in logs) == cores


def test_a_failure_that_not_all_runs_share_ends_no_other(run_all: Any) -> None:
    outcomes, _ = run_all(["first", "second=early", "third"], 1)
    assert [isinstance(outcome, RunError) for outcome in outcomes] == [False, True, False]


@pytest.mark.parametrize(("cores", "expected"), [(1, [5]), (3, [1, 2, 2]), (8, [1] * 5)])
def test_there_are_as_many_processes_as_cores(run_all: Any, cores: int, expected: list[int]) -> None:
    outcomes, _ = run_all([f"run-{number}" for number in range(5)], cores)
    pids = [outcome["process"] for outcome in outcomes]
    assert sorted(pids.count(pid) for pid in set(pids)) == expected


def test_results_of_an_earlier_call_are_not_taken(run_all: Any) -> None:
    before, _ = run_all(["one", "two"], 1)
    after, _ = run_all(["one=broken", "two"], 1)
    assert isinstance(after[0], RunError)
    assert before[1]["process"] != after[1]["process"]


def test_the_command_and_the_configuration_are_the_same_run(tmp_path: Path) -> None:
    run = DemoRun({"model": "m", "model_args": "schedule=dart@1:0.5,random@2:0.1", "tasks": "a"}, tmp_path)
    [_, *words] = run.command
    flag = words.pop()
    assert flag == "--log_samples"
    named = {name.removeprefix("--"): value for name, value in zip(words[::2], words[1::2], strict=True)}
    assert {**named, "log_samples": True} == run.configuration


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interruption_ends_the_processes(run_all: Any, tmp_path: Path, kind: type[BaseException]) -> None:
    """After Ctrl-C on the command only, or SIGTERM, no process may go on."""

    def interrupted(_: int) -> None:
        if all("starts" in log.read_text("utf-8") for log in (tmp_path / "results").rglob("log.txt")):
            raise kind

    begun = time.monotonic()
    with pytest.raises(kind):
        run_all(["slow=1", "slow=2"], 2, interrupted)
    assert time.monotonic() - begun < 40, "each would have gone on for a minute"


def test_sigterm_ends_a_command_as_an_interruption_does() -> None:
    with pytest.raises(SystemExit) as ended, ended_by_sigterm():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert ended.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
