"""`lmms-prune sweep` as a process, on tasks whose own code prints secrets, crashes or kills: what is reported, and what stays on disk."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from faulty_tasks import write_task
from sweeps import SECRETS, Place, config, holding_a_secret

from lmms_prune.sweep.jobs import PARTIAL

TASKS = {
    "printing": """
def question(doc):
    secret = os.environ["SOME_PASSWORD"]
    print("printed", secret, repr(secret), flush=True)
    os.write(2, b"in two parts " + secret[:7].encode())
    os.write(1, secret[7:].encode() + b" is whole\\n")
    subprocess.run([sys.executable, "-c", "import os; print('a child has', os.environ['HF_TOKEN'])"], check=True)
    return "Is it?"
""",
    "unscored": """
def scores(doc, results):
    raise RuntimeError("cannot score with " + os.environ["SOME_PASSWORD"])
""",
    "killed": """
def question(doc):
    os.write(1, b"the last words are " + os.environ["HF_TOKEN"].encode())
    os.kill(os.getpid(), signal.SIGKILL)
""",
}


@pytest.mark.slow
def test_a_task_that_prints_crashes_or_kills(place: Place, tmp_path: Path) -> None:
    """Each failure is reported with its last error and exit code 1; no file of a job holds a secret."""
    for name, functions in TASKS.items():
        write_task(tmp_path / "tasks", name, functions)
    # A secret in the arguments would be in the settings, the results, the record and the journal.
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(f"My password is {SECRETS['SOME_PASSWORD']}.", encoding="utf-8")
    path = config(tmp_path, "a", "none", ",".join(TASKS), system_prompt=prompt)
    path.write_text(f"{path.read_text(encoding='utf-8')}include_path: {tmp_path / 'tasks'}\n", encoding="utf-8")
    out = tmp_path / "out"
    done = place.sweep(path, "--out", out, "--json")
    assert done.returncode == 1
    record = json.loads(done.stdout.splitlines()[-1])
    assert [job["state"] for job in record["jobs"]] == ["done", "failed", "failed"], done.stderr
    assert holding_a_secret(out) == []
    for secret in SECRETS.values():
        assert secret not in done.stdout + done.stderr

    (printing, unscored, killed) = (
        (out / folder / "log.txt").read_text(encoding="utf-8").splitlines()
        for folder in ("a/printing", f"{PARTIAL}/a@unscored", f"{PARTIAL}/a@killed")
    )
    assert printing.count("printed [REDACTED] '[REDACTED]'") >= 4
    assert printing.count("in two parts [REDACTED] is whole") >= 4
    assert printing.count("a child has [REDACTED]") >= 4
    # lmms-eval retries its scoring and then prints an error of its own; the failure must still be reported.
    reason = record["jobs"][1]["reason"]
    assert re.fullmatch(r"tenacity\.RetryError: .* raised RuntimeError>\] \(exit code 1\)\n  log: \S+log\.txt", reason)
    assert f"a, unscored: {reason}\n" in done.stderr
    assert "RuntimeError: cannot score with [REDACTED]" in unscored
    # A process killed in the middle of a line leaves that line in the log.
    assert killed[-1] == "the last words are [REDACTED]"
    assert "a, killed: the last words are [REDACTED] (exit code -9)\n" in done.stderr
    # The journals of failed jobs stay.
    (run,) = out.glob(f"{PARTIAL}/a@unscored.journal/*/run.json")
    assert json.loads(run.read_text(encoding="utf-8"))["system_prompt"] == "My password is [REDACTED]."
    (results,) = out.glob("a/printing/*_results.json")
    recorded = json.loads(results.read_text(encoding="utf-8"))["config"]["batch_sizes"][0]
    assert recorded["settings"]["system_prompt"] == "My password is [REDACTED]."
    # A second sweep recognises the result as complete.
    again = place.sweep(path, "--out", out, "--tasks", "printing")
    assert (again.returncode, "1 complete before" in again.stdout) == (0, True), again.stderr
