"""The process that evaluates for a sweep: ``[torchrun …] -m lmms_prune.harness.evaluate``.

It reads one JSON object per line from its standard input: lmms-eval's options, as in a ``--config`` file. Each job is run
by lmms-eval's own command, whose files are the result. Two keys are not lmms-eval's: `documents`, the numbers of
the documents to evaluate, and `sample`, how they were drawn. The others are left out, and both are recorded in the results. The standard output gets the line `STARTED` before a job and the
line `FINISHED` after it; all output between belongs to the job, and the sweep writes it to the job's log. Equal weights
are loaded once. Any error ends the process, since an error of the device would affect every later job too. When the
input ends, the process ends at once.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from io import FileIO
from queue import SimpleQueue
from threading import Thread
from typing import Any

STARTED, FINISHED = "lmms-prune: started", "lmms-prune: finished"


def main() -> None:
    """Evaluate the jobs of the standard input until it ends."""
    import torch.distributed as dist
    from accelerate import Accelerator, InitProcessGroupKwargs

    from lmms_prune.harness.loading import shared_weights

    # lmms-eval's command begins like this, too. On CPUs only torch.distributed then knows about torchrun's processes.
    Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(weeks=1))])
    several = dist.is_initialized()
    jobs = None if several and dist.get_rank() else _Jobs()
    with shared_weights(), _harness() as evaluate:
        while True:
            line = [jobs.next() if jobs else None]
            if several:
                dist.broadcast_object_list(line)
            if line[0] is None:
                return
            if jobs:
                print(f"\n{STARTED}", flush=True)
            evaluate(json.loads(line[0]))
            # All processes flush their output before the line that ends the job.
            sys.stdout.flush()
            sys.stderr.flush()
            if several:
                dist.barrier()
            if jobs:
                jobs.finished()
                print(f"\n{FINISHED}", flush=True)


class _Jobs:
    """The lines of the standard input. Its reading thread ends the process if the input ends during a job."""

    def __init__(self) -> None:
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._busy = False
        Thread(target=self._read, daemon=True).start()

    def next(self) -> str | None:
        """Return the next line; None at the end."""
        return self._lines.get()

    def finished(self) -> None:
        """Mark the last line's job as finished."""
        self._busy = False

    def _read(self) -> None:
        # Unbuffered: a buffer's lock held by this thread at the interpreter's exit would be a fatal error.
        with FileIO(0, closefd=False) as stream:
            for line in stream:
                self._busy = True
                self._lines.put(line.decode())
        if self._busy:
            os._exit(1)
        self._lines.put(None)


@contextmanager
def _harness() -> Iterator[Any]:
    """Yield lmms-eval's command for one configuration, as a function of its options."""
    from loguru import logger

    # Its parser and logger are set up as in its own command.
    arguments, sys.argv = sys.argv, ["lmms-eval"]
    from lmms_eval import __main__ as command

    parser, _ = command.parse_eval_args()
    defaults = vars(parser.parse_args([]))
    sys.argv = arguments
    logger.remove()
    logger.add(sys.stdout, level="INFO")
    original, managers = command.TaskManager, {}

    def manager(verbosity: str, include_path: Any, model_name: str) -> Any:
        # Indexing lmms-eval's two thousand YAMLs takes seconds, so it is done once. Tasks are still created for each job.
        key = (str(include_path), model_name)
        if key not in managers:
            managers[key] = original(verbosity, include_path=include_path, model_name=model_name)
        return managers[key]

    def evaluate(settings: Mapping[str, Any]) -> None:
        with _only(settings.get("documents")):
            command.cli_evaluate_single(Namespace(**{**defaults, **settings}))

    command.TaskManager = manager
    try:
        yield evaluate
    finally:
        command.TaskManager = original


@contextmanager
def _only(numbers: Sequence[int] | None) -> Iterator[None]:
    """Let lmms-eval see only the documents with these numbers, which they keep; None for all.

    lmms-eval has no such option. Requests and scores both go through its one function that applies limit and offset, so the
    documents are left out there. `limit` must be their count: lmms-eval reports it as the number of evaluated documents.
    """
    if numbers is None:
        yield
        return
    from lmms_eval import evaluator, utils

    original, kept = utils.create_iterator, frozenset(numbers)

    def only(raw_iterator: Any, rank: int, world_size: int, limit: Any = None, offset: int = 0) -> Any:
        chosen = (item for number, item in enumerate(raw_iterator) if number in kept)
        return original(chosen, rank=rank, world_size=world_size, limit=limit, offset=offset)

    utils.create_iterator = evaluator.create_iterator = only
    try:
        yield
    finally:
        utils.create_iterator = evaluator.create_iterator = original


if __name__ == "__main__":
    main()
