"""Hooks that are registered for the duration of a block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def hooked(handles: Iterable[Any]) -> Iterator[None]:
    """Keep hooks registered inside the block, and remove all of them afterwards, whatever is raised.

    Args:
        handles: return values of ``register_forward_hook`` and similar. In a generator that registers one hook after the
            other, the earlier hooks are removed too if registering a later one fails.
    """
    kept = []
    try:
        for handle in handles:
            kept.append(handle)
        yield
    finally:
        for handle in kept:
            handle.remove()
