"""Several processes give what one gives."""

from __future__ import annotations

import pytest

SCHEDULE = "dart@2:0.44,random@5:0.3"
TASKS = ("pope", "scienceqa", "ocrbench")
TORCHRUN = ("torchrun", "--standalone", "--nproc_per_node", "2", "-m", "lmms_eval")
# With --cpu it starts but one process; without GPUs --multi_gpu is two on CPUs.
ACCELERATE = ("accelerate", "launch", "--multi_gpu", "--num_processes", "2", "--no_python")


@pytest.fixture(scope="module")
def processes(harness):
    """One launcher after the other, as each starts two processes: torchrun's are real ones, accelerate's are forked."""
    options = ("--model", "llava_pruned", "--model_args", harness.text("llava", schedule=SCHEDULE, seed=5))
    options += ("--tasks", ",".join(TASKS))
    forked = (*ACCELERATE, *harness.forking.prefix, "-m", "lmms_eval")
    return {
        ("torchrun", "3"): harness.run(*options, "--limit", "3", command=TORCHRUN),
        ("accelerate", None): harness.fork(*options, command=forked),
    }


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "limit"), [("torchrun", "3"), ("accelerate", None)])
def test_two_processes_give_what_one_gives(launcher, limit, processes, harness):
    run = processes[launcher, limit]
    options = {"limit": int(limit)} if limit else {}
    one = harness.pruned("llava", TASKS, options, schedule=SCHEDULE, seed=5)
    assert run.results is not None, run.stderr[-3000:]
    for task in TASKS:
        assert [row["doc_id"] for row in run.samples[task]] == list(range(int(limit or 4)))
    assert run.answers == one.answers
    assert run.accounting == one.accounting
    assert run.recorded["schedule"] == SCHEDULE
    scores = {
        task: {name: run.metrics[task][name] for name in run.metrics[task] if "stderr" not in name} for task in TASKS
    }
    assert scores == {task: {name: one.metrics[task][name] for name in scores[task]} for task in TASKS}


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "limit"), [("torchrun", "3"), ("accelerate", None)])
def test_the_processes_share_the_documents_out(launcher, limit, processes):
    # The throughput section is rank 0's alone: with three documents a task two of them, padded shares included.
    run = processes[launcher, limit]
    assert run.results is not None, run.stderr[-3000:]
    everything = sum(row["output_tokens"] for rows in run.accounting.values() for row in rows)
    assert 0 < run.results["throughput"]["total_gen_tokens"] < everything
