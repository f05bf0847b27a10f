"""`lmms-prune sweep` as a process: real evaluations of the demo's model on the demo's data."""

from __future__ import annotations

import json
import shlex
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from sweeps import SCHEDULES, TASKS, Place, config, holding_a_secret

from lmms_prune.sweep.jobs import PARTIAL


@pytest.fixture(scope="module")
def whole(place: Place) -> Path:
    """An uninterrupted sweep."""
    out = place.configs.parent / "whole"
    done = place.sweep(place.configs, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "4 evaluated" in done.stdout
    assert holding_a_secret(out) == []
    return out


def samples(out: Path) -> dict[str, list[dict[str, Any]]]:
    """The samples of every configuration and task below a sweep's folder, in the order of their documents."""
    samples = {}
    for path in sorted(out.glob("[!.]*/*/*_samples_*.jsonl")):
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        samples[f"{path.parents[1].name}/{path.parent.name}"] = sorted(rows, key=lambda row: row["doc_id"])
    assert all(len(rows) == 4 for rows in samples.values())
    return samples


@pytest.mark.slow
def test_a_sweep_writes_what_the_harness_writes(place: Place, whole: Path, tmp_path: Path) -> None:
    """Answers, scores, the record of the run and the names of all entries; the weights are loaded once."""
    options = ("--config", place.configs / "hybrid.yaml", "--output_path", tmp_path, "--log_samples")
    plain = place.fork("lmms-eval", *options)
    (path,) = [file for file in tmp_path.glob("*_results.json")]
    stock = json.loads(path.read_text(encoding="utf-8"))
    for task in TASKS:
        (path,) = (whole / "hybrid" / task).glob("*_results.json")
        swept = json.loads(path.read_text(encoding="utf-8"))
        assert set(swept) == set(stock), plain.stderr[-3000:]
        assert swept["results"] == {task: stock["results"][task]}
        assert swept["n-samples"] == {task: stock["n-samples"][task]}
        run, reference = (record["config"]["batch_sizes"][0] for record in (swept, stock))
        differing = {name for name in reference if run.get(name) != reference[name]}
        # Averages are over all tasks of a process.
        assert differing <= {"averages", "tasks", "other_load", "peak_memory"}
        assert swept["config"]["resolved_cli_args"]["output_path"] == str(whole / "hybrid" / task)
        (path,) = tmp_path.glob(f"*_samples_{task}.jsonl")
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        assert samples(whole)[f"hybrid/{task}"] == rows
    loads = ["Loading weights" in log.read_text(encoding="utf-8") for log in whole.glob("*/*/log.txt")]
    assert sorted(loads) == [False, False, False, True]
    # lmms-eval prints the token that it would log in with.
    assert all("'token': '[REDACTED]'" in log.read_text(encoding="utf-8") for log in whole.glob("*/*/log.txt"))
    assert "'token': 'hf_SECRET'" in plain.stdout


@pytest.mark.slow
def test_a_killed_and_restarted_sweep_gives_the_same_results(place: Place, whole: Path, tmp_path: Path) -> None:
    process = place.start(place.configs, "--out", tmp_path)
    # One job is complete, and half of the next one's answers are there.
    while not any(file.stat().st_size for file in tmp_path.glob(f"{PARTIAL}/hybrid@ocrbench.journal/*/*.jsonl")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    children = _children(process.pid)
    assert children
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert "[REDACTED]" in (tmp_path / PARTIAL / "hybrid@ocrbench" / "log.txt").read_text(encoding="utf-8")
    assert holding_a_secret(tmp_path) == []
    deadline = time.monotonic() + 60
    while any(_alive(child) for child in children):
        assert time.monotonic() < deadline, "the evaluating process outlives the sweep"
        time.sleep(0.1)
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "hybrid" / "pope").iterdir()}
    done = place.sweep(place.configs, "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["jobs"][0]["state"] == "skipped"
    assert record["done"] == 4 - record["skipped"] >= 1
    assert first == {path: path.stat().st_mtime_ns for path in (tmp_path / "hybrid" / "pope").iterdir()}
    assert samples(tmp_path) == samples(whole)
    # No answer was generated twice; only the number of resumed answers tells such a result from an uninterrupted one.
    swept, expected = (record_of(out / "hybrid" / "ocrbench") for out in (tmp_path, whole))
    assert swept["config"]["batch_sizes"][0].pop("resumed") >= 2
    assert expected["config"]["batch_sizes"][0].pop("resumed") == 0
    for record in (swept, expected):
        record["config"]["batch_sizes"][0].pop("other_load")
        record["config"]["batch_sizes"][0].pop("peak_memory")
    assert swept["config"]["batch_sizes"] == expected["config"]["batch_sizes"]
    assert swept["config"]["model_args"] == expected["config"]["model_args"]
    assert "journal" not in json.dumps(swept["config"])
    assert not (tmp_path / PARTIAL).exists()
    assert not list(tmp_path.rglob("*journal*"))


def record_of(folder: Path) -> dict[str, Any]:
    """The results file of one job."""
    (path,) = folder.glob("*_results.json")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_failure_does_not_stop_a_sweep(place: Place, tmp_path: Path) -> None:
    config(tmp_path, "a", "none", "no_such_task,pope")
    done = place.sweep(tmp_path, "--out", tmp_path / "out", "--limit", "2", "--json")
    assert done.returncode == 1
    record = json.loads(done.stdout.splitlines()[-1])
    assert [(job["task"], job["state"]) for job in record["jobs"]] == [("no_such_task", "failed"), ("pope", "done")]
    assert "a, no_such_task: ValueError: Tasks not found: no_such_task" in done.stderr
    assert (tmp_path / "out" / PARTIAL / "a@no_such_task" / "log.txt").is_file()


@pytest.mark.slow
def test_two_processes_evaluate_one_configuration(place: Place, whole: Path, tmp_path: Path) -> None:
    # torchrun passes ranks in the environment; as real processes: tests/harness/test_ranks.py.
    torchrun = place.forking.program("torchrun", "--standalone", "--nproc_per_node", 2, "--no-python")
    hybrid, launch = place.configs / "hybrid.yaml", shlex.join([*torchrun, *place.forking.prefix])
    done = place.fork("lmms-prune", "sweep", hybrid, "--out", tmp_path, "--launch", launch)
    assert done.returncode == 0, done.stderr
    assert samples(tmp_path) == {name: rows for name, rows in samples(whole).items() if name.startswith("hybrid")}
    assert all("[REDACTED]" in log.read_text(encoding="utf-8") for log in tmp_path.glob("hybrid/*/log.txt"))
    assert holding_a_secret(tmp_path) == []


@pytest.mark.slow
def test_a_sweep_on_a_cluster_gives_the_same_results(place: Place, whole: Path, tmp_path: Path) -> None:
    """submitit's local executor, which starts cluster jobs as processes."""
    options = ("--cluster", "local", "--cluster-option", "timeout_min=30", "--json")
    done = place.sweep(place.configs, "--out", tmp_path, *options)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[-1])
    assert record["done"] == 4
    assert samples(tmp_path) == samples(whole)
    assert len(list((tmp_path / ".jobs").glob("*_submitted.pkl"))) == len(SCHEDULES)
    assert holding_a_secret(tmp_path) == []


