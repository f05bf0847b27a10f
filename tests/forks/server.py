"""Forks processes that have imported what all commands import, for each `client.py`: ``python server.py SOCKET``.

What is imported takes ten times as long as a small run, what an evaluation imports and reads before it begins three times
as long. A library that reads the environment when it is imported has read this process's. It ends when its standard input
does.
"""

import atexit
import contextlib
import copy
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
from typing import Any

import lmms_eval.__main__
import lmms_eval.tasks
import pytablewriter  # noqa: F401  (of which lmms-eval's tables are made)
import transformers.models.llava.processing_llava
import transformers.models.qwen2_5_vl.processing_qwen2_5_vl  # noqa: F401
from lmms_eval.api.metrics import stderr_for_metric

import lmms_prune.harness.models  # noqa: F401
from lmms_prune.compat.installed import moved_names


def main(path: str) -> None:
    _look_ahead()
    # What the collector never visits is never copied for a child. (At its end, a library may say that things leaked.)
    gc.freeze()
    signal.signal(signal.SIGCHLD, _reap)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        print("listening", flush=True)
        while listening in select.select([listening, 0], [], [])[0]:
            connection = listening.accept()[0]
            if not os.fork():
                listening.close()
                _serve(connection)
                return
            connection.close()


def _look_ahead() -> None:
    """Do once what every evaluation does at its beginning and its end, and would do to the same effect."""
    moved_names()  # imports the models
    stderr_for_metric(None, 1)  # looks for two tasks' own metrics, and nltk with them
    manager = lmms_eval.tasks.TaskManager
    read, own = manager._get_task_and_group, f"{os.path.dirname(lmms_eval.tasks.__file__)}/"
    index = read(manager("ERROR", include_defaults=False), own)

    def indexed(self: Any, folder: str) -> Any:
        # Of lmms-eval's two thousand files; those of an --include_path are read by each program.
        return copy.deepcopy(index) if folder == own else read(self, folder)

    manager._get_task_and_group = indexed


def _reap(*_: object) -> None:
    """Take note of all processes that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _serve(connection: socket.socket) -> None:
    """Fork the program and wait for it, or kill it when its client ends."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, streams, *_ = socket.recv_fds(connection, 8, 3)
    job = b""
    while len(job) < int.from_bytes(size, "big"):
        job += connection.recv(2**20)
    ended, running = os.pipe()
    child = os.fork()
    if not child:
        connection.close()
        _run(json.loads(job), streams)
        return
    for stream in (*streams, running):
        os.close(stream)
    if connection in select.select([connection, ended], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(str(code).encode())
    # Without the libraries' farewells.
    os._exit(0)


def _run(job: dict[str, Any], streams: list[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    sys.argv = job["words"]
    code: Any = 0
    try:
        if sys.argv[0] == "-m":
            sys.argv, sys.path[0] = sys.argv[1:], job["cwd"]
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = os.path.dirname(os.path.realpath(sys.argv[0]))
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    _end(code)


def _end(code: Any) -> None:
    """End as Python does, but for taking apart all that was imported, which takes as long as a small run."""
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    main(sys.argv[1])
