"""Forks processes that have imported what all commands import, for each `client.py`: ``python server.py SOCKET``.

What is imported takes ten times as long as a small run. A library that reads the environment when it is imported has read
this process's. It ends when its standard input does.
"""

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import sys
from typing import Any

import lmms_eval.__main__  # noqa: F401

import lmms_prune.harness.models  # noqa: F401


def main(path: str) -> None:
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
    if sys.argv[0] == "-m":
        sys.argv = sys.argv[1:]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1])