def _children(process: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def _alive(process: int) -> bool:
    """Whether a process exists and is not a zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_drawn_documents_are_the_same_in_every_configuration(place: Place, tmp_path: Path) -> None:
    """They are recorded in the results, and a sweep on others, or on the first ones, is another one."""
    options = (place.configs, "--out", tmp_path, "--tasks", "pope,mme", "--sample", "2")
    done = place.sweep(*options, "--sample-seed", "3")
    assert done.returncode == 0, done.stderr
    drawn: dict[str, list[list[int]]] = {"pope": [], "mme": []}
    for path in sorted(tmp_path.glob("[!.]*/*/*_results.json")):
        task, content = path.parent.name, json.loads(path.read_text(encoding="utf-8"))
        assert content["config"]["resolved_cli_args"]["sample"] == "2 with seed 3"
        assert content["n-samples"][task]["effective"] == 2
        numbers = content["config"]["resolved_cli_args"]["documents"]
        (rows,) = path.parent.glob("*_samples_*.jsonl")
        assert [json.loads(line)["doc_id"] for line in rows.read_text(encoding="utf-8").splitlines()] == numbers
        drawn[task].append(numbers)
    assert [len(numbers) for numbers in drawn.values()] == [len(SCHEDULES)] * 2
    assert all(first == second for first, second in drawn.values())
    first, second = drawn["mme"][0]
    assert first ^ 1 == second  # two questions about one image
    again = place.fork("lmms-prune", "sweep", *options, "--sample-seed", "3", "--dry-run")
    assert again.stdout.splitlines() == [f"complete: {name}, {task}" for name in SCHEDULES for task in ("pope", "mme")]
    for others in (("--sample", "4"), ()):
        whole = place.fork("lmms-prune", "sweep", *options[:-2], *others, "--dry-run")
        assert {line.split(":")[0] for line in whole.stdout.splitlines()} == {"would be replaced"}
