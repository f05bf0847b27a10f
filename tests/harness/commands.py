"""Several commands of lmms-eval one after the other, each in a process of its own, given as a JSON file of jobs.

Each is forked from this process, which has imported what they all import: that takes ten times as long as a small run.
A job has `line` (the program's path and its arguments), `cwd`, `stdout` and `stderr` (files), and gets a `returncode`.
"""

import gc
import json
import os
import runpy
import sys
from pathlib import Path

import lmms_eval.__main__  # noqa: F401

import lmms_prune.harness.models  # noqa: F401


def main(file: Path) -> None:
    jobs = json.loads(file.read_text("utf-8"))
    # What the collector never visits is never copied for a child. (At its end, a library may say that things leaked.)
    gc.freeze()
    for job in jobs:
        child = os.fork()
        if not child:
            os.chdir(job["cwd"])
            for number, name in ((1, "stdout"), (2, "stderr")):
                os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT), number)
            sys.argv = job["line"]
            runpy.run_path(sys.argv[0], run_name="__main__")
            sys.exit()
        job["returncode"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    file.write_text(json.dumps(jobs), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
