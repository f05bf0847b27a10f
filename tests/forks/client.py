"""Stands for a program that `server.py` forks: ``python client.py SOCKET PROGRAM …`` or ``python client.py SOCKET -m MODULE …``.

The program has this process's streams, folder and environment, and gives it its exit code. It ends with this process;
where this one is sent SIGTERM, the program is killed as by ``kill -9``, and then this one, too.
"""

import json
import os
import signal
import socket
import sys


def main(path: str, *words: str) -> None:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        job = json.dumps({"words": words, "cwd": os.getcwd(), "environment": dict(os.environ)}).encode()
        socket.send_fds(connection, [len(job).to_bytes(8, "big")], [0, 1, 2])
        connection.sendall(job)
        signal.signal(signal.SIGTERM, lambda *_: connection.shutdown(socket.SHUT_WR))
        code = int(connection.recv(8))
    if code < 0:
        os.kill(os.getpid(), -code)
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
