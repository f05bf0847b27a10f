"""Commands as processes, without the ten seconds of imports that each begins with."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

SERVER, CLIENT = (Path(__file__).parent / "forks" / name for name in ("server.py", "client.py"))
PROGRAMS = ("lmms-eval", "lmms-prune", "torchrun", "accelerate")


class Forking:
    """Starts `forks/server.py` when it is first needed; what `prefix` is put before is a program that it forks.

    Args:
        folder: for the socket and stand-ins; a path of at most ninety letters.
        environment: of the server and of every program: libraries that read theirs when they are imported have read
            the server's.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]):
        self.folder, self.environment = folder, dict(environment)
        self._server: subprocess.Popen[str] | None = None

    @cached_property
    def prefix(self) -> list[str]:
        socket, pipe = str(self.folder / "socket"), subprocess.PIPE
        line = [sys.executable, str(SERVER), socket]
        self._server = subprocess.Popen(line, env=self.environment, stdin=pipe, stdout=pipe, text=True)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "listening\n"
        return [sys.executable, str(CLIENT), socket]

    @property
    def launch(self) -> str:
        """What a command's ``--launch`` takes to have its own processes forked."""
        return shlex.join(self.prefix)

    def program(self, name: str, *words: object) -> list[str]:
        """The command line of a program that is installed beside this Python."""
        return [*self.prefix, str(Path(sys.executable).with_name(name)), *map(str, words)]

    def run(self, name: str, *words: object, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, with its output as text; options are those of `subprocess.run`."""
        options = {"env": self.environment, "capture_output": True, "text": True, "check": False, **options}
        return subprocess.run(self.program(name, *words), **options)

    @cached_property
    def stand_ins(self) -> Path:
        """A folder of programs that fork the real ones of the same names: for what looks them up in PATH."""
        folder = self.folder / "programs"
        folder.mkdir()
        for name in PROGRAMS:
            script = folder / name
            script.write_text(f'#!/bin/sh\nexec {shlex.join(self.program(name))} "$@"\n', encoding="utf-8")
            script.chmod(0o755)
        return folder

    def close(self) -> None:
        if self._server is not None:
            self._server.communicate(timeout=60)
