"""What the commands share: errors that a user can mend end a command with one message and exit code 2."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import typer


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
