"""Error handling that the commands share: errors that a user can fix end a command with one message and exit code 2."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn

import typer

from lmms_prune.record.redaction import redacted

SECRETS: ContextVar[tuple[str, ...]] = ContextVar("secrets", default=())
"""Values that no file may contain: the command line reads them from its environment, and commands pass them to writers."""

ENVIRONMENT: ContextVar[Mapping[str, str]] = ContextVar("environment")
"""The command line's environment, for commands that start processes with another."""


def fail(message: str) -> NoReturn:
    """End the command with a message and exit code 2."""
    typer.echo(message if message.startswith("schedule:") else f"lmms-prune: {message}", err=True)
    raise typer.Exit(2) from None


@contextmanager
def plainly(*errors: type[Exception]) -> Iterator[None]:
    """End the command with only the message if one of `errors` is raised inside the block."""
    try:
        yield
    except errors as error:
        fail(str(error))


@contextmanager
def redacted_traces(secrets: Collection[str]) -> Iterator[None]:
    """Print the stack trace of an unexpected error without secrets, because clusters write it to a job's log."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception:
        typer.echo(redacted(traceback.format_exc(), secrets), err=True)
        raise typer.Exit(1) from None


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside the block, SIGTERM ends the command like an interruption, so that it also ends the processes it started."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
