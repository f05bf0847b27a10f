"""Commands as processes, without the ten seconds of imports that each begins with."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

SERVER, CLIENT = (Path(__file__).parent / "forks" / name for name in ("server.py", "client.py"))


class Forking:
    """Starts `forks/server.py` once; what `prefix` is put before is a program that it forks.

    Args:
        socket: a path of at most a hundred letters.
        environment: of the server: libraries that read theirs when they are imported have this one in every program.
    """

    def __init__(self, socket: Path, environment: Mapping[str, str]):
        self.prefix = [sys.executable, str(CLIENT), str(socket)]
        line, pipe = [sys.executable, str(SERVER), str(socket)], subprocess.PIPE
        self._server = subprocess.Popen(line, env=dict(environment), stdin=pipe, stdout=pipe, text=True)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "listening\n"

    def program(self, name: str, *words: object) -> list[str]:
        """The command line of a program that is installed beside this Python."""
        return [*self.prefix, str(Path(sys.executable).with_name(name)), *map(str, words)]

    def close(self) -> None:
        self._server.communicate(timeout=60)
