"""What the commands share: errors that a user can mend end a command with one message and exit code 2."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NoReturn

import typer

from lmms_prune.record.redaction import redacted

SECRETS: ContextVar[tuple[str, ...]] = ContextVar("secrets", default=())
"""Values that no file may hold: the command line sets those of its environment, commands hand them to whoever writes."""


def fail(message: str) -> NoReturn:
    """End the command."""
    typer.echo(message if message.startswith("schedule:") else f"lmms-prune: {message}", err=True)
    raise typer.Exit(2) from None


@contextmanager
def plainly(*errors: type[Exception]) -> Iterator[None]:
    """End the command with the message alone where one of `errors` is raised."""
    try:
        yield
    except errors as error:
        fail(str(error))


@contextmanager
def redacted_traces(secrets: Collection[str]) -> Iterator[None]:
    """An error that ends the command with a stack trace is printed without secrets; a cluster writes it to a job's log."""
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except Exception:
        typer.echo(redacted(traceback.format_exc(), secrets), err=True)
        raise typer.Exit(1) from None


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Inside, SIGTERM ends the command as an interruption does, so that it ends the processes that it has started."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
