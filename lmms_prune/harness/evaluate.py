"""The process that evaluates for a sweep: ``[torchrun …] -m lmms_prune.harness.evaluate``.

Its standard input brings one JSON object a line: lmms-eval's options as a ``--config`` file has them. Each is done by
lmms-eval's own command, whose files are the result; the standard output gets the line `STARTED` before and the line
`FINISHED` after it. All other output belongs to that evaluation, and the sweep, which reads it, writes its log. Equal weights are loaded once. Any error ends the
process, since one that came from the device would meet every later evaluation too. When the input ends, so does the
process, at once.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from io import FileIO
from queue import SimpleQueue
from threading import Thread
from typing import Any

STARTED, FINISHED = "lmms-prune: started", "lmms-prune: finished"


def main() -> None:
    """Evaluate what the standard input brings, until it ends."""
    import torch.distributed as dist
    from accelerate import Accelerator, InitProcessGroupKwargs

    from lmms_prune.harness.loading import shared_weights

    # As lmms-eval's command begins. On CPUs only torch itself knows afterwards that torchrun started several processes.
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
            # What is printed of this evaluation, by any of the processes, comes before the line that ends it.
            sys.stdout.flush()
            sys.stderr.flush()
            if several:
                dist.barrier()
            if jobs:
                jobs.finished()
                print(f"\n{FINISHED}", flush=True)


class _Jobs:
    """The lines of the standard input, in a thread that ends the process if the input ends amid an evaluation."""

    def __init__(self) -> None:
        self._lines: SimpleQueue[str | None] = SimpleQueue()
        self._busy = False
        Thread(target=self._read, daemon=True).start()

    def next(self) -> str | None:
        """The next line; None when there are no more."""
        return self._lines.get()

    def finished(self) -> None:
        """Say that the last line is done with."""
        self._busy = False

    def _read(self) -> None:
        # Unbuffered, because a lock that this thread held at the interpreter's end would be an error.
        with FileIO(0, closefd=False) as stream:
            for line in stream:
                self._busy = True
                self._lines.put(line.decode())
        if self._busy:
            os._exit(1)
        self._lines.put(None)


@contextmanager
def _harness() -> Iterator[Any]:
    """lmms-eval's command for one configuration, as a function of its options."""
    from loguru import logger

    # Its parser and its logger are set up as its own command does.
    arguments, sys.argv = sys.argv, ["lmms-eval"]
    from lmms_eval import __main__ as command

    parser, _ = command.parse_eval_args()
    defaults = vars(parser.parse_args([]))
    sys.argv = arguments
    logger.remove()
    logger.add(sys.stdout, level="INFO")
    original, managers = command.TaskManager, {}

    def manager(verbosity: str, include_path: Any, model_name: str) -> Any:
        # Its index of two thousand YAMLs takes seconds to build. The tasks themselves are made anew for each evaluation.
        key = (str(include_path), model_name)
        if key not in managers:
            managers[key] = original(verbosity, include_path=include_path, model_name=model_name)
        return managers[key]

    def evaluate(settings: Mapping[str, Any]) -> None:
        command.cli_evaluate_single(Namespace(**{**defaults, **settings}))

    command.TaskManager = manager
    try:
        yield evaluate
    finally:
        command.TaskManager = original


if __name__ == "__main__":
    main()
