"""No failed run of ours exits with 0: whatever the failure, the command's exit code and its last line tell of it.

(A refused version: tests/compat/test_versions.py. As a library, the same failures are exceptions: test_errors.py,
test_generation.py, test_faults.py.)
"""

from __future__ import annotations

import re

import pytest
import yaml
from faulty_tasks import write_task

SCHEDULE = "dart@2:0.44,random@5:0.07"
BROKEN_IMAGE = """
from PIL import Image
def images(doc):
    return [Image.new("RGB", (0, 5)) if doc["question_id"] == "2" else doc["image"].convert("RGB")]
"""
# Functions of a task are imported when the run begins, so that they can harm the plugin.
FAILING_METHOD = """
from lmms_prune.methods.dart import DART
def select(self, *args, **options):
    raise ZeroDivisionError("no norm")
DART.select = select
"""
FAILING_RECORD = """
from lmms_prune.harness.pruned import PrunedModel
def log(self, *_):
    raise KeyError("averages")
PrunedModel._report = log
"""
FULL_DISK = """
import errno
from lmms_prune.harness import journal
def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
journal._line = full
"""
TASKS = {
    "broken_image": BROKEN_IMAGE,
    "failing_method": FAILING_METHOD,
    "failing_record": FAILING_RECORD,
    "full_disk": FULL_DISK,
    "sound": "",
}
SAMPLE = r"task 'TASK', document \d+"
# What is asked for, the exit code, and the message: from "lmms-prune: error: " to the end.
FAILURES = {
    "sample": ("broken_image", {}, (), 2, SAMPLE.replace("TASK", "broken_image") + ": .*an image of 0 x 5 pixels.*"),
    "argument": ("sound", {"shedule": "vtw@3"}, (), 2, r"model_args: unknown argument 'shedule'\..*'schedule'\?"),
    "schedule": (
        "sound",
        {"schedule": "fastvv@2:0.4"},
        (),
        2,
        r"(?s)schedule: .*unknown method 'fastvv'.*\^\^\^\^\^\^.*",
    ),
    "generation option": ("sound", {}, ("--gen_kwargs", "num_beams=2"), 2, r"num_beams=2: beam search .*num_beams=1\."),
    "examples": (
        "sound",
        {},
        ("--num_fewshot", "2"),
        2,
        r"--num_fewshot 2: lmms-eval shows no examples .*leave it out\.",
    ),
    "method": ("failing_method", {}, (), 2, SAMPLE.replace("TASK", "failing_method") + ": ZeroDivisionError: no norm"),
    "defect of ours": ("failing_record", {}, (), 1, "KeyError: 'averages'"),
    "journal is a file": (
        "sound",
        {"journal": "{file}"},
        (),
        2,
        r"model_args: journal=.* cannot be made: File exists.*",
    ),
    "journal's disk": (
        "full_disk",
        {"journal": "{folder}"},
        (),
        2,
        "journal: .*No space left on device.*start the same run.*",
    ),
    "checkpoint": ("sound", {"pretrained": "{qwen}"}, (), 2, "(?s).*'qwen2_5_vl'.*use --model qwen2_5_vl_pruned.*"),
    "no checkpoint": ("sound", {"pretrained": "{folder}/none"}, (), 2, "(?s).*pretrained=.*no checkpoint.*"),
}


@pytest.fixture(scope="module")
def include(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults") / "tasks"
    for name, functions in TASKS.items():
        write_task(folder, name, functions)
    return folder


def _told(run) -> str:
    """The message of ours, which is the last thing that is said."""
    assert run.stderr.count("lmms-prune: error: ") == 1, run.stderr[-2000:]
    _, _, message = run.stderr.rpartition("lmms-prune: error: ")
    # A forked process ends without a last collection (see forks/server.py), of which torch's compiler tells.
    return message.partition("\nnanobind: ")[0].rstrip()


@pytest.mark.slow
@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_the_exit_code_and_the_last_line(name, harness, include, tmp_path):
    task, arguments, options, code, message = FAILURES[name]
    (tmp_path / "file").touch()
    known = {"file": tmp_path / "file", "folder": tmp_path / "made", "qwen": harness.checkpoints["qwen2_5_vl"]}
    values = {"schedule": SCHEDULE, **{key: value.format(**known) for key, value in arguments.items()}}
    line = ("--model", "llava_pruned", "--model_args", harness.text("llava", **values), "--tasks", task)
    run = harness.fork(*line, "--include_path", str(include), *options)
    assert re.fullmatch(message, _told(run)), _told(run)
    assert run.returncode == code
    assert run.results is None
    # A stack trace helps only whoever mends this package.
    assert ("Traceback" in run.stderr) is (code == 1)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["sound", "broken_image"])
def test_of_two_runs_in_a_config_either_may_fail(first, harness, include, tmp_path):
    """A run that was done before stays; one that would have come after is not made, and the exit code says so."""
    tasks = (first, "broken_image" if first == "sound" else "sound")
    runs = [
        {
            "model": "llava_pruned",
            "model_args": harness.text("llava", schedule=SCHEDULE),
            "tasks": task,
            "include_path": str(include),
            "output_path": str(tmp_path / task),
            "log_samples": True,
        }
        for task in tasks
    ]
    file = tmp_path / "runs.yaml"
    file.write_text(yaml.safe_dump(runs), "utf-8")
    run = harness.fork("--config", str(file), output_in_config=True)
    assert run.returncode == 2
    assert re.fullmatch(FAILURES["sample"][-1], _told(run))
    left = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*_results.json")}
    assert left == ({"sound"} if first == "sound" else set())


@pytest.mark.slow
def test_of_two_processes_both_end_when_a_sample_of_either_fails(harness, include):
    """The other one waits for it at the end; torchrun ends both. (It starts real processes in test_ranks.py.)"""
    line = ("--model", "llava_pruned", "--model_args", harness.text("llava", schedule=SCHEDULE))
    torchrun = ("torchrun", "--standalone", "--nproc_per_node", "2", "--no-python", *harness.forking.prefix)
    command = (*torchrun, "-m", "lmms_eval")
    run = harness.fork(*line, "--tasks", "broken_image", "--include_path", str(include), command=command)
    assert run.returncode == 1
    assert re.search(f"lmms-prune: error: {FAILURES['sample'][-1]}\n", run.stderr)
    assert run.results is None
    assert re.search(r"exitcode\s*: 2 ", run.stderr)
